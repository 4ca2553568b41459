// What the mma.sync attention kernels do with tiles of tokens: bring them, read fragments, store
// them.
#pragma once

#include <cstdint>

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/shared_address.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {

// Brings `rows` rows of kD channels into a swizzled tile of kRows rows; the others become zeros.
// Each of the kThreads threads brings the same chunk of rows that lie evenly apart.
template <int kD, int kThreads, int kRows>
__device__ inline void CopyTile(bf16 (&to)[kRows][kD], const bf16* from, std::int64_t row_stride,
                                int rows) {
  constexpr int kChunks = kD / 8;
  constexpr int kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0);
  const auto base = SharedAddress(&to);
  const int first = static_cast<int>(threadIdx.x / kChunks);
  const int chunk = static_cast<int>(threadIdx.x % kChunks);
  from += first * row_stride + chunk * 8;
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    CopyAsync16(base + SwizzledOffset<kChunks>(first + i, chunk), from + i * row_stride,
                first + i < rows);
  }
}

// 16 rows of a warp as A fragments, straight from memory: for what is read once. `row` is the
// thread's first one; rows from `length` on are zeros.
template <int kD>
__device__ inline void LoadRowFragments(std::uint32_t (&to)[kD / 16][4], const bf16* from,
                                        std::int64_t row_stride, int row, int length) {
  const int column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = row + i % 2 * 8;
      const bf16* pair = from + at * row_stride + step * 16 + i / 2 * 8 + column;
      to[step][i] = at < length ? *reinterpret_cast<const std::uint32_t*>(pair) : 0u;
    }
  }
}

// A warp's 16 rows of a swizzled tile to memory, from `row` on, those below `rows`.
template <int kD, int kRows>
__device__ inline void StoreTileRows(const bf16 (&tile)[kRows][kD], int row, int rows, bf16* out,
                                     std::int64_t row_stride) {
  constexpr int kChunks = kD / 8;
  const auto* base = reinterpret_cast<const std::byte*>(&tile);
#pragma unroll
  for (int i = threadIdx.x % 32; i < 16 * kChunks; i += 32) {
    const int r = row + i / kChunks;
    if (r >= rows) break;
    *reinterpret_cast<uint4*>(out + r * row_stride + i % kChunks * 8) =
        *reinterpret_cast<const uint4*>(base + SwizzledOffset<kChunks>(r, i % kChunks));
  }
}

}  // namespace slalom::cuda
