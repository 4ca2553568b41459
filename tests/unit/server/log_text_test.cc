#include "server/log_text.h"

#include <gtest/gtest.h>

namespace slalom {
namespace {

TEST(LogTextTest, StaysOnOneLineAndShowsWhatItWas) {
  EXPECT_EQ(OneLine("model nix\n[info] all is well\x1b[2J\x7f"),
            "model nix\\x0a[info] all is well\\x1b[2J\\x7f");
  EXPECT_EQ(OneLine("größer, 長い"), "größer, 長い");
}

}  // namespace
}  // namespace slalom
