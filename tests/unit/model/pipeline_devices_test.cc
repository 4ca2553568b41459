// The whole pipeline on a CUDA device beside the CPU: the same prompt and seed make the same clip.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "model/pipeline.h"
#include "tests/unit/model/temp_folder.h"
#include "tests/unit/model/tiny_model.h"

namespace slalom {
namespace {

// f32 on both sides; a value that lies between two levels of a pixel may fall to either.
constexpr int kLevels = 1;

struct Clip {
  std::vector<int> pixels;
  std::vector<int> preview;
  double sparsity = 0;
};

void Append(const Tensor& bytes, std::vector<int>& to) {
  const auto* first = bytes.data<std::uint8_t>();
  to.insert(to.end(), first, first + bytes.NumElements());
}

Clip Generate(const Pipeline& pipeline, AttentionKind attention) {
  ClipRequest request;
  request.prompt = "a red ball";
  request.seed = 3;
  request.attention = attention;
  if (attention != AttentionKind::kDense) request.topk = 0.5;
  const std::unique_ptr<Generation> generation = pipeline.Begin(pipeline.Resolve(request));
  const std::array<Generation*, 1> batch = {generation.get()};
  while (!generation->denoised()) {
    for (const auto& failure : pipeline.DenoiseStep(batch)) ADD_FAILURE() << failure.message;
  }
  Clip clip;
  Append(pipeline.Preview(*generation), clip.preview);
  while (!generation->decoded()) Append(pipeline.DecodeNext(*generation).pixels, clip.pixels);
  clip.sparsity = generation->statistics().sparsity();
  return clip;
}

int MostLevels(const std::vector<int>& a, const std::vector<int>& b) {
  EXPECT_EQ(a.size(), b.size());
  int most = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    most = std::max(most, std::abs(a[i] - b[i]));
  }
  return most;
}

class PipelineDevices : public testing::TestWithParam<AttentionKind> {
 protected:
  void SetUp() override {
    if (CudaDeviceCount() == 0) GTEST_SKIP() << "this machine has no CUDA device";
    WriteTinyModel(folder_.path());
  }

  std::unique_ptr<Pipeline> Load(const std::string& device) const {
    PipelineOptions options;
    options.device = ParseDevice(device);
    options.dtype = "f32";
    return LoadPipeline(folder_.path(), options);
  }

  TempFolder folder_;
};

TEST_P(PipelineDevices, MakeTheSameClip) {
  const Clip expected = Generate(*Load("cpu"), GetParam());
  const std::unique_ptr<Pipeline> cuda = Load("cuda:0");
  const Clip clip = Generate(*cuda, GetParam());
  ASSERT_FALSE(clip.pixels.empty());
  EXPECT_LE(MostLevels(clip.pixels, expected.pixels), kLevels);
  EXPECT_LE(MostLevels(clip.preview, expected.preview), kLevels);
  EXPECT_EQ(clip.sparsity, expected.sparsity);
}

// Twenty clips leave nothing behind, and the device makes each again bit by bit.
TEST_P(PipelineDevices, RepeatWithoutLeaking) {
  const std::unique_ptr<Pipeline> cuda = Load("cuda:0");
  const Clip first = Generate(*cuda, GetParam());
  const MemoryStats before = cuda->Memory();
  for (int i = 0; i < 20; ++i) EXPECT_EQ(Generate(*cuda, GetParam()).pixels, first.pixels);
  EXPECT_EQ(cuda->Memory().bytes_in_use, before.bytes_in_use);
  EXPECT_EQ(cuda->Memory().bytes_reserved, before.bytes_reserved);
}

INSTANTIATE_TEST_SUITE_P(All, PipelineDevices,
                         testing::Values(AttentionKind::kDense, AttentionKind::kSla,
                                         AttentionKind::kSalad));

}  // namespace
}  // namespace slalom
