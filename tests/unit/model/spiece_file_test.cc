#include "model/spiece_file.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>

#include "tests/unit/model/expect_error.h"

namespace slalom {
namespace {

using Type = SpieceFile::Type;

// A writer of protobuf messages, as far as these files need one.
std::string Varint(std::uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes += static_cast<char>(0x80 | (value & 0x7f));
  return bytes + static_cast<char>(value);
}
std::string Number(std::uint32_t field, std::uint64_t value) {
  return Varint(field << 3) + Varint(value);
}
std::string Bytes(std::uint32_t field, const std::string& value) {
  return Varint(field << 3 | 2) + Varint(value.size()) + value;
}
std::string Float(std::uint32_t field, float value) {
  std::string bytes = Varint(field << 3 | 5);
  for (int shift = 0; shift < 32; shift += 8) {
    bytes += static_cast<char>(std::bit_cast<std::uint32_t>(value) >> shift);
  }
  return bytes;
}
std::string Piece(const std::string& text, float score, Type type) {
  return Bytes(1, Bytes(1, text) + Float(2, score) + Number(3, static_cast<std::uint64_t>(type)));
}

const std::string& Specials() {
  static const std::string pieces = Piece("<pad>", 0, Type::kControl) +
                                    Piece("</s>", 0, Type::kControl) +
                                    Piece("<unk>", 0, Type::kUnknown);
  return pieces;
}

SpieceFile Parse(const std::string& bytes) {
  return ParseSpieceFile(std::as_bytes(std::span(bytes)), "x/spiece.model");
}

TEST(SpieceFileTest, ReadsPiecesAndSkipsWhatItDoesNotKnow) {
  const SpieceFile file = Parse(Specials() + Bytes(3, "normaliser") + Number(200, 1ull << 40) +
                                Piece("\u2581ball", -3.5f, Type::kNormal) +
                                Piece("<0x41>", 0, Type::kByte) + Bytes(1, Bytes(1, "plain")));
  ASSERT_EQ(file.pieces.size(), 6u);
  EXPECT_EQ(file.pad_id, 0);
  EXPECT_EQ(file.eos_id, 1);
  EXPECT_EQ(file.unk_id, 2);
  EXPECT_EQ(file.pieces[3].text, "\u2581ball");
  EXPECT_EQ(file.pieces[3].score, -3.5f);
  EXPECT_EQ(file.pieces[4].type, Type::kByte);
  EXPECT_EQ(file.pieces[5].type, Type::kNormal);  // the format's default
}

TEST(SpieceFileTest, TheTrainerNamesTheSpecialPieces) {
  const SpieceFile file =
      Parse(Piece("[U]", 0, Type::kUnknown) + Piece("[E]", 0, Type::kControl) +
            Piece("[P]", 0, Type::kNormal) +
            Bytes(2, Number(3, 1) + Bytes(45, "[U]") + Bytes(47, "[E]") + Bytes(48, "[P]")));
  EXPECT_EQ(file.unk_id, 0);
  EXPECT_EQ(file.eos_id, 1);
  EXPECT_EQ(file.pad_id, -1);  // an ordinary piece of that name is none
}

TEST(SpieceFileTest, RefusesDamage) {
  const struct {
    const char* word;
    std::string bytes;
  } cases[] = {
      {"no pieces", ""},
      {"cut off", Specials().substr(0, Specials().size() - 1)},
      {"cut off", Specials() + Varint(1 << 3 | 2) + Varint(~0ull)},
      {"cut off", Specials() + "\x80"},
      {"too long", Specials() + std::string(11, '\xff')},
      {"field number", Specials() + std::string(1, '\0') + "x"},
      {"wire type", Specials() + Varint(9 << 3 | 3)},
      {"wrong type", Specials() + Number(1, 5)},
      {"wrong type", Bytes(1, Number(1, 5))},
      {"unknown type", Bytes(1, Bytes(1, "a") + Number(3, 7))},
      {"empty piece", Specials() + Piece("", -1, Type::kNormal)},
      {"not UTF-8", Specials() + Piece("\xff", -1, Type::kNormal)},
      {"not finite", Specials() + Piece("a", NAN, Type::kNormal)},
      {"not finite", Specials() + Piece("a", -INFINITY, Type::kNormal)},
      {"twice", Specials() + Piece("a", -1, Type::kNormal) + Piece("a", -2, Type::kNormal)},
      {"one unknown", Piece("a", -1, Type::kNormal)},
      {"one unknown", Specials() + Piece("b", 0, Type::kUnknown)},
      {"not a unigram model", Specials() + Bytes(2, Number(3, 2))},
  };
  for (const auto& [word, bytes] : cases) {
    SCOPED_TRACE(word);
    ExpectError(ErrorCode::kDataLoss, {"x/spiece.model", word}, [&] { Parse(bytes); });
  }
}

}  // namespace
}  // namespace slalom
