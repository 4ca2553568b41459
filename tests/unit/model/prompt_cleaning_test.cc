#include "model/prompt_cleaning.h"

#include <gtest/gtest.h>

#include <fstream>
#include <string>

#include "kernels/core/random.h"
#include "nlohmann/json.hpp"
#include "tests/unit/model/expect_error.h"

namespace slalom {
namespace {

// Made by make_text_goldens.py with ftfy and Python's html module.
TEST(PromptCleaningTest, AgreesWithFtfyAndHtml) {
  std::ifstream stream(SLALOM_TEST_GOLDENS "/prompt_cleaning.json");
  const auto golden = nlohmann::json::parse(stream);
  ASSERT_GT(golden["cases"].size(), 20u);
  for (const auto& item : golden["cases"]) {
    const auto prompt = item["prompt"].get<std::string>();
    EXPECT_EQ(CleanPrompt(prompt), item["cleaned"].get<std::string>()) << item["prompt"];
  }
}

TEST(PromptCleaningTest, CleaningTwiceChangesNothingMore) {
  for (const char* prompt : {"a  red\tball", "\uff21\uff22 \u201cc\u201d", "fish & chips"}) {
    const std::string once = CleanPrompt(prompt);
    EXPECT_EQ(CleanPrompt(once), once);
  }
}

TEST(PromptCleaningTest, RefusesBadUtf8) {
  for (const char* prompt : {"\xff", "a\x80", "\xc3", "\xe2\x82", "\xf0\x9f\x98", "\xc0\xaf",
                             "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe0\x80\x80"}) {
    ExpectError(ErrorCode::kInvalidArgument, {"not UTF-8"}, [&] { CleanPrompt(prompt); });
  }
  ExpectError(ErrorCode::kInvalidArgument, {"offset 5"}, [] { CleanPrompt("hello\xff world"); });
}

TEST(PromptCleaningTest, DeeplyEscapedTextEnds) {
  std::string prompt = "&";
  for (int i = 0; i < 1000; ++i) prompt += "amp;";
  EXPECT_EQ(CleanPrompt(prompt + "lt;"), "<");
}

// Whatever the bytes, the outcome is clean text or INVALID_ARGUMENT.
TEST(PromptCleaningTest, SurvivesRandomBytes) {
  constexpr std::string_view kAlphabet =
      "&#xX19aAg;;&<> \n\r\x1b[m\x00\x7f\xc2\x85\xe2\x80\x9c\xef\xbc\xa1\xf0\x9f";
  int cleaned = 0;
  for (std::uint64_t round = 0; round < 4000; ++round) {
    std::string prompt;
    for (std::uint64_t i = 0; i < 1 + round % 24; ++i) {
      prompt.push_back(kAlphabet[Philox4x32(7, round, i)[0] % kAlphabet.size()]);
    }
    try {
      const std::string clean = CleanPrompt(prompt);
      ++cleaned;
      EXPECT_EQ(clean.find("  "), std::string::npos);
      EXPECT_TRUE(clean.empty() || (clean.front() != ' ' && clean.back() != ' '));
      CleanPrompt(clean);  // valid UTF-8
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument) << error.what();
    }
  }
  EXPECT_GT(cleaned, 100);
}

}  // namespace
}  // namespace slalom
