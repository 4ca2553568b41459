// Where 16-byte chunks of a tile's rows lie in shared memory, so that ldmatrix meets no bank twice.
#pragma once

#include <cuda_runtime_api.h>

namespace slalom::cuda {

// Byte offset of a 16-byte chunk in a tile of rows of kChunks chunks, kChunks a power of two. The
// chunks of a row are permuted by its number, so that the 8 rows of a matrix lie in 8 different
// bank groups.
template <int kChunks>
__host__ __device__ constexpr int SwizzledOffset(int row, int chunk) {
  static_assert((kChunks & (kChunks - 1)) == 0);
  if constexpr (kChunks >= 8) {
    return (row * kChunks + (chunk ^ (row & 7))) * 16;
  } else {
    // Several rows share 128 bytes: permute by the number of that line instead.
    constexpr int kRowsPerLine = 8 / kChunks;
    return (row * kChunks + (chunk ^ (row / kRowsPerLine & (kChunks - 1)))) * 16;
  }
}

}  // namespace slalom::cuda
