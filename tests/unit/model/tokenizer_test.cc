#include "model/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "kernels/core/random.h"
#include "model/unigram.h"
#include "nlohmann/json.hpp"
#include "tests/unit/model/expect_error.h"
#include "tests/unit/model/temp_folder.h"

namespace slalom {
namespace {

constexpr char kFolder[] = SLALOM_TEST_GOLDENS;
constexpr int kPieces = 333;           // of goldens/spiece.model
constexpr int kVocab = kPieces + 300;  // with the sentinels

std::vector<std::int32_t> Ids(const Tokenizer& tokenizer, std::string_view text,
                              int max_length = 512) {
  const TokenIds tokens = tokenizer.Encode(text, max_length);
  EXPECT_EQ(tokens.ids.size(), static_cast<std::size_t>(max_length));
  EXPECT_TRUE(std::all_of(tokens.ids.begin() + tokens.length, tokens.ids.end(),
                          [](std::int32_t id) { return id == 0; }));
  return {tokens.ids.begin(), tokens.ids.begin() + tokens.length};
}

// Made by make_text_goldens.py with Hugging Face's tokenizers.
TEST(TokenizerTest, AgreesWithHuggingFace) {
  std::ifstream stream(SLALOM_TEST_GOLDENS "/tokenizer.json");
  const auto golden = nlohmann::json::parse(stream);
  const Tokenizer tokenizer(kFolder, kVocab);
  ASSERT_EQ(tokenizer.vocab_size(), golden["vocab_size"].get<int>());
  ASSERT_GT(golden["cases"].size(), 15u);
  for (const auto& item : golden["cases"]) {
    EXPECT_EQ(Ids(tokenizer, item["text"].get<std::string>()),
              item["ids"].get<std::vector<std::int32_t>>())
        << item["text"];
  }
}

TEST(TokenizerTest, EmptyTextIsTheEndTokenAlone) {
  const TokenIds tokens = Tokenizer(kFolder, kVocab).Encode("");
  EXPECT_EQ(tokens.length, 1);
  EXPECT_EQ(tokens.ids[0], 1);
  EXPECT_EQ(tokens.ids.size(), 512u);
}

TEST(TokenizerTest, TruncatesAndEndsWithTheEndToken) {
  const Tokenizer tokenizer(kFolder, kVocab);
  std::string text;
  for (int i = 0; i < 600; ++i) text += "ball ";
  const std::vector<std::int32_t> all = Ids(tokenizer, text);
  EXPECT_EQ(all.size(), 512u);
  EXPECT_EQ(all.back(), 1);
  EXPECT_EQ(all[510], all[0]);
  EXPECT_EQ(Ids(tokenizer, text, 3), (std::vector<std::int32_t>{all[0], all[0], 1}));
  EXPECT_EQ(Ids(tokenizer, text, 1), std::vector<std::int32_t>{1});
}

TEST(TokenizerTest, SentinelsAboveTheEmbeddingAreText) {
  const Tokenizer small(kFolder, kPieces + 10);  // room for the last-numbered ten
  EXPECT_EQ(Ids(small, "<extra_id_299>"), (std::vector<std::int32_t>{kPieces, 1}));
  EXPECT_EQ(Ids(small, "<extra_id_290>"), (std::vector<std::int32_t>{kPieces + 9, 1}));
  for (std::int32_t id : Ids(small, "<extra_id_289> <extra_id_0>")) EXPECT_LT(id, kPieces);
}

TEST(TokenizerTest, BadModelFiles) {
  const TempFolder folder;
  ExpectError(ErrorCode::kNotFound, {"spiece.model"}, [&] { Tokenizer(folder.path(), 1000); });
  ExpectError(ErrorCode::kInvalidArgument, {"333 pieces", "embeds 100"},
              [&] { Tokenizer(kFolder, 100); });
  for (const char* bytes : {"", "not a model", "\x0a\xff\xff\xff\xff\x0f"}) {
    folder.Write("spiece.model", bytes);
    ExpectError(ErrorCode::kDataLoss, {"spiece.model"}, [&] { Tokenizer(folder.path(), 1000); });
  }
}

// A damaged model is refused, or else it still gives ids inside the vocabulary.
TEST(TokenizerTest, SurvivesFlippedBytes) {
  const TempFolder folder;
  std::ifstream stream(SLALOM_TEST_GOLDENS "/spiece.model", std::ios::binary);
  const std::string good{std::istreambuf_iterator<char>(stream), {}};
  ASSERT_GT(good.size(), 1000u);
  for (std::uint64_t round = 0; round < 300; ++round) {
    std::string bytes = good;
    const auto random = Philox4x32(11, 0, round);
    bytes[random[0] % bytes.size()] ^= static_cast<char>(1 + random[1] % 255);
    if (round % 5 == 0) bytes.resize(random[2] % bytes.size());
    folder.Write("spiece.model", bytes);
    try {
      const Tokenizer tokenizer(folder.path(), kVocab);
      for (std::int32_t id : tokenizer.Encode("a red ball </s> rolls \u2603").ids) {
        EXPECT_GE(id, 0);
        EXPECT_LT(id, kVocab);
      }
    } catch (const Error& error) {
      EXPECT_TRUE(error.code() == ErrorCode::kDataLoss ||
                  error.code() == ErrorCode::kInvalidArgument)
          << error.what();
    }
  }
}

TEST(UnigramTest, TakesTheBestPathNotTheLongestPiece) {
  const Unigram unigram({{"a", -1, 10},
                         {"b", -1, 11},
                         {"c", -1, 12},
                         {"ab", -1.5, 13},
                         {"bc", -0.1, 14},
                         {"abc", -9, 15}},
                        3);
  std::vector<std::int32_t> ids;
  unigram.Segment("abc", ids);
  EXPECT_EQ(ids, (std::vector<std::int32_t>{10, 14}));
}

TEST(UnigramTest, UnknownCharactersFuseButNotAcrossKnownOnes) {
  const Unigram unigram({{"a", -1, 10}, {"\u00e9", -1, 11}}, 3);
  std::vector<std::int32_t> ids;
  unigram.Segment("\u6f22\u5b57a\u2603\u00e9z", ids);
  EXPECT_EQ(ids, (std::vector<std::int32_t>{3, 10, 3, 11, 3}));
}

}  // namespace
}  // namespace slalom
