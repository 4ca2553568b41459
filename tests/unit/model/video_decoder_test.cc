#include "model/video_decoder.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels/core/random.h"
#include "tests/unit/model/expect_error.h"
#include "tests/unit/model/temp_folder.h"
#include "tests/unit/model/tiny_model.h"

namespace slalom {
namespace {

constexpr std::int64_t kHeight = 4;
constexpr std::int64_t kWidth = 6;

class VideoDecoderTest : public testing::Test {
 protected:
  VideoDecoderTest() {
    WriteTinyModel(folder_.path());
    config_ = LoadVaeConfig(folder_ / "vae/config.json");
    decoder_ = std::make_unique<VideoDecoder>(*backend_, Open(), config_, DType::kF32);
  }

  Weights Open() const { return Weights::Open(folder_ / "vae", "diffusion_pytorch_model"); }

  static Tensor Latents(std::int64_t frames) {
    Tensor tensor = Tensor::Host({frames, kHeight, kWidth, 16}, DType::kF32);
    FillNormal(9, 0, 0, {tensor.data<float>(), static_cast<std::size_t>(tensor.NumElements())});
    return tensor;
  }

  // Decodes in pieces of these many latent frames.
  std::vector<float> Decode(const Tensor& latents, const std::vector<std::int64_t>& pieces) const {
    std::vector<float> values;
    DecoderState state;
    std::int64_t begin = 0;
    for (const std::int64_t n : pieces) {
      const std::int64_t frames = decoder_->FramesOf(n, state.fresh());
      const Tensor out = decoder_->Decode(*backend_, latents.Slice(begin, begin + n), state);
      EXPECT_EQ(out.shape(), (Shape{frames, 8 * kHeight, 8 * kWidth, 3}));
      values.insert(values.end(), out.data<float>(), out.data<float>() + out.NumElements());
      begin += n;
    }
    return values;
  }

  static float MaxDifference(const std::vector<float>& a, const std::vector<float>& b) {
    EXPECT_EQ(a.size(), b.size());
    float worst = 0;
    for (std::size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] - b[i]));
    return worst;
  }

  TempFolder folder_;
  VaeConfig config_;
  std::unique_ptr<Backend> backend_ = MakeBackend(Device{}, {});
  std::unique_ptr<VideoDecoder> decoder_;
};

TEST_F(VideoDecoderTest, PiecesDoNotShow) {
  const Tensor latents = Latents(6);
  const std::vector<float> whole = Decode(latents, {6});
  ASSERT_EQ(whole.size(), std::size_t{21 * 8 * kHeight * 8 * kWidth * 3});
  for (const std::vector<std::int64_t>& pieces :
       std::vector<std::vector<std::int64_t>>{{1, 1, 1, 1, 1, 1}, {1, 5}, {2, 1, 3}, {4, 2}}) {
    EXPECT_LT(MaxDifference(whole, Decode(latents, pieces)), 2e-5f) << pieces.size();
  }
}

// Frame t of the video sees latent frames up to its own and no later ones.
TEST_F(VideoDecoderTest, IsCausal) {
  const Tensor latents = Latents(4);
  const std::vector<float> all = Decode(latents, {4});
  const std::vector<float> start = Decode(latents, {2});
  EXPECT_LT(
      MaxDifference({all.begin(), all.begin() + static_cast<std::ptrdiff_t>(start.size())}, start),
      2e-5f);
  // And it does look back: the same latent frame at another place makes other frames.
  const std::vector<float> alone = Decode(latents.Slice(1, 2), {1});
  EXPECT_GT(
      MaxDifference({start.end() - static_cast<std::ptrdiff_t>(alone.size()), start.end()}, alone),
      1e-3f);
}

TEST_F(VideoDecoderTest, LayoutAndUnits) {
  Tensor latent = Tensor::Host({16, 2, 1, 3}, DType::kF32);
  std::iota(latent.data<float>(), latent.data<float>() + latent.NumElements(), 0.0f);
  const Tensor raw = decoder_->ToDecoderLayout(*backend_, latent, /*normalised=*/false);
  ASSERT_EQ(raw.shape(), (Shape{2, 1, 3, 16}));
  // Channel 5, frame 1, column 2.
  EXPECT_EQ(raw.data<float>()[(1 * 3 + 2) * 16 + 5], 5 * 6 + 1 * 3 + 2);
  const Tensor scaled = decoder_->ToDecoderLayout(*backend_, latent);
  EXPECT_FLOAT_EQ(scaled.data<float>()[(1 * 3 + 2) * 16 + 5], 35 * 1.7708f + 0.9653f);
}

TEST_F(VideoDecoderTest, PredictsItsMemory) {
  const std::size_t before = backend_->Memory().bytes_in_use;
  const Tensor latents = Latents(3);
  DecoderState state;
  decoder_->Decode(*backend_, latents.Slice(0, 1), state);
  decoder_->Decode(*backend_, latents.Slice(1, 2), state);
  const std::size_t held = backend_->Memory().bytes_in_use - before;
  const std::size_t predicted = decoder_->StateBytes(kHeight, kWidth);
  // An upsampler in time looks back at one frame only by now: its first piece passed it by.
  EXPECT_LE(held, predicted);
  EXPECT_GE(held, predicted - predicted / 20);

  backend_->ResetPeak();
  decoder_->Decode(*backend_, latents.Slice(2, 3), state);
  const std::size_t peak = backend_->Memory().bytes_peak - before;
  const std::size_t bound = predicted + decoder_->WorkBytes(kHeight, kWidth);
  EXPECT_LE(peak, bound);
  EXPECT_GE(peak, bound - bound / 20);

  state = DecoderState();
  EXPECT_EQ(backend_->Memory().bytes_in_use, before);
}

// Every latent frame but the first costs the same; the published decoder's ratio is 3.1.
TEST_F(VideoDecoderTest, CostGrowsWithFramesAndArea) {
  const double first = decoder_->Flops(1, kHeight, kWidth);
  const double second = decoder_->Flops(2, kHeight, kWidth) - first;
  EXPECT_NEAR(decoder_->Flops(3, kHeight, kWidth), first + 2 * second, 1.0);
  EXPECT_GT(second, 2 * first);
  EXPECT_LT(second, 4 * first);
  EXPECT_EQ(decoder_->StateBytes(2 * kHeight, kWidth), 2 * decoder_->StateBytes(kHeight, kWidth));
}

TEST_F(VideoDecoderTest, RefusesWhatDoesNotFit) {
  DecoderState state;
  ExpectError(ErrorCode::kInternal, {"[n, h, w, 16]"}, [&] {
    decoder_->Decode(*backend_, Tensor::Host({1, 4, 4, 8}, DType::kF32), state);
  });
  VaeConfig wider = config_;
  wider.base_dim *= 2;
  ExpectError(ErrorCode::kInvalidArgument, {"decoder.conv_in", "expected"},
              [&] { VideoDecoder(*backend_, Open(), wider, DType::kF32); });
}

}  // namespace
}  // namespace slalom
