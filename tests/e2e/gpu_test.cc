// slalomd with GPUs: several that share the work, and one that is lost while it works.
#include <gtest/gtest.h>
#include <httplib.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "tests/e2e/process_fixture.h"

namespace slalom {
namespace {

class GpuTest : public ProcessTest {
 protected:
  void TearDown() override {
    for (const char* name : {"CUDA_INJECTION64_PATH", "LOSE_GPU", "LOSE_GPU_WHEN"}) unsetenv(name);
  }

  // What becomes of a daemon that is started from here on: once Lose() is called device `index`
  // is gone.
  void PrepareLoss(int index) {
    setenv("CUDA_INJECTION64_PATH", LOSE_GPU_LIBRARY, 1);
    setenv("LOSE_GPU", std::to_string(index).c_str(), 1);
    setenv("LOSE_GPU_WHEN", Path("lose").c_str(), 1);
    std::filesystem::remove(Path("lose"));
  }
  void Lose() {
    std::ofstream(Path("lose")) << "now";
    ASSERT_TRUE(daemon_->WaitForOutput("lose_gpu: device")) << daemon_->err();
  }

  // As many at a time, of seeds 0, 1 ...
  std::vector<std::unique_ptr<Process>> GenerateAll(const std::string& prefix, int count) {
    std::vector<std::unique_ptr<Process>> calls;
    for (int i = 0; i < count; ++i) {
      const std::string number = std::to_string(i);
      calls.push_back(LongGenerate(Path(prefix + number), {"--seed", number}));
    }
    return calls;
  }

  std::string Get(const std::string& path, int status = 200) {
    httplib::Client http("http://" + http_address_);
    const auto response = http.Get(path);
    EXPECT_TRUE(response) << path;
    if (!response) return {};
    EXPECT_EQ(response->status, status) << path;
    return response->body;
  }

  // The devices that have worked since the server's start.
  std::set<std::string> Busy() {
    const std::string metrics = Get("/metrics");
    const std::regex line("slalom_device_busy_seconds_total\\{device=\"([^\"]+)\"\\} (\\S+)");
    std::set<std::string> busy;
    for (std::sregex_iterator it(metrics.begin(), metrics.end(), line), end; it != end; ++it) {
      if (std::stod((*it)[2]) > 0) busy.insert((*it)[1]);
    }
    return busy;
  }

  double Requeued() {
    const std::string metrics = Get("/metrics");
    std::smatch match;
    const bool found = std::regex_search(
        metrics, match, std::regex("\nslalom_requeued_jobs_total(?:\\{\\})? (\\S+)"));
    EXPECT_TRUE(found) << metrics;
    return found ? std::stod(match[1]) : -1;
  }
};

constexpr int kClips = 8;

TEST_F(GpuTest, TwoShareTheWorkAndMakeTheSameClips) {
  if (CudaDeviceCount() < 2) GTEST_SKIP() << "this machine has no two CUDA devices";
  Start({"--device", "cuda:0"});
  for (const auto& call : GenerateAll("one", kClips)) ASSERT_EQ(call->Wait(), 0) << call->err();
  daemon_->Signal(SIGTERM);
  ASSERT_EQ(daemon_->Wait(), 0) << daemon_->err();

  Start({"--device", "cuda:0,cuda:1"});
  for (const auto& call : GenerateAll("two", kClips)) ASSERT_EQ(call->Wait(), 0) << call->err();
  EXPECT_EQ(Busy(), (std::set<std::string>{"cuda:0", "cuda:1"}));
  for (int i = 0; i < kClips; ++i) {
    EXPECT_EQ(ReadFile(Path("two" + std::to_string(i))), ReadFile(Path("one" + std::to_string(i))));
  }
}

TEST_F(GpuTest, ALostOnesJobsGoOnElsewhere) {
  if (CudaDeviceCount() == 0) GTEST_SKIP() << "this machine has no CUDA device";
  PrepareLoss(0);
  Start({"--device", "cuda:0,cpu"});
  Get("/readyz");
  const auto calls = GenerateAll("lost", kClips);
  ASSERT_TRUE(calls.front()->WaitForOutput("denoise")) << calls.front()->err();
  ASSERT_NO_FATAL_FAILURE(Lose());
  for (const auto& call : calls) EXPECT_EQ(call->Wait(), 0) << call->err();
  EXPECT_EQ(Get("/readyz", 503), "a device is lost\n");
  EXPECT_EQ(Get("/healthz"), "ok\n");
  EXPECT_GE(Requeued(), 1);
  // Who comes later does not meet it.
  EXPECT_EQ(GenerateAll("after", 1).front()->Wait(), 0);
  daemon_->Signal(SIGTERM);
  EXPECT_EQ(daemon_->Wait(), 0) << daemon_->err();
}

TEST_F(GpuTest, WithTheLastOneJobsEndUnavailable) {
  if (CudaDeviceCount() == 0) GTEST_SKIP() << "this machine has no CUDA device";
  PrepareLoss(0);
  Start({"--device", "cuda:0"});
  const auto calls = GenerateAll("last", kClips);
  ASSERT_TRUE(calls.front()->WaitForOutput("denoise")) << calls.front()->err();
  ASSERT_NO_FATAL_FAILURE(Lose());
  for (const auto& call : calls) call->Wait();
  const auto after = GenerateAll("after", 1);
  for (Process* call : {calls.back().get(), after.front().get()}) {
    EXPECT_EQ(call->Wait(), 1);
    EXPECT_NE(call->err().find("UNAVAILABLE"), std::string::npos) << call->err();
  }
  EXPECT_EQ(Get("/healthz", 503), "every device is lost\n");
  daemon_->Signal(SIGTERM);
  EXPECT_EQ(daemon_->Wait(), 0) << daemon_->err();
}

}  // namespace
}  // namespace slalom
