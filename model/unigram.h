// A unigram language model over pieces: the most likely segmentation of a word. Internal to model/.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace slalom {

// Immutable; concurrent use is safe.
class Unigram {
 public:
  struct Piece {
    std::string text;
    double score = 0;  // log probability
    std::int32_t id = 0;
  };

  // Characters that no piece covers get `unknown_id`.
  Unigram(std::vector<Piece> pieces, std::int32_t unknown_id);

  // Appends the ids of the best segmentation of `word` (Viterbi). Unknown characters score 10 below
  // the worst piece; neighbouring ones become one id. Mirrors Unigram::encode_optimized of Hugging
  // Face tokenizers, ties included: of two equal paths the one whose last piece is longer wins.
  void Segment(std::string_view word, std::vector<std::int32_t>& ids) const;

 private:
  std::vector<Piece> pieces_;  // sorted by text
  std::int32_t unknown_id_;
  double unknown_score_ = 0;
};

}  // namespace slalom
