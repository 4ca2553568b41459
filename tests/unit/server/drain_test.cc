// The wait for encoders at a drain's end: an encoder that never comes to its end must not keep the
// server, one that is slow must not lose its job to a short wait.
#include "server/drain.h"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

namespace slalom {
namespace {

using std::chrono::milliseconds;

constexpr auto kShort = milliseconds(40);
constexpr auto kLong = std::chrono::hours(1);

bool Never() {
  std::this_thread::sleep_for(milliseconds(1));
  return false;
}

DrainTimes From(SchedulerClock::time_point begin, SchedulerClock::duration at_least,
                SchedulerClock::duration deadline) {
  return {begin + at_least, begin + deadline};
}

TEST(SettleUntil, WaitsForASlowEncoderEvenInAHurryAndPastTheDeadline) {
  int asked = 0;
  const auto third_time = [&] { return ++asked == 3; };
  const auto now = SchedulerClock::now();
  EXPECT_TRUE(SettleUntil(From(now, kLong, -kLong), third_time, [] { return true; }));
  EXPECT_EQ(asked, 3);
}

TEST(SettleUntil, InAHurryEndsAfterTheLeastTime) {
  const auto begin = SchedulerClock::now();
  EXPECT_FALSE(SettleUntil(From(begin, kShort, kLong), Never, [] { return true; }));
  EXPECT_GE(SchedulerClock::now() - begin, kShort);
}

TEST(SettleUntil, WithoutAHurryEndsAtTheDeadline) {
  const auto begin = SchedulerClock::now();
  EXPECT_FALSE(SettleUntil(From(begin, kShort / 2, kShort), Never, [] { return false; }));
  EXPECT_GE(SchedulerClock::now() - begin, kShort);
}

TEST(SettleUntil, AsksOnceMoreWhenTheTimeIsOver) {
  const auto past = SchedulerClock::now() - kLong;
  EXPECT_TRUE(SettleUntil(
      {past, past}, [] { return true; }, [] { return true; }));
}

}  // namespace
}  // namespace slalom
