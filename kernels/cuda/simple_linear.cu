// Linear for the sizes and alignments that the library has no kernel for. A warp computes one
// output column, row after row; the order of each sum follows from K alone.
#include "kernels/cuda/check.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

constexpr int kWarps = 8;

template <typename T, typename Out>
struct Parameters {
  std::int64_t m, n, k;
  std::int64_t rows_per_sample;  // of the gate
  const T* x;
  const T* weight;
  const float* bias;
  const Out* residual;
  const float* gate;
  Activation activation;
  Out* out;
};

template <typename T, typename Out, int kWidth>
__global__ void __launch_bounds__(kWarps * 32) SimpleLinearKernel(const Parameters<T, Out> p) {
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (column >= p.n) return;
  for (std::int64_t row = 0; row < p.m; ++row) {
    float sum = 0.0f;
    for (std::int64_t i = lane * kWidth; i < p.k; i += 32 * kWidth) {
      float w[kWidth], x[kWidth];
      LoadFloats<kWidth>(p.weight + column * p.k + i, w);
      LoadFloats<kWidth>(p.x + row * p.k + i, x);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum += w[j] * x[j];
    }
    sum = GroupSum<32>(sum);
    if (lane != 0) continue;
    if (p.bias != nullptr) sum += p.bias[column];
    if (p.activation == Activation::kGeluTanh) sum = GeluTanh(sum);
    if (p.activation == Activation::kSilu) sum = Silu(sum);
    if (p.gate != nullptr) sum *= p.gate[row / p.rows_per_sample * p.n + column];
    if (p.residual != nullptr) sum += ToFloat(p.residual[row * p.n + column]);
    p.out[row * p.n + column] = FromFloat<Out>(sum);
  }
}

template <typename T, typename Out>
void Launch(const Context& context, const LinearArgs& args) {
  const std::int64_t n = args.weight.dim(0), k = args.weight.dim(1);
  const std::int64_t m = args.x.NumElements() / k;
  const Parameters<T, Out> p{m,
                             n,
                             k,
                             args.gate.defined() ? m / args.gate.dim(0) : m,
                             args.x.data<T>(),
                             args.weight.data<T>(),
                             args.bias.defined() ? args.bias.data<float>() : nullptr,
                             args.residual.defined() ? args.residual.data<Out>() : nullptr,
                             args.gate.defined() ? args.gate.data<float>() : nullptr,
                             args.activation,
                             args.out.data<Out>()};
  const auto blocks = static_cast<unsigned>((n + kWarps - 1) / kWarps);
  const bool vectors = k % 8 == 0 && reinterpret_cast<std::uintptr_t>(p.x) % 16 == 0 &&
                       reinterpret_cast<std::uintptr_t>(p.weight) % 16 == 0;
  if (vectors) {
    SimpleLinearKernel<T, Out, 8><<<blocks, kWarps * 32, 0, context.stream>>>(p);
  } else {
    SimpleLinearKernel<T, Out, 1><<<blocks, kWarps * 32, 0, context.stream>>>(p);
  }
  CheckLaunch("SimpleLinear");
}

}  // namespace

void SimpleLinear(const Context& context, const LinearArgs& args) {
  if (args.x.dtype() == DType::kF32) {
    Launch<float, float>(context, args);
  } else if (args.out.dtype() == DType::kF32) {
    Launch<bf16, float>(context, args);
  } else {
    Launch<bf16, bf16>(context, args);
  }
}

}  // namespace slalom::cuda
