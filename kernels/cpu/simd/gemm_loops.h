// Register-blocked matrix products over small tiles that lie in cache.
#pragma once

#include <cstdint>

#include "kernels/cpu/simd/kernels.h"

namespace slalom::simd {

// kRows rows times kVectors registers of columns.
template <typename V, int kRows, int kVectors>
inline __attribute__((always_inline)) void GemmBlock(const GemmTile& t, std::int64_t row,
                                                     std::int64_t column) {
  V acc[kRows][kVectors];
  float* c = t.c + row * t.ldc + column;
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = t.accumulate ? V::Load(c + r * t.ldc + v * V::kLanes) : V::Zero();
    }
  }
  const float* a = t.a + row * t.a_row;
  const float* b = t.b + column;
  for (std::int64_t k = 0; k < t.k; ++k, a += t.a_column, b += t.ldb) {
    V columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = V::Load(b + v * V::kLanes);
    for (int r = 0; r < kRows; ++r) {
      const V x = V::Set(a[r * t.a_row]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = V::Fma(x, columns[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) acc[r][v].Store(c + r * t.ldc + v * V::kLanes);
  }
}

template <typename V, int kRows, int kVectors>
std::int64_t GemmRows(const GemmTile& t, std::int64_t row) {
  constexpr std::int64_t kColumns = kVectors * V::kLanes;
  for (; row + kRows <= t.m; row += kRows) {
    std::int64_t column = 0;
    for (; column + kColumns <= t.n; column += kColumns) {
      GemmBlock<V, kRows, kVectors>(t, row, column);
    }
    for (; column < t.n; column += V::kLanes) GemmBlock<V, kRows, 1>(t, row, column);
  }
  return row;
}

template <typename V, int kRows, int kVectors>
void Gemm(const GemmTile& t) {
  std::int64_t row = GemmRows<V, kRows, kVectors>(t, 0);
  row = GemmRows<V, 4, kVectors>(t, row);
  row = GemmRows<V, 2, kVectors>(t, row);
  GemmRows<V, 1, kVectors>(t, row);
}

}  // namespace slalom::simd
