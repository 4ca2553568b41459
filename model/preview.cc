#include "model/preview.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/core/error.h"
#include "kernels/core/random.h"
#include "model/host_floats.h"

namespace slalom {
namespace {

constexpr std::int64_t kPatches = 6;    // per side: more samples than unknowns
constexpr std::int64_t kPatchSize = 4;  // latent positions per side
constexpr std::uint64_t kSeed = 1;
constexpr double kRidge = 1e-3;

// Solves (a + ridge) x = b for each of b's columns by Gaussian elimination; a [n, n] is symmetric
// and positive, b is [n, 3] and becomes x.
void Solve(std::vector<double>& a, std::vector<double>& b, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) a[i * n + i] += kRidge;
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t row = 0; row < n; ++row) {
      if (row == i) continue;
      const double factor = a[row * n + i] / a[i * n + i];
      for (std::size_t j = i; j < n; ++j) a[row * n + j] -= factor * a[i * n + j];
      for (std::size_t c = 0; c < 3; ++c) b[row * 3 + c] -= factor * b[i * 3 + c];
    }
  }
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t c = 0; c < 3; ++c) b[i * 3 + c] /= a[i * n + i];
  }
}

// Latents that are constant within each patch: [C, 1, side, side] f32.
Tensor RandomPatches(std::int64_t channels) {
  std::vector<float> values(static_cast<std::size_t>(channels * kPatches * kPatches));
  FillNormal(kSeed, 0, 0, values);
  const std::int64_t side = kPatches * kPatchSize;
  Tensor latent = Tensor::Host({channels, 1, side, side}, DType::kF32);
  auto* out = latent.data<float>();
  for (std::int64_t c = 0; c < channels; ++c) {
    for (std::int64_t y = 0; y < side; ++y) {
      for (std::int64_t x = 0; x < side; ++x) {
        *out++ = values[static_cast<std::size_t>((c * kPatches + y / kPatchSize) * kPatches +
                                                 x / kPatchSize)];
      }
    }
  }
  return latent;
}

// The mean colour of each latent position: frame [1, s * side, s * side, 3] -> [side, side, 3].
std::vector<double> MeanColours(const std::vector<float>& frame, std::int64_t side,
                                std::int64_t scale) {
  std::vector<double> means(static_cast<std::size_t>(side * side * 3));
  const std::int64_t width = side * scale;
  for (std::int64_t y = 0; y < width; ++y) {
    for (std::int64_t x = 0; x < width; ++x) {
      for (std::int64_t c = 0; c < 3; ++c) {
        const float value = frame[static_cast<std::size_t>((y * width + x) * 3 + c)];
        means[static_cast<std::size_t>(((y / scale) * side + x / scale) * 3 + c)] +=
            std::clamp(value, -1.0f, 1.0f) / static_cast<double>(scale * scale);
      }
    }
  }
  return means;
}

}  // namespace

PreviewMap PreviewMap::Fit(Backend& backend, const VideoDecoder& decoder) {
  const std::int64_t channels = decoder.config().z_dim;
  const std::int64_t side = kPatches * kPatchSize;
  const Tensor latent = RandomPatches(channels);
  const Tensor laid_out = decoder.ToDecoderLayout(backend, latent);
  Tensor input = backend.Allocate(laid_out.shape(), DType::kF32);
  backend.Copy(laid_out, input);
  DecoderState state;
  const Tensor frame = decoder.Decode(backend, input, state);
  Tensor host = Tensor::Host(frame.shape(), DType::kF32);
  backend.Copy(frame, host);
  const std::vector<double> colours =
      MeanColours(ToFloats(host), side, decoder.config().spatial_scale());

  const auto n = static_cast<std::size_t>(channels) + 1;
  std::vector<double> normal(n * n);
  std::vector<double> right(n * 3);
  std::vector<double> z(n, 1.0);
  const auto positions = static_cast<std::size_t>(side * side);
  for (std::size_t p = 0; p < positions; ++p) {
    for (std::size_t c = 0; c + 1 < n; ++c) z[c] = latent.data<float>()[c * positions + p];
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = 0; j < n; ++j) normal[i * n + j] += z[i] * z[j];
      for (std::size_t c = 0; c < 3; ++c) right[i * 3 + c] += z[i] * colours[p * 3 + c];
    }
  }
  Solve(normal, right, n);
  PreviewMap map;
  map.factors_.assign(right.begin(), right.end());
  return map;
}

Tensor PreviewMap::Render(Backend& backend, const Tensor& latent) const {
  Tensor host = Tensor::Host(latent.shape(), DType::kF32);
  backend.Copy(latent, host);
  const std::int64_t channels = latent.dim(0);
  const std::int64_t positions = latent.dim(2) * latent.dim(3);
  const std::int64_t stride = latent.dim(1) * positions;
  const float* frame = host.data<float>() + latent.dim(1) / 2 * positions;
  Tensor image = Tensor::Host({latent.dim(2), latent.dim(3), 3}, DType::kU8);
  auto* out = image.data<std::uint8_t>();
  for (std::int64_t p = 0; p < positions; ++p) {
    for (std::int64_t c = 0; c < 3; ++c) {
      float value = factors_[static_cast<std::size_t>(channels * 3 + c)];
      for (std::int64_t i = 0; i < channels; ++i) {
        value += factors_[static_cast<std::size_t>(i * 3 + c)] * frame[i * stride + p];
      }
      // A NaN becomes black: std::clamp would hand it to the conversion.
      const float level = 255.0f * (value + 1.0f) / 2.0f;
      out[p * 3 + c] = level > 0.0f ? static_cast<std::uint8_t>(std::min(level, 255.0f)) : 0;
    }
  }
  return image;
}

}  // namespace slalom
