// What an operation needs from its backend: where to queue work and where to get scratch memory.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "kernels/core/tensor.h"
#include "kernels/cuda/arena.h"

namespace slalom::cuda {

class Gemm;

inline constexpr int kHopperMajor = 9;  // compute capability of kernels with TMA and wgmma

struct Context {
  cudaStream_t stream = nullptr;
  Device device;
  int sm_count = 0;
  int compute_major = 0;  // 9 on Hopper
  std::shared_ptr<Arena> arena;
  Gemm* gemm = nullptr;

  // Uninitialised memory; it goes back to the arena with the last Tensor that shares it. Throws
  // Error(kResourceExhausted).
  Tensor Allocate(const Shape& shape, DType dtype) const;
};

}  // namespace slalom::cuda
