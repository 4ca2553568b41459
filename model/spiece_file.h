// What the tokenizer needs of a SentencePiece model file ("spiece.model"). Internal to model/.
//
// The file is a serialised sentencepiece.ModelProto; it is read here rather than by
// libsentencepiece, whose Debian package carries a protobuf of its own that cannot share a process
// with gRPC's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace slalom {

struct SpieceFile {
  // sentencepiece.ModelProto.SentencePiece.Type.
  enum class Type {
    kNormal = 1,
    kUnknown = 2,
    kControl = 3,
    kUserDefined = 4,
    kUnused = 5,
    kByte = 6
  };
  struct Piece {
    std::string text;
    float score = 0;  // log probability
    Type type = Type::kNormal;
  };

  std::vector<Piece> pieces;  // by id
  // Ids of the special pieces, -1 where there is none.
  std::int32_t unk_id = -1;
  std::int32_t eos_id = -1;
  std::int32_t pad_id = -1;
};

// Throws Error(kDataLoss) that begins with `path` when the bytes are no such file: not the format,
// not a unigram model, an empty, repeated or non-UTF-8 piece, a score that is not finite, no or two unknown pieces.
SpieceFile ParseSpieceFile(std::span<const std::byte> bytes, const std::string& path);

}  // namespace slalom
