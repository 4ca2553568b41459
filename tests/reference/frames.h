// Reference operations on latents and frames. Naive on purpose.
#pragma once

#include <algorithm>
#include <cmath>

#include "tests/reference/array.h"
#include "tests/reference/rows.h"

namespace slalom::reference {

// latent [B, C, F, 2 h, 2 w] -> tokens [B, L, 4 C], channel c * 4 + ky * 2 + kx.
inline Array Patchify(const Array& latent) {
  const std::int64_t channels = latent.dim(1), frames = latent.dim(2);
  const std::int64_t lines = latent.dim(3), columns = latent.dim(4);
  const std::int64_t tokens = frames * (lines / 2) * (columns / 2);
  Array out(Shape{latent.dim(0), tokens, channels * 4});
  for (std::int64_t i = 0; i < latent.size(); ++i) {
    const std::int64_t x = i % columns, y = i / columns % lines;
    const std::int64_t f = i / columns / lines % frames;
    const std::int64_t c = i / columns / lines / frames % channels;
    const std::int64_t b = i / columns / lines / frames / channels;
    const std::int64_t token = (f * (lines / 2) + y / 2) * (columns / 2) + x / 2;
    out[(b * tokens + token) * channels * 4 + c * 4 + y % 2 * 2 + x % 2] = latent[i];
  }
  return out;
}

// tokens [B, L, 4 C], channel (ky * 2 + kx) * C + c -> latent of `shape` [B, C, F, 2 h, 2 w].
inline Array Unpatchify(const Array& tokens, const Shape& shape) {
  Array out(shape);
  const std::int64_t channels = shape[1], frames = shape[2], lines = shape[3], columns = shape[4];
  const std::int64_t count = frames * (lines / 2) * (columns / 2);
  for (std::int64_t i = 0; i < out.size(); ++i) {
    const std::int64_t x = i % columns, y = i / columns % lines;
    const std::int64_t f = i / columns / lines % frames;
    const std::int64_t c = i / columns / lines / frames % channels;
    const std::int64_t b = i / columns / lines / frames / channels;
    const std::int64_t token = (f * (lines / 2) + y / 2) * (columns / 2) + x / 2;
    out[i] = tokens[(b * count + token) * channels * 4 + (y % 2 * 2 + x % 2) * channels + c];
  }
  return out;
}

// x [T, H, W, Ci], history [n, H, W, Ci] optional, weight [Co, kt, kh, kw, Ci].
template <typename P>
Array Conv(const Array& x, const Array& history, const Array& weight, const Array& bias,
           const Array& residual, bool upsample) {
  using Real = typename P::Real;
  const std::int64_t factor = upsample ? 2 : 1;
  const std::int64_t frames = x.dim(0), lines = x.dim(1) * factor, columns = x.dim(2) * factor;
  const std::int64_t in_channels = x.dim(3), out_channels = weight.dim(0);
  const std::int64_t kt = weight.dim(1), kh = weight.dim(2), kw = weight.dim(3);
  const std::int64_t past = history.defined() ? history.dim(0) : 0;
  const auto at = [&](std::int64_t t, std::int64_t y, std::int64_t z, std::int64_t c) -> Real {
    if (y < 0 || y >= lines || z < 0 || z >= columns || t < -past) return 0;
    const Array& from = t < 0 ? history : x;
    const std::int64_t frame = t < 0 ? t + past : t;
    return static_cast<Real>(
        from[((frame * x.dim(1) + y / factor) * x.dim(2) + z / factor) * in_channels + c]);
  };
  Array out(Shape{frames, lines, columns, out_channels});
  for (std::int64_t i = 0; i < out.size(); ++i) {
    const std::int64_t o = i % out_channels, z = i / out_channels % columns;
    const std::int64_t y = i / out_channels / columns % lines,
                       t = i / out_channels / columns / lines;
    Real sum = bias.defined() ? static_cast<Real>(bias[o]) : Real(0);
    for (std::int64_t a = 0; a < kt * kh * kw; ++a) {
      const std::int64_t dt = a / (kh * kw), dy = a / kw % kh, dz = a % kw;
      for (std::int64_t c = 0; c < in_channels; ++c) {
        sum += at(t + dt - (kt - 1), y + dy - kh / 2, z + dz - kw / 2, c) *
               static_cast<Real>(weight[(o * kt * kh * kw + a) * in_channels + c]);
      }
    }
    if (residual.defined()) sum = P::Store(sum) + static_cast<Real>(residual[i]);
    out[i] = P::Store(sum);
  }
  return out;
}

// Over the last dimension: x / max(|x|, 1e-12) * sqrt(C) * gamma, then SiLU if asked.
template <typename P>
Array ChannelNorm(const Array& x, const Array& gamma, bool silu) {
  using Real = typename P::Real;
  const std::int64_t channels = gamma.size();
  Array out(x.shape);
  for (std::int64_t r = 0; r < x.size() / channels; ++r) {
    Real squares = 0;
    for (std::int64_t c = 0; c < channels; ++c) {
      squares += static_cast<Real>(x[r * channels + c]) * static_cast<Real>(x[r * channels + c]);
    }
    const Real norm = std::max(std::sqrt(squares), Real(1e-12));
    for (std::int64_t c = 0; c < channels; ++c) {
      Real y = static_cast<Real>(x[r * channels + c]) / norm *
               std::sqrt(static_cast<Real>(channels)) * static_cast<Real>(gamma[c]);
      y = P::Store(y);
      out[r * channels + c] = silu ? P::Store(Apply(Act::kSilu, y)) : y;
    }
  }
  return out;
}

// [T, H, W, 2 C] -> [2 T, H, W, C].
inline Array InterleaveFrames(const Array& x) {
  const std::int64_t channels = x.dim(3) / 2, pixels = x.dim(1) * x.dim(2);
  Array out(Shape{2 * x.dim(0), x.dim(1), x.dim(2), channels});
  for (std::int64_t i = 0; i < out.size(); ++i) {
    const std::int64_t c = i % channels, pixel = i / channels % pixels;
    const std::int64_t frame = i / channels / pixels;
    out[i] = x[(frame / 2 * pixels + pixel) * 2 * channels + frame % 2 * channels + c];
  }
  return out;
}

inline int ToPixel(double x) {
  return static_cast<int>(std::floor(255.0 * ((std::clamp(x, -1.0, 1.0) + 1.0) / 2.0)));
}

}  // namespace slalom::reference
