// Convolution in f32 arithmetic for any number of channels: tiles of 64 pixels x 64 channels.
#include "kernels/cuda/check.h"
#include "kernels/cuda/conv.h"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kThreads = 256;  // 16 x 16, each 4 x 4 outputs

template <typename T>
__global__ void __launch_bounds__(kThreads) SimpleConvKernel(const ConvProblem p) {
  __shared__ float pixels[kDepth][kTile + 1];
  __shared__ float weights[kDepth][kTile + 1];
  const ConvShape& shape = p.shape;
  const T* x = static_cast<const T*>(p.x);
  const T* history = static_cast<const T*>(p.history);
  const T* weight = static_cast<const T*>(p.weight);
  const std::int64_t first_pixel = static_cast<std::int64_t>(blockIdx.x) * kTile;
  const int first_channel = blockIdx.y * kTile;
  const int depth = shape.depth();
  const int column = threadIdx.x % 16;
  const int row = threadIdx.x / 16;
  float sums[4][4] = {};
  for (int k0 = 0; k0 < depth; k0 += kDepth) {
    const int k = k0 + column;
    const ConvTap tap = ConvTap::At(shape, k);
    for (int i = row; i < kTile; i += kThreads / 16) {
      float value = 0.0f;
      if (first_pixel + i < shape.pixels() && k < depth) {
        const ConvSource source =
            ConvSource::Find(shape, ConvPixel::At(shape, first_pixel + i), tap);
        if (source.place == ConvSource::Place::kInput) value = ToFloat(x[source.offset]);
        if (source.place == ConvSource::Place::kHistory) value = ToFloat(history[source.offset]);
      }
      pixels[column][i] = value;
      const int channel = first_channel + i;
      weights[column][i] = channel < shape.channels_out && k < depth
                               ? ToFloat(weight[static_cast<std::int64_t>(channel) * depth + k])
                               : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k1 = 0; k1 < kDepth; ++k1) {
      float a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = pixels[k1][row + 16 * i];
        b[i] = weights[k1][column + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += a[i] * b[j];
      }
    }
    __syncthreads();
  }
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::int64_t pixel = first_pixel + row + 16 * i;
    if (pixel >= shape.pixels()) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int channel = first_channel + column + 16 * j;
      if (channel >= shape.channels_out) continue;
      const std::int64_t at = pixel * shape.channels_out + channel;
      float y = sums[i][j];
      if (p.bias != nullptr) y += p.bias[channel];
      if (residual != nullptr) y += ToFloat(residual[at]);
      out[at] = FromFloat<T>(y);
    }
  }
}

}  // namespace

void SimpleConv(const Context& context, const ConvProblem& problem, DType type) {
  const ConvShape& shape = problem.shape;
  const dim3 grid(static_cast<unsigned>((shape.pixels() + kTile - 1) / kTile),
                  static_cast<unsigned>((shape.channels_out + kTile - 1) / kTile));
  if (type == DType::kBF16) {
    SimpleConvKernel<bf16><<<grid, kThreads, 0, context.stream>>>(problem);
  } else {
    SimpleConvKernel<float><<<grid, kThreads, 0, context.stream>>>(problem);
  }
  CheckLaunch("SimpleConv");
}

}  // namespace slalom::cuda
