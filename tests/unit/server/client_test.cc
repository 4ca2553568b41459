#include "server/client/client.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "server/client/output_file.h"
#include "server/client/progress.h"

namespace slalom::client {
namespace {

namespace fs = std::filesystem;

class OutputFileTest : public testing::Test {
 protected:
  void SetUp() override {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  std::string Content(const std::string& path) {
    std::ifstream file(path);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
  }
  // Of this process: cases may run side by side.
  const std::string folder_ =
      testing::TempDir() + "/slalom_output_test_" + std::to_string(getpid());
  const std::string path_ = folder_ + "/out.mp4";
};

TEST_F(OutputFileTest, IsThereOnlyAfterCommit) {
  {
    OutputFile file(path_);
    file.Write(0, "abc");
    EXPECT_FALSE(fs::exists(path_));
    file.Write(3, "def");
    file.Commit();
  }
  EXPECT_EQ(Content(path_), "abcdef");
  EXPECT_FALSE(fs::exists(path_ + ".part"));
}

TEST_F(OutputFileTest, WithoutCommitNothingIsLeftAndTheOldFileStays) {
  std::ofstream(path_) << "old";
  {
    OutputFile file(path_);
    file.Write(0, "new");
  }
  EXPECT_EQ(Content(path_), "old");
  EXPECT_FALSE(fs::exists(path_ + ".part"));
}

TEST_F(OutputFileTest, AGapIsDataLoss) {
  OutputFile file(path_);
  file.Write(0, "abc");
  EXPECT_THROW(file.Write(4, "d"), CallError);
}

TEST_F(OutputFileTest, DevicesAreWrittenDirectlyAndAFullOneIsReported) {
  OutputFile null("/dev/null");
  null.Write(0, "abc");
  null.Commit();
  EXPECT_FALSE(fs::exists("/dev/null.part"));
  OutputFile full("/dev/full");
  try {
    full.Write(0, "abc");
    FAIL();
  } catch (const CallError& error) {
    EXPECT_STREQ(error.code_name(), "RESOURCE_EXHAUSTED");
    EXPECT_NE(std::string(error.what()).find("/dev/full"), std::string::npos);
  }
}

TEST_F(OutputFileTest, NamesThatCannotBeWritten) {
  EXPECT_THROW(OutputFile file(folder_), CallError);
  EXPECT_THROW(OutputFile file(folder_ + "/no/such.mp4"), CallError);
}

std::string Show(ProgressView::Style style, int last_step) {
  char* text = nullptr;
  std::size_t size = 0;
  std::FILE* out = open_memstream(&text, &size);
  {
    ProgressView view(out, style);
    v1::Accepted accepted;
    accepted.set_job_id("j1");
    accepted.mutable_resolved()->set_num_frames(33);
    view.OnAccepted(accepted);
    v1::Progress progress;
    progress.set_stage(v1::STAGE_DENOISE);
    progress.set_steps(10);
    for (int i = 0; i <= last_step; ++i) {
      progress.set_step(i);
      progress.set_sparsity(0.75);
      view.OnProgress(progress);
    }
  }
  std::fclose(out);
  std::string shown(text, size);
  std::free(text);
  return shown;
}

TEST(ProgressViewTest, ABarOnATerminalAndPlainLinesElsewhere) {
  const std::string bar = Show(ProgressView::Style::kBar, 5);
  EXPECT_NE(bar.find("\r[#############................."), std::string::npos) << bar;
  EXPECT_NE(bar.find("denoise 5/10"), std::string::npos);
  EXPECT_EQ(bar.back(), '\n');
  const std::string lines = Show(ProgressView::Style::kLines, 10);
  EXPECT_EQ(lines.find('\r'), std::string::npos);
  EXPECT_EQ(lines.find('\033'), std::string::npos);
  EXPECT_NE(lines.find("denoise 10/10, sparsity 75.0 %\n"), std::string::npos) << lines;
  EXPECT_EQ(Show(ProgressView::Style::kSilent, 5), "");
}

TEST(ProgressViewTest, StatisticsSayWhereTheTimeWent) {
  v1::Statistics statistics;
  statistics.set_frames(33);
  statistics.set_steps(20);
  statistics.set_denoise_seconds(10);
  statistics.set_attention(v1::ATTENTION_MODE_SLA);
  statistics.set_sparsity(0.85);
  statistics.add_layer_sparsity(0.8);
  statistics.add_layer_sparsity(0.9);
  const std::string text = StatisticsText(statistics, 16);
  for (const char* part : {"tokenize", "text encode", "denoise", "0.500 s each", "decode", "encode",
                           "sparsity 85.0 %", "80.0 to 90.0"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " in " << text;
  }
}

TEST(CallErrorTest, AlwaysHasSomethingToTry) {
  for (int code = 1; code <= 16; ++code) {
    EXPECT_FALSE(CallError(code, "x").advice().empty());
    EXPECT_NE(std::string(CallError(code, "x").code_name()), "OK");
  }
  EXPECT_EQ(CallError(9, "no such folder", std::string("name another")).advice(), "name another");
  EXPECT_NE(CallError(8, "full", 2.5).advice().find("3 s"), std::string::npos);
}

}  // namespace
}  // namespace slalom::client
