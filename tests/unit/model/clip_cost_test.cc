#include "model/clip_cost.h"

#include <gtest/gtest.h>

#include <memory>

#include "tests/unit/model/step_memory.h"

namespace slalom {
namespace {

// The published sizes: TFLOP of one pass as counted from the architecture, the text's keys and
// values, which are made once per prompt, left out.
TEST(TransformerFlops, PublishedModels) {
  TransformerConfig small;  // 1.3B
  EXPECT_NEAR(TransformerFlops(small, 32760, AttentionKind::kDense, 0) * 1e-12, 283.0 - 0.15, 0.5);
  TransformerConfig large = small;
  large.num_attention_heads = 40;
  large.num_layers = 40;
  large.ffn_dim = 13824;
  EXPECT_NEAR(TransformerFlops(large, 75600, AttentionKind::kDense, 0) * 1e-12, 6523.4 - 2.1, 5.0);
  // A tenth of the attention core and the linear branch.
  EXPECT_NEAR(TransformerFlops(small, 32760, AttentionKind::kSla, 0.1) * 1e-12, 106, 1.5);
}

TEST(RateMeter, FollowsWhatItSees) {
  RateMeter meter(1e9);
  EXPECT_DOUBLE_EQ(meter.SecondsFor(2e9), 2.0);
  EXPECT_FALSE(meter.measured());
  meter.Add(4e9, 1.0);  // replaces the guess
  EXPECT_DOUBLE_EQ(meter.SecondsFor(4e9), 1.0);
  for (int i = 0; i < 50; ++i) meter.Add(1e9, 1.0);
  EXPECT_NEAR(meter.SecondsFor(1e9), 1.0, 1e-3);
  meter.Add(1e9, 0.0);  // a clock that did not move says nothing
  meter.Add(0.0, 1.0);
  EXPECT_NEAR(meter.SecondsFor(1e9), 1.0, 1e-3);
}

TEST(RateMeter, ForgetsAColdStart) {
  RateMeter meter(1e9);
  meter.Add(1e9, 5.0);
  meter.Add(1e9, 0.1);
  EXPECT_NEAR(meter.SecondsFor(1e9), 0.1, 1e-12);
  meter.Add(1e9, 0.2);
  EXPECT_GT(meter.SecondsFor(1e9), 0.11);
  RateMeter steady(1e9);
  steady.Add(1e9, 1.0);
  steady.Add(1e9, 2.0);  // not faster: the average moves as ever
  EXPECT_NEAR(steady.SecondsFor(1e9), 1.18, 0.01);
}

struct Case {
  AttentionKind kind;
  int heads;
  int ffn_dim;
  int block = 64;
};
class ClipCostTest : public testing::TestWithParam<Case> {};

// What a step really takes stays within what was predicted, and the prediction is not idle.
TEST_P(ClipCostTest, PredictsAStepsMemory) {
  TinyModelOptions options;
  options.head_dim = 64;
  options.heads = GetParam().heads;
  options.ffn_dim = GetParam().ffn_dim;
  ClipSpec spec;
  spec.width = 256;
  spec.height = 192;
  spec.num_frames = 9;
  spec.attention = GetParam().kind;
  const auto backend = MakeBackend(Device{}, {.cpu_threads = 2, .force_f32 = true});
  const StepMemory memory = MeasureStepMemory(*backend, options, spec, GetParam().block);
  EXPECT_NEAR(memory.waiting, memory.predicted_waiting, 0.1 * memory.predicted_waiting);
  EXPECT_LE(memory.peak, 1.05 * memory.predicted_peak);
  // SALAD's prediction has its linear branch in it, which this adapter lacks.
  EXPECT_GE(memory.peak,
            (spec.attention == AttentionKind::kSalad ? 0.7 : 0.95) * memory.predicted_peak);
}

// A tiny model, and the proportions of a small one that people use.
INSTANTIATE_TEST_SUITE_P(
    Kinds, ClipCostTest,
    testing::Values(Case{AttentionKind::kDense, 2, 96}, Case{AttentionKind::kSla, 2, 96},
                    Case{AttentionKind::kSalad, 2, 96}, Case{AttentionKind::kDense, 6, 1536},
                    Case{AttentionKind::kSla, 6, 1536}, Case{AttentionKind::kSalad, 6, 1536},
                    Case{AttentionKind::kSla, 2, 96, 16}, Case{AttentionKind::kSla, 6, 1536, 16},
                    Case{AttentionKind::kSalad, 6, 1536, 16}));

}  // namespace
}  // namespace slalom
