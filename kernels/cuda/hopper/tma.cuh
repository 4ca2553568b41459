// TMA: copies of boxes of a tensor into shared memory, reported to an mbarrier.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/hopper/mbarrier.cuh"

namespace slalom::cuda::hopper {

// Fetches the descriptor itself ahead of its first use.
__device__ inline void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(reinterpret_cast<std::uint64_t>(map)) : "memory");
}

// Copies the map's box at these coordinates (innermost first); what lies outside of the tensor
// arrives as zeros and counts as bytes all the same. `to` is aligned to 1024 bytes.
__device__ inline void CopyBox(const CUtensorMap* map, std::uint64_t* barrier, void* to, int c0,
                               int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(SharedAddress(to)),
      "l"(reinterpret_cast<std::uint64_t>(map)), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1),
      "r"(c2), "r"(c3)
      : "memory");
}

}  // namespace slalom::cuda::hopper
