// Runs a function object once per group of neighbouring elements.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/check.h"
#include "kernels/cuda/context.h"

namespace slalom::cuda {

template <int kWidth, class Function>
__global__ void __launch_bounds__(256) ElementwiseKernel(Function function, std::int64_t groups) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < groups; i += step) {
    function.template Apply<kWidth>(i * kWidth);
  }
}

// Calls function.Apply<kWidth>(first) for first = 0, kWidth, 2 kWidth, ... < elements, with kWidth
// 8 when `vectors` says that groups of 8 are aligned and do not cross a row, else 1.
template <class Function>
void RunElementwise(const Context& context, const Function& function, std::int64_t elements,
                    bool vectors, const char* kernel) {
  if (elements == 0) return;
  const bool wide = vectors && elements % 8 == 0;
  const std::int64_t groups = wide ? elements / 8 : elements;
  const std::int64_t limit = std::int64_t{context.sm_count} * 32;
  const auto blocks = static_cast<unsigned>(std::min((groups + 255) / 256, limit));
  if (wide) {
    ElementwiseKernel<8><<<blocks, 256, 0, context.stream>>>(function, groups);
  } else {
    ElementwiseKernel<1><<<blocks, 256, 0, context.stream>>>(function, groups);
  }
  CheckLaunch(kernel);
}

template <class... Pointers>
bool AllAligned16(Pointers... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace slalom::cuda
