// A gate on a linear layer's result, folded into its weight and bias.
#include "kernels/cuda/check.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;  // loads of a thread that are under way together

// One block per row of the weight.
__global__ void __launch_bounds__(kThreads)
    GateWeightKernel(const bf16* weight, const float* bias, const float* gate, int columns,
                     bf16* out_weight, float* out_bias) {
  const std::int64_t row = blockIdx.x;
  const float factor = gate[row];
  const bf16* from = weight + row * columns;
  bf16* to = out_weight + row * columns;
  const int step = kThreads * 8;
  for (int first = static_cast<int>(threadIdx.x) * 8; first < columns; first += kAtOnce * step) {
    Packed8<bf16> packed[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * step < columns) packed[i].Load(from + first + i * step);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * step >= columns) continue;
      float values[8];
      packed[i].Unpack(values);
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] *= factor;
      StoreFloats<8>(to + first + i * step, values);
    }
  }
  if (bias != nullptr && threadIdx.x == 0) out_bias[row] = bias[row] * factor;
}

}  // namespace

void GateWeight(const Context& context, const Tensor& weight, const Tensor& bias, const float* gate,
                const Tensor& out_weight, const Tensor& out_bias) {
  const std::int64_t rows = weight.dim(0), columns = weight.dim(1);
  Require(columns % 8 == 0 && columns < (std::int64_t{1} << 30), "GateWeight: rows of 8 elements");
  GateWeightKernel<<<static_cast<unsigned>(rows), kThreads, 0, context.stream>>>(
      weight.data<bf16>(), bias.defined() ? bias.data<float>() : nullptr, gate,
      static_cast<int>(columns), out_weight.data<bf16>(),
      bias.defined() ? out_bias.data<float>() : nullptr);
  CheckLaunch("GateWeight");
}

}  // namespace slalom::cuda
