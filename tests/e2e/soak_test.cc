// The short form of the soak: a few kills, every fate.
#include "tests/e2e/soak.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <string>

namespace slalom {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

TEST(SoakTest, NothingAcceptedIsLostAndNothingIsLeftOver) {
  SoakOptions options;
  options.slalomd = SLALOMD;
  options.folder = testing::TempDir() + "/slalom_soak_" + std::to_string(getpid());
  options.jobs = kSanitized ? 60 : 120;
  options.seconds_per_kill = kSanitized ? 8 : 1;
  options.check_memory = !kSanitized;
  const SoakReport report = Soak(options);
  for (const std::string& problem : report.problems) ADD_FAILURE() << problem;
  EXPECT_GT(report.counts.count("kills"), 0u);
  for (const auto& [what, count] : report.counts) {
    std::printf("%6d %s\n", count, what.c_str());
  }
  std::filesystem::remove_all(options.folder);
}

}  // namespace
}  // namespace slalom
