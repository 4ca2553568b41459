#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>

#include "tests/e2e/soak.h"

namespace slalom {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

}  // namespace

void TestShortSoak(const std::string& slalomd, const std::string& model,
                   const std::string& folder) {
  SoakOptions options;
  options.slalomd = slalomd;
  options.model = model;
  options.folder = folder;
  options.jobs = kSanitized ? 40 : 120;
  options.seconds_per_kill = 1;
  options.check_memory = !kSanitized;
  const SoakReport report = Soak(options);
  for (const std::string& problem : report.problems) ADD_FAILURE() << problem;
  EXPECT_GT(report.counts.count("kills"), 0u);
  for (const auto& [what, count] : report.counts) {
    std::printf("%6d %s\n", count, what.c_str());
  }
  std::filesystem::remove_all(folder);
}

}  // namespace slalom
