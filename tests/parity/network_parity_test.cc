// Every network against its golden cases, in f32 and, where the reference has such a run, in bf16.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "tests/parity/golden.h"
#include "tests/parity/run_network.h"

namespace slalom {
namespace {

class NetworkParity : public testing::TestWithParam<GoldenCase> {};

TEST_P(NetworkParity, F32) {
  const std::unique_ptr<Backend> backend = BackendOrSkip(GetParam().device);
  if (backend) ExpectF32Parity(*backend, Golden(GetParam()));
}

class Bf16Parity : public testing::TestWithParam<GoldenCase> {};

TEST_P(Bf16Parity, ErrorRule) {
  const std::unique_ptr<Backend> backend = BackendOrSkip(GetParam().device);
  if (backend) ExpectBf16ErrorRule(*backend, Golden(GetParam()));
}

class VideoDecoderParity : public testing::TestWithParam<GoldenCase> {};

// NetworkParity streams, frame by frame; this decodes all frames in one piece.
TEST_P(VideoDecoderParity, Whole) {
  const std::unique_ptr<Backend> backend = BackendOrSkip(GetParam().device);
  if (!backend) return;
  const Golden golden(GetParam());
  NetworkOptions options = golden.options();
  options.whole = true;
  const TensorMap whole = RunNetwork(*backend, options, golden.inputs());
  EXPECT_LE(MaxRelativeError(whole.at("sample"), golden.outputs().at("sample")), kF32Tolerance);
}

std::string ParamName(const testing::TestParamInfo<GoldenCase>& info) {
  return TestName(info.param);
}

const std::vector<std::string> kNets = {"tokenizer", "text_encoder", "transformer",  "vae_decoder",
                                        "sampler",   "sla",          "sla_backward", "salad"};

INSTANTIATE_TEST_SUITE_P(Golden, NetworkParity, testing::ValuesIn(GoldenCases(kNets)), ParamName);
INSTANTIATE_TEST_SUITE_P(Golden, Bf16Parity,
                         testing::ValuesIn(GoldenCases(kNets, /*with_bf16=*/true)), ParamName);
INSTANTIATE_TEST_SUITE_P(Golden, VideoDecoderParity,
                         testing::ValuesIn(GoldenCases({"vae_decoder"})), ParamName);

TEST(MaxRelativeError, IsTheWorstElementOverTheLargest) {
  const Tensor reference = Tensor::FromFloats({3}, std::vector<float>{-4, 1, 2});
  EXPECT_EQ(MaxRelativeError(reference, reference), 0);
  EXPECT_EQ(MaxRelativeError(Tensor::FromFloats({3}, std::vector<float>{-4, 2, 2.5}), reference),
            0.25);
}

TEST(MaxRelativeError, NeverPassesNanInfinityOrAnotherShape) {
  const Tensor reference = Tensor::FromFloats({2}, std::vector<float>{1, 2});
  for (const float bad : {std::nanf(""), -INFINITY}) {
    EXPECT_FALSE(MaxRelativeError(Tensor::FromFloats({2}, std::vector<float>{1, bad}), reference) <=
                 1e30);
  }
  EXPECT_FALSE(MaxRelativeError(Tensor::FromFloats({1, 2}, std::vector<float>{1, 2}), reference) <=
               1e30);
}

// A folder without cases must not pass for one where all is well.
TEST(Goldens, EveryNetHasCases) {
  for (const std::string& net : kNets) EXPECT_FALSE(GoldenCases({net}).empty()) << net;
}

// Whoever trains the demo model anew makes its goldens anew (README.md).
TEST(Goldens, TheShippedModelHasCases) {
  if (!std::filesystem::exists(SLALOM_SOURCE_DIR "/model/demo/transformer/config.json")) {
    GTEST_SKIP() << "model/demo holds no model: nothing to compare";
  }
  for (const std::string net : {"tokenizer", "text_encoder", "transformer", "vae_decoder"}) {
    const std::vector<GoldenCase> cases = GoldenCases({net});
    EXPECT_TRUE(std::ranges::any_of(
        cases, [](const GoldenCase& golden) { return golden.name.starts_with("demo_"); }))
        << "no golden of the demo's " << net << ": run make_goldens.py --only demo";
  }
}

}  // namespace
}  // namespace slalom
