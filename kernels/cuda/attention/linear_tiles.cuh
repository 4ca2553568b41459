// Tiles of tokens in shared memory for the linear branch's mma.sync kernels.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention/mma_tiles.cuh"

namespace slalom::cuda::linear_tiles {

inline constexpr int kTile = 64;  // tokens in shared memory at once

__device__ inline std::uint32_t SharedAddress(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace slalom::cuda::linear_tiles
