// Tiles of tokens in shared memory for the linear branch's mma.sync kernels, and their fragments:
// each warp has 16 rows, a thread rows lane / 4 and lane / 4 + 8, its two halves.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention/features.cuh"
#include "kernels/cuda/attention/mma_tiles.cuh"
#include "kernels/cuda/fragments.cuh"

namespace slalom::cuda::linear_tiles {

inline constexpr int kTile = 64;      // tokens in shared memory at once
inline constexpr int kWarpRows = 16;  // of a tile, that a warp has

// Rows of a tile that are used where blocks of `block` rows, a multiple of kWarpRows, have a matrix
// each: a tile does not reach beyond its block.
constexpr int TileRows(int block) {
  return block % kTile == 0 ? kTile : block % (kTile / 2) == 0 ? kTile / 2 : kWarpRows;
}

// sums = a m for m [kD (k), kD (n)], or a m^T with kTransposed.
template <int kD, bool kTransposed>
__device__ inline void Multiply(const std::uint32_t (&a)[kD / 16][4], const bf16 (&m)[kD][kD],
                                float (&sums)[kD / 8][4]) {
  const FragmentReader<kTransposed ? Operand::kRightTransposed : Operand::kRight, kD> matrix(m);
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) sums[i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
#pragma unroll
    for (int pair = 0; pair < kD / 16; ++pair) {
      std::uint32_t b[4];
      matrix.Load(b, (kTransposed ? pair : step) * 16, (kTransposed ? step : pair) * 16);
      Mma16x16x16(sums[2 * pair], sums[2 * pair + 1], a[step], b);
    }
  }
}

// 16 rows of a swizzled tile from `row` on, as operands.
template <int kD>
__device__ inline void LoadFragments(std::uint32_t (&a)[kD / 16][4], const bf16 (&tile)[kTile][kD],
                                     int row) {
  const FragmentReader<Operand::kLeft, kD> rows(tile, row);
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) rows.Load(a[step], 0, step * 16);
}

// A half's channels: of register step * 16 + 2 * (lane % 4), the next, and 8 further for the
// second.
template <int kD>
__device__ inline void UnpackHalf(const std::uint32_t (&a)[kD / 16][4], int half,
                                  float (&x)[kD / 4]) {
#pragma unroll
  for (int i = 0; i < kD / 8; ++i) {
    const float2 pair = UnpackBf16(a[i / 2][i % 2 * 2 + half]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

// Features as they meet a matrix, rotated where they are to be.
template <int kD>
__device__ inline void RotateAndPackHalf(const FeatureParameters& p, std::int64_t token,
                                         float (&x)[kD / 4], int half,
                                         std::uint32_t (&a)[kD / 16][4]) {
  if (p.feature == Feature::kRotatedRelu) {
    const std::int64_t angle = token * (kD / 2) + threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kD / 8; ++i) {
      RotatePair(p.cos[angle + i * 4], p.sin[angle + i * 4], x[2 * i], x[2 * i + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < kD / 8; ++i) a[i / 2][i % 2 * 2 + half] = PackBf16(x[2 * i], x[2 * i + 1]);
}

}  // namespace slalom::cuda::linear_tiles
