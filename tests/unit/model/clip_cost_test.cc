#include "model/clip_cost.h"

#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "model/transformer.h"
#include "tests/unit/model/temp_folder.h"
#include "tests/unit/model/tiny_model.h"

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

struct Case {
  AttentionKind kind;
  int heads;
  int ffn_dim;
};
class ClipCostTest : public testing::TestWithParam<Case> {};

// What a step really takes stays within what was predicted, and the prediction is not idle.
TEST_P(ClipCostTest, PredictsAStepsMemory) {
  TempFolder folder;
  TinyModelOptions options;
  options.head_dim = 64;
  options.heads = GetParam().heads;
  options.ffn_dim = GetParam().ffn_dim;
  WriteTinyModel(folder.path(), options);
  const ModelConfig config = LoadModelConfig(folder.path());
  const auto backend = MakeBackend(Device{}, {.cpu_threads = 2, .force_f32 = true});
  const Transformer transformer(
      *backend, Weights::Open(folder / "transformer", "diffusion_pytorch_model"),
      config.transformer, LoadAdapters(folder.path(), config.transformer), DType::kF32);
  ClipSpec spec;
  spec.width = 256;
  spec.height = 192;
  spec.num_frames = 9;
  spec.guidance_scale = 3.0;
  spec.attention = GetParam().kind;
  const ClipShape shape = ShapeOf(config, spec);
  ASSERT_EQ(shape.latent(), (Shape{16, 3, 24, 32}));

  const std::size_t idle = backend->Memory().bytes_in_use;
  Tensor text = backend->Allocate({7, config.transformer.text_dim}, DType::kF32);
  backend->Zero(text);
  const TextContext prompt = transformer.PrepareText(*backend, text);
  const TextContext negative = transformer.PrepareText(*backend, text);
  const RopeTables rope = MakeRopeTables(*backend, shape.grid, 64, 1024);
  std::vector<Tensor> history;
  for (int i = 0; i < 4; ++i) history.push_back(backend->Allocate(shape.latent(), DType::kF32));
  const std::size_t waiting = backend->Memory().bytes_in_use - idle;
  const std::size_t predicted_waiting = WaitingBytes(config, spec, DType::kF32);
  EXPECT_NEAR(static_cast<double>(waiting), static_cast<double>(predicted_waiting),
              0.1 * static_cast<double>(predicted_waiting));

  const Shape batch = {2, 16, 3, 24, 32};
  backend->ResetPeak();
  const Tensor latent = backend->Allocate(batch, DType::kF32);
  backend->Zero(latent);
  const Tensor times = backend->Allocate({2}, DType::kF32);
  backend->Zero(times);
  const std::vector<const TextContext*> texts = {&prompt, &negative};
  const AttentionSetting setting = transformer.Setting(spec.attention);
  transformer.Forward(*backend, {.latent = latent,
                                 .timesteps = times,
                                 .text = texts,
                                 .rope = &rope,
                                 .attention = &setting,
                                 .velocity = backend->Allocate(batch, DType::kF32)});
  const auto peak = static_cast<double>(backend->Memory().bytes_peak - idle - waiting);
  const auto predicted = static_cast<double>(StepBytes(config, spec, DType::kF32));
  EXPECT_LE(peak, 1.05 * predicted);
  // SALAD's prediction has its linear branch in it, which this adapter lacks.
  EXPECT_GE(peak, (spec.attention == AttentionKind::kSalad ? 0.7 : 0.95) * predicted);
}

// A tiny model, and the proportions of a small one that people use.
INSTANTIATE_TEST_SUITE_P(
    Kinds, ClipCostTest,
    testing::Values(Case{AttentionKind::kDense, 2, 96}, Case{AttentionKind::kSla, 2, 96},
                    Case{AttentionKind::kSalad, 2, 96}, Case{AttentionKind::kDense, 6, 1536},
                    Case{AttentionKind::kSla, 6, 1536}, Case{AttentionKind::kSalad, 6, 1536}));

}  // namespace
}  // namespace slalom
