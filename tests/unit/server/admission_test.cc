#include "server/admission.h"

#include <gtest/gtest.h>

#include <optional>

#include "server/refusal.h"
#include "server/warm_up.h"
#include "tests/unit/scheduler/fake_pipeline.h"

namespace slalom {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

TEST(TokenBucketTest, AllowsABurstThenARate) {
  const auto start = TokenBucket::Clock::now();
  TokenBucket bucket(2, 3, start);
  for (int i = 0; i < 3; ++i) EXPECT_FALSE(bucket.Take(start));
  const std::optional<double> wait = bucket.Take(start);
  ASSERT_TRUE(wait);
  EXPECT_NEAR(*wait, 0.5, 1e-9);
  EXPECT_TRUE(bucket.Take(start + milliseconds(499)));
  EXPECT_FALSE(bucket.Take(start + milliseconds(501)));
  EXPECT_TRUE(bucket.Take(start + milliseconds(502)));
  // It fills no further than the burst, and a clock that stands still gives nothing.
  for (int i = 0; i < 3; ++i) EXPECT_FALSE(bucket.Take(start + seconds(100)));
  EXPECT_TRUE(bucket.Take(start + seconds(100)));
}

TEST(AdmissionTest, TenantsHaveTheirOwnRates) {
  Admission admission(10);
  TenantOptions one{.name = "one", .requests_per_minute = 2};
  TenantOptions two{.name = "two", .requests_per_minute = 0.5};
  const TenantOptions free{.name = "free"};
  admission.CountRequest(one);
  admission.CountRequest(one);
  try {
    admission.CountRequest(one);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Refusal& refusal) {
    EXPECT_STREQ(refusal.reason(), "rate");
    EXPECT_NEAR(refusal.retry_seconds().value(), 30, 1);
  }
  admission.CountRequest(two);
  EXPECT_THROW(admission.CountRequest(two), Refusal);
  for (int i = 0; i < 100; ++i) admission.CountRequest(free);
}

TEST(AdmissionTest, PlacesComeBack) {
  Admission admission(2);
  std::optional<StreamPlace> first = admission.OpenStream();
  {
    const StreamPlace second = admission.OpenStream();
    EXPECT_THROW(admission.OpenStream(), Refusal);
    EXPECT_EQ(admission.open_streams(), 2);
  }
  const StreamPlace third = admission.OpenStream();
  first.reset();
  EXPECT_EQ(admission.open_streams(), 1);
}

TEST(WarmUpTest, ShapesAreParsed) {
  EXPECT_TRUE(ParseWarmUp("warm_up", "none").empty());
  EXPECT_EQ(ParseWarmUp("warm_up", "auto").size(), 1u);
  const auto shapes = ParseWarmUp("warm_up", "832x480x81,480x832x5");
  ASSERT_EQ(shapes.size(), 2u);
  EXPECT_EQ(shapes[0].width, 832);
  EXPECT_EQ(shapes[1].num_frames, 5);
  for (const char* bad : {"", "832x480", "ax3x1", "832x480x81;", "99999999x16x1"}) {
    EXPECT_THROW(ParseWarmUp("warm_up", bad), Error) << bad;
  }
}

TEST(WarmUpTest, RunsATinyClipPerShape) {
  FakeOptions options;
  const FakePipeline pipeline(options);
  WarmUp(pipeline, ParseWarmUp("warm_up", "auto"));
  WarmUp(pipeline, ParseWarmUp("warm_up", "16x16x9"));
  WarmUp(pipeline, {});
  EXPECT_EQ(options.journal->CountStartingWith("begin"), 2u);
  EXPECT_EQ(options.journal->CountStartingWith("step"), 4u);
  EXPECT_EQ(options.journal->live_generations(), 0);
  EXPECT_THROW(WarmUp(pipeline, ParseWarmUp("warm_up", "17x16x9")), Error);
}

}  // namespace
}  // namespace slalom
