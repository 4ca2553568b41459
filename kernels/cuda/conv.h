// Causal convolutions as matrix products whose left factor is gathered on the way into shared
// memory: rows are output pixels, k runs over (dt, dy, dx, channel). History, zero padding and the
// doubling of pixels are addresses, not copies.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/context.h"

namespace slalom::cuda {

struct ConvShape {
  int frames = 0, height = 0, width = 0;  // of x
  int channels_in = 0, channels_out = 0;
  int kt = 1, kh = 1, kw = 1;
  int history = 0;   // frames in front of x
  int doubling = 0;  // 1: every pixel and line of x counts twice

  __host__ __device__ int out_height() const { return height << doubling; }
  __host__ __device__ int out_width() const { return width << doubling; }
  __host__ __device__ std::int64_t pixels() const {
    return static_cast<std::int64_t>(frames) * out_height() * out_width();
  }
  __host__ __device__ int depth() const { return kt * kh * kw * channels_in; }
};

// A tap of the kernel and a channel: one value of k.
struct ConvTap {
  int dt = 0, dy = 0, dx = 0, channel = 0;

  __host__ __device__ static ConvTap At(const ConvShape& shape, int k) {
    const int tap = k / shape.channels_in;
    return {tap / (shape.kh * shape.kw), tap / shape.kw % shape.kh, tap % shape.kw,
            k % shape.channels_in};
  }
  __host__ __device__ void Advance(const ConvShape& shape, int step) {
    channel += step;
    while (channel >= shape.channels_in) {
      channel -= shape.channels_in;
      if (++dx < shape.kw) continue;
      dx = 0;
      if (++dy < shape.kh) continue;
      dy = 0;
      ++dt;
    }
  }
};

struct ConvPixel {
  int t = 0, y = 0, x = 0;

  __host__ __device__ static ConvPixel At(const ConvShape& shape, std::int64_t index) {
    const int width = shape.out_width();
    const int height = shape.out_height();
    return {static_cast<int>(index / width / height), static_cast<int>(index / width % height),
            static_cast<int>(index % width)};
  }
};

// Where a pixel's tap reads: an element offset into x, or into the history; or nowhere, which is
// zero padding.
struct ConvSource {
  enum class Place { kNowhere, kInput, kHistory };
  Place place = Place::kNowhere;
  std::int64_t offset = 0;

  __host__ __device__ static ConvSource Find(const ConvShape& shape, const ConvPixel& pixel,
                                             const ConvTap& tap) {
    const int y = pixel.y + tap.dy - shape.kh / 2;
    const int x = pixel.x + tap.dx - shape.kw / 2;
    if (tap.dt >= shape.kt || y < 0 || y >= shape.out_height() || x < 0 || x >= shape.out_width()) {
      return {};
    }
    int frame = pixel.t + tap.dt - (shape.kt - 1);
    Place place = Place::kInput;
    if (frame < 0) {
      frame += shape.history;
      place = Place::kHistory;
      if (frame < 0) return {};
    }
    const std::int64_t row =
        static_cast<std::int64_t>(frame) * shape.height + (y >> shape.doubling);
    return {place, (row * shape.width + (x >> shape.doubling)) * shape.channels_in + tap.channel};
  }
};

struct ConvProblem {
  ConvShape shape;
  const void* x = nullptr;         // [T, H, W, Ci]
  const void* history = nullptr;   // [history, H, W, Ci] or null
  const void* weight = nullptr;    // [Co, kt, kh, kw, Ci]
  const float* bias = nullptr;     // [Co] or null
  const void* residual = nullptr;  // [T, H', W', Co] or null; may be out
  void* out = nullptr;             // [T, H', W', Co]
};

enum class ConvKernel {
  kHopper,      // TMA and wgmma, sm_90: channels in multiples of 96, or few channels_out;
                // kernels of at most 3 x 3 in a frame
  kTensorCore,  // mma.sync: channels_in in multiples of 8
  kSimple,      // anything
};

// The fastest kernel that can do this; a pure function. `aligned`: all pointers by 16 bytes.
ConvKernel ChooseConvKernel(const ConvShape& shape, DType type, bool aligned, int compute_major);
void RunConv(const Context& context, const ConvProblem& problem, DType type, ConvKernel kernel);

// The Wan decoder's channels, 96, 192 and 384, in bf16 on Hopper.
void HopperConv(const Context& context, const ConvProblem& problem);
// bf16 with channels_in divisible by 8 and 16-byte alignment, sm_80 and newer.
void TensorCoreConv(const Context& context, const ConvProblem& problem);
// Any number of channels, f32 arithmetic.
void SimpleConv(const Context& context, const ConvProblem& problem, DType type);

}  // namespace slalom::cuda
