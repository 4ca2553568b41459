// Predicted memory on a CUDA device, where a clip that does not fit fails instead of paging.
#include <gtest/gtest.h>

#include <memory>

#include "kernels/backend.h"
#include "kernels/core/random.h"
#include "model/config.h"
#include "model/video_decoder.h"
#include "model/weights.h"
#include "tests/unit/model/step_memory.h"
#include "tests/unit/model/temp_folder.h"
#include "tests/unit/model/tiny_model.h"

namespace slalom {
namespace {

std::unique_ptr<Backend> Cuda() {
  return CudaDeviceCount() > 0 ? MakeBackend(ParseDevice("cuda:0"), {}) : nullptr;
}

class StepMemoryOnCuda : public testing::TestWithParam<AttentionKind> {};

// Wan 1.3B's proportions at a third of its width and two of its layers, in bf16: 14040 tokens.
TEST_P(StepMemoryOnCuda, IsPredicted) {
  const std::unique_ptr<Backend> backend = Cuda();
  if (backend == nullptr) GTEST_SKIP() << "this machine has no CUDA device";
  TinyModelOptions options;
  options.heads = 4;
  options.head_dim = 128;
  options.ffn_dim = 2984;
  options.text_len = 512;
  ClipSpec spec;
  spec.width = 832;
  spec.height = 480;
  spec.num_frames = 33;
  spec.attention = GetParam();
  const StepMemory memory = MeasureStepMemory(*backend, options, spec);
  EXPECT_NEAR(memory.waiting, memory.predicted_waiting, 0.05 * memory.predicted_waiting);
  EXPECT_NEAR(memory.peak, memory.predicted_peak, 0.05 * memory.predicted_peak);
}

INSTANTIATE_TEST_SUITE_P(Kinds, StepMemoryOnCuda,
                         testing::Values(AttentionKind::kDense, AttentionKind::kSla,
                                         AttentionKind::kSalad));

TEST(DecoderMemoryOnCuda, IsPredicted) {
  const std::unique_ptr<Backend> backend = Cuda();
  if (backend == nullptr) GTEST_SKIP() << "this machine has no CUDA device";
  TempFolder folder;
  TinyModelOptions options;
  options.vae_base_dim = 96;  // the published decoder
  options.vae_res_blocks = 2;
  WriteTinyModel(folder.path(), options);
  const DType dtype = backend->preferred_dtype();
  const VideoDecoder decoder(*backend, Weights::Open(folder / "vae", "diffusion_pytorch_model"),
                             LoadModelConfig(folder.path()).vae, dtype);
  constexpr std::int64_t kHeight = 60, kWidth = 104, kChannels = 16;
  const Tensor latent = backend->Allocate({1, kHeight, kWidth, kChannels}, dtype);
  backend->Zero(latent);
  const std::size_t before = backend->Memory().bytes_in_use;
  DecoderState state;
  decoder.Decode(*backend, latent, state);
  decoder.Decode(*backend, latent, state);
  backend->ResetPeak();
  decoder.Decode(*backend, latent, state);
  backend->Synchronize();
  const auto peak = static_cast<double>(backend->Memory().bytes_peak - before);
  const auto predicted =
      static_cast<double>(decoder.StateBytes(kHeight, kWidth) + decoder.WorkBytes(kHeight, kWidth));
  EXPECT_NEAR(peak, predicted, 0.05 * predicted);
  state = DecoderState();
  EXPECT_EQ(backend->Memory().bytes_in_use, before);
}

}  // namespace
}  // namespace slalom
