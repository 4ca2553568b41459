#include "model/clip_request.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "kernels/core/error.h"
#include "tests/unit/model/expect_error.h"

namespace slalom {
namespace {

class ClipRequestTest : public testing::Test {
 protected:
  ClipRequestTest() {
    info_.name = "tiny";
    info_.defaults = {.width = 256,
                      .height = 128,
                      .num_frames = 33,
                      .steps = 20,
                      .guidance_scale = 4.0,
                      .flow_shift = 3.0};
    info_.samplers = {SamplerKind::kUniPc, SamplerKind::kEuler};
    info_.attention = {{}, {AttentionKind::kSla, 0.05, 0.95}};
    config_.limits.max_width = 512;
    config_.limits.max_pixels = 512 * 512 * 33;
    request_.prompt = "a red ball";
    request_.seed = 1;
  }

  ClipSpec Resolve() const { return ResolveClip(config_, info_, request_); }

  void ExpectViolation(const std::string& field, const std::string& value,
                       const std::string& allowed) const {
    ExpectError(ErrorCode::kInvalidArgument, {field + ": is " + value, allowed},
                [&] { Resolve(); });
  }

  ModelConfig config_;
  ModelInfo info_;
  ClipRequest request_;
};

TEST_F(ClipRequestTest, UnsetFieldsTakeTheDefaults) {
  const ClipSpec spec = Resolve();
  EXPECT_EQ(spec.prompt, "a red ball");
  EXPECT_EQ(spec.width, 256);
  EXPECT_EQ(spec.height, 128);
  EXPECT_EQ(spec.num_frames, 33);
  EXPECT_EQ(spec.steps, 20);
  EXPECT_EQ(spec.guidance_scale, 4.0);
  EXPECT_EQ(spec.seed, 1u);
  EXPECT_EQ(spec.attention, AttentionKind::kDense);
  EXPECT_EQ(spec.topk, 0.0);
  request_.attention = AttentionKind::kSla;
  EXPECT_EQ(Resolve().topk, 0.05);
  request_.topk = 0.2;
  EXPECT_EQ(Resolve().topk, 0.2);
}

TEST_F(ClipRequestTest, EachCallWithoutASeedDrawsOne) {
  request_.seed.reset();
  EXPECT_NE(Resolve().seed, Resolve().seed);
  EXPECT_LT(Resolve().seed, std::uint64_t{1} << 53);
}

TEST_F(ClipRequestTest, Sizes) {
  request_.width = 100;
  ExpectViolation("width", "100", "a multiple of 16 from 16 to 512");
  request_.width = 528;
  ExpectViolation("width", "528", "to 512");
  request_.width = -16;
  ExpectViolation("width", "-16", "a multiple of 16");
  request_.width = 512;
  request_.num_frames = 32;
  ExpectViolation("num_frames", "32", "4n + 1");
  request_.num_frames = 0;
  ExpectViolation("num_frames", "0", "4n + 1");
  request_.num_frames = 1;
  EXPECT_EQ(Resolve().num_frames, 1);
  request_.height = 512;
  request_.num_frames = 37;
  ExpectViolation("width * height * num_frames", "9699328", "at most 8650752");
  request_.num_frames = std::numeric_limits<int>::max();
  ExpectViolation("num_frames", "2147483647", "from 1 to");
}

TEST_F(ClipRequestTest, NumbersThatAreNoNumbers) {
  request_.guidance_scale = std::nan("");
  ExpectViolation("guidance_scale", "nan", "from 0 to 100");
  request_.guidance_scale = std::numeric_limits<double>::infinity();
  ExpectViolation("guidance_scale", "inf", "from 0 to 100");
  request_.guidance_scale = -1;
  ExpectViolation("guidance_scale", "-1", "from 0 to 100");
  request_.guidance_scale.reset();
  request_.flow_shift = std::nan("");
  ExpectViolation("flow_shift", "nan", "from 0.01");
  request_.flow_shift = 0;
  ExpectViolation("flow_shift", "0", "from 0.01");
  request_.flow_shift.reset();
  request_.attention = AttentionKind::kSla;
  request_.topk = std::nan("");
  ExpectViolation("topk", "nan", "above 0 and at most 1");
  request_.topk = 1.5;
  ExpectViolation("topk", "1.5", "above 0 and at most 1");
}

TEST_F(ClipRequestTest, PromptsAreTextAndShort) {
  request_.prompt = "";
  ExpectViolation("prompt", "empty", "a text");
  request_.prompt = " \n ";
  ExpectViolation("prompt", "empty", "a text");
  request_.prompt = "a \xff ball";
  ExpectViolation("prompt", "not text", "UTF-8");
  request_.prompt = std::string(8193, 'x');
  ExpectViolation("prompt", "8193 bytes long", "at most 8192");
  request_.prompt = "a red ball";
  request_.negative_prompt = "\xc0\x80";
  ExpectViolation("negative_prompt", "not text", "UTF-8");
}

TEST_F(ClipRequestTest, OneAnswerNamesEverything) {
  request_.width = 1;
  request_.steps = 0;
  request_.fps = 1000;
  request_.guidance_scale = std::nan("");
  try {
    Resolve();
    FAIL();
  } catch (const Error& error) {
    ASSERT_EQ(error.violations().size(), 4u);
    EXPECT_EQ(error.violations()[0].field, "width");
    EXPECT_EQ(error.violations()[1].field, "fps");
    EXPECT_EQ(error.violations()[2].field, "steps");
    EXPECT_EQ(error.violations()[3].field, "guidance_scale");
  }
}

TEST_F(ClipRequestTest, OnlyWhatTheModelOffers) {
  request_.sampler = SamplerKind::kRcm;
  ExpectViolation("sampler", "rcm", "unipc or euler");
  request_.sampler.reset();
  request_.attention = AttentionKind::kSalad;
  ExpectError(ErrorCode::kFailedPrecondition, {"tiny", "adapter"}, [&] { Resolve(); });
  request_.attention = AttentionKind::kDense;
  request_.topk = 0.1;
  ExpectViolation("topk", "0.1", "unset with dense attention");
}

TEST_F(ClipRequestTest, RcmTakesFewStepsAndNoGuidance) {
  info_.samplers.push_back(SamplerKind::kRcm);
  request_.sampler = SamplerKind::kRcm;
  EXPECT_EQ(Resolve().steps, 4);
  EXPECT_EQ(Resolve().guidance_scale, 1.0);
  request_.steps = 5;
  ExpectViolation("steps", "5", "1 to 4");
  request_.steps = 2;
  request_.guidance_scale = 3.0;
  ExpectViolation("guidance_scale", "3", "at most 1");
  request_.guidance_scale.reset();
  request_.flow_shift = 3.0;
  ExpectViolation("flow_shift", "3", "unset with the rcm sampler");
}

}  // namespace
}  // namespace slalom
