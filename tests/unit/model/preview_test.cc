#include "model/preview.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "kernels/core/random.h"
#include "tests/unit/model/temp_folder.h"
#include "tests/unit/model/tiny_model.h"

namespace slalom {
namespace {

// The correlation of two images' values.
double Correlation(const std::vector<double>& a, const std::vector<double>& b) {
  double mean_a = 0;
  double mean_b = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    mean_a += a[i] / static_cast<double>(a.size());
    mean_b += b[i] / static_cast<double>(b.size());
  }
  double ab = 0;
  double aa = 0;
  double bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    ab += (a[i] - mean_a) * (b[i] - mean_b);
    aa += std::pow(a[i] - mean_a, 2);
    bb += std::pow(b[i] - mean_b, 2);
  }
  return ab / std::sqrt(aa * bb);
}

// On latents that it was not fitted to, the preview resembles what the decoder makes. A random
// decoder is far from linear, so that "resembles" is all that can be asked of this one.
TEST(PreviewMap, ResemblesTheDecodedFrame) {
  TempFolder folder;
  WriteTinyModel(folder.path());
  const auto backend = MakeBackend(Device{}, {.force_f32 = true});
  const VideoDecoder decoder(*backend, Weights::Open(folder / "vae", "diffusion_pytorch_model"),
                             LoadVaeConfig(folder / "vae/config.json"), DType::kF32);
  const PreviewMap map = PreviewMap::Fit(*backend, decoder);

  // Patches of 4 x 4 as in the fit, other values.
  Tensor latent = Tensor::Host({16, 1, 16, 16}, DType::kF32);
  for (std::int64_t c = 0; c < 16; ++c) {
    for (std::int64_t p = 0; p < 256; ++p) {
      const auto patch = static_cast<std::uint64_t>((p / 64) * 4 + p % 16 / 4);
      FillNormal(77, static_cast<std::uint64_t>(c), patch, {latent.data<float>() + c * 256 + p, 1});
    }
  }
  const Tensor image = map.Render(*backend, latent);
  ASSERT_EQ(image.shape(), (Shape{16, 16, 3}));
  DecoderState state;
  const Tensor frame = decoder.Decode(*backend, decoder.ToDecoderLayout(*backend, latent), state);
  std::vector<double> previewed;
  std::vector<double> decoded;
  for (std::int64_t p = 0; p < 256; ++p) {
    for (std::int64_t c = 0; c < 3; ++c) {
      previewed.push_back(image.data<std::uint8_t>()[p * 3 + c]);
      double mean = 0;
      for (std::int64_t i = 0; i < 64; ++i) {
        const std::int64_t y = p / 16 * 8 + i / 8;
        const std::int64_t x = p % 16 * 8 + i % 8;
        mean += std::clamp(frame.data<float>()[(y * 128 + x) * 3 + c], -1.0f, 1.0f) / 64.0;
      }
      decoded.push_back(mean);
    }
  }
  EXPECT_GT(Correlation(previewed, decoded), 0.4);
}

TEST(PreviewMap, ANaNIsBlack) {
  TempFolder folder;
  WriteTinyModel(folder.path());
  const auto backend = MakeBackend(Device{}, {.force_f32 = true});
  const VideoDecoder decoder(*backend, Weights::Open(folder / "vae", "diffusion_pytorch_model"),
                             LoadVaeConfig(folder / "vae/config.json"), DType::kF32);
  Tensor latent = Tensor::Host({16, 3, 2, 2}, DType::kF32);
  std::fill_n(latent.data<float>(), latent.NumElements(), std::nanf(""));
  const Tensor image = PreviewMap::Fit(*backend, decoder).Render(*backend, latent);
  EXPECT_EQ(std::count(image.data<std::uint8_t>(), image.data<std::uint8_t>() + 12, 0), 12);
}

}  // namespace
}  // namespace slalom
