// Tiles of tokens in shared memory for the linear branch's mma.sync kernels.
#pragma once

#include <cstdint>

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda::linear_tiles {

inline constexpr int kTile = 64;  // tokens in shared memory at once

__device__ inline std::uint32_t SharedAddress(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Brings `rows` rows of kD channels into a swizzled tile of kTile rows; the others become zeros.
template <int kD, int kThreads, int kRows>
__device__ inline void CopyTile(bf16 (&to)[kRows][kD], const bf16* from, std::int64_t row_stride,
                                int rows) {
  constexpr int kChunks = kD / 8;
  const std::uint32_t base = SharedAddress(&to);
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const bool there = row < rows;
    CopyAsync16(base + SwizzledOffset<kChunks>(row, chunk),
                from + (there ? row * row_stride + chunk * 8 : 0), there);
  }
}

}  // namespace slalom::cuda::linear_tiles
