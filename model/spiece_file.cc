#include "model/spiece_file.h"

#include <utf8proc.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "kernels/core/error.h"

namespace slalom {
namespace {

// Field numbers of sentencepiece_model.proto.
constexpr std::uint32_t kModelPieces = 1;
constexpr std::uint32_t kModelTrainerSpec = 2;
constexpr std::uint32_t kPieceText = 1;
constexpr std::uint32_t kPieceScore = 2;
constexpr std::uint32_t kPieceType = 3;
constexpr std::uint32_t kTrainerModelType = 3;
constexpr std::uint32_t kTrainerUnkPiece = 45;
constexpr std::uint32_t kTrainerEosPiece = 47;
constexpr std::uint32_t kTrainerPadPiece = 48;
constexpr std::uint64_t kUnigram = 1;  // TrainerSpec.ModelType

struct Malformed {
  const char* what;
};

// Walks the fields of one protobuf message (protobuf.dev/programming-guides/encoding).
class Fields {
 public:
  enum Wire : std::uint32_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };
  struct Field {
    std::uint32_t number = 0;
    std::uint32_t wire = 0;
    std::uint64_t value = 0;  // of varints and fixed ones
    std::string_view bytes;   // of kBytes
  };

  explicit Fields(std::string_view data) : data_(data) {}

  std::optional<Field> Next() {
    if (data_.empty()) return std::nullopt;
    const std::uint64_t tag = TakeVarint();
    Field field;
    field.number = static_cast<std::uint32_t>(tag >> 3);
    field.wire = static_cast<std::uint32_t>(tag & 7);
    if (field.number == 0 || tag >> 32 != 0) throw Malformed{"a bad field number"};
    switch (field.wire) {
      case kVarint:
        field.value = TakeVarint();
        break;
      case kFixed64:
        field.value = TakeFixed<std::uint64_t>();
        break;
      case kFixed32:
        field.value = TakeFixed<std::uint32_t>();
        break;
      case kBytes:
        field.bytes = Take(TakeVarint());
        break;
      default:
        throw Malformed{"an unknown wire type"};
    }
    return field;
  }

 private:
  std::string_view Take(std::uint64_t size) {
    if (size > data_.size()) throw Malformed{"it is cut off"};
    const std::string_view taken = data_.substr(0, size);
    data_.remove_prefix(size);
    return taken;
  }
  template <typename Unsigned>
  Unsigned TakeFixed() {
    static_assert(std::endian::native == std::endian::little);
    Unsigned value = 0;
    std::memcpy(&value, Take(sizeof(value)).data(), sizeof(value));
    return value;
  }
  std::uint64_t TakeVarint() {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(Take(1)[0]);
      value |= static_cast<std::uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
    throw Malformed{"a number that is too long"};
  }

  std::string_view data_;
};

void Expect(const Fields::Field& field, std::uint32_t wire) {
  if (field.wire != wire) throw Malformed{"a field of the wrong type"};
}

bool IsUtf8(std::string_view text) {
  const auto* data = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  auto left = static_cast<utf8proc_ssize_t>(text.size());
  while (left > 0) {
    utf8proc_int32_t codepoint = 0;
    const utf8proc_ssize_t length = utf8proc_iterate(data, left, &codepoint);
    if (length <= 0) return false;
    data += length;
    left -= length;
  }
  return true;
}

SpieceFile::Piece ParsePiece(std::string_view bytes) {
  SpieceFile::Piece piece;
  Fields fields(bytes);
  while (const auto field = fields.Next()) {
    if (field->number == kPieceText) {
      Expect(*field, Fields::kBytes);
      piece.text = field->bytes;
    } else if (field->number == kPieceScore) {
      Expect(*field, Fields::kFixed32);
      piece.score = std::bit_cast<float>(static_cast<std::uint32_t>(field->value));
    } else if (field->number == kPieceType) {
      Expect(*field, Fields::kVarint);
      if (field->value < 1 || field->value > 6) throw Malformed{"a piece of unknown type"};
      piece.type = static_cast<SpieceFile::Type>(field->value);
    }
  }
  if (piece.text.empty()) throw Malformed{"an empty piece"};
  if (!IsUtf8(piece.text)) throw Malformed{"a piece that is not UTF-8"};
  if (!std::isfinite(piece.score)) throw Malformed{"a score that is not finite"};
  return piece;
}

// How the special pieces are called.
struct SpecialNames {
  std::string unk = "<unk>";
  std::string eos = "</s>";
  std::string pad = "<pad>";
};

SpecialNames ParseTrainerSpec(std::string_view bytes) {
  SpecialNames names;
  Fields fields(bytes);
  while (const auto field = fields.Next()) {
    if (field->number == kTrainerModelType) {
      Expect(*field, Fields::kVarint);
      if (field->value != kUnigram) throw Malformed{"it is not a unigram model"};
    }
    std::string* name = field->number == kTrainerUnkPiece   ? &names.unk
                        : field->number == kTrainerEosPiece ? &names.eos
                        : field->number == kTrainerPadPiece ? &names.pad
                                                            : nullptr;
    if (name == nullptr) continue;
    Expect(*field, Fields::kBytes);
    *name = field->bytes;
  }
  return names;
}

SpieceFile Parse(std::string_view bytes) {
  SpieceFile file;
  SpecialNames names;
  Fields fields(bytes);
  while (const auto field = fields.Next()) {
    if (field->number == kModelPieces) {
      Expect(*field, Fields::kBytes);
      file.pieces.push_back(ParsePiece(field->bytes));
    } else if (field->number == kModelTrainerSpec) {
      Expect(*field, Fields::kBytes);
      names = ParseTrainerSpec(field->bytes);
    }
  }
  if (file.pieces.empty()) throw Malformed{"it has no pieces"};

  std::unordered_map<std::string_view, std::int32_t> ids;
  int unknowns = 0;
  for (std::size_t i = 0; i < file.pieces.size(); ++i) {
    const SpieceFile::Piece& piece = file.pieces[i];
    if (!ids.emplace(piece.text, static_cast<std::int32_t>(i)).second) {
      throw Malformed{"a piece comes twice"};
    }
    if (piece.type == SpieceFile::Type::kUnknown) ++unknowns;
  }
  if (unknowns != 1) throw Malformed{"it needs one unknown piece"};
  const auto find = [&](const std::string& name, SpieceFile::Type type) {
    const auto found = ids.find(name);
    if (found == ids.end()) return -1;
    return file.pieces[static_cast<std::size_t>(found->second)].type == type ? found->second : -1;
  };
  file.unk_id = find(names.unk, SpieceFile::Type::kUnknown);
  file.eos_id = find(names.eos, SpieceFile::Type::kControl);
  file.pad_id = find(names.pad, SpieceFile::Type::kControl);
  return file;
}

}  // namespace

SpieceFile ParseSpieceFile(std::span<const std::byte> bytes, const std::string& path) {
  try {
    return Parse({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  } catch (const Malformed& malformed) {
    throw Error(ErrorCode::kDataLoss, path + ": not a SentencePiece model: " + malformed.what);
  }
}

}  // namespace slalom
