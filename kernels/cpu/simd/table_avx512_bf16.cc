// Compiled with AVX-512 BF16 on top of AVX-512 F, BW, DQ and VL.
#include <immintrin.h>

#include <cstring>

#include "kernels/cpu/simd/kernels.h"

namespace slalom::simd {
namespace {

template <int kRows, int kVectors>
inline __attribute__((always_inline)) void PairBlock(const GemmTileBF16& t, std::int64_t row,
                                                     std::int64_t column) {
  __m512 acc[kRows][kVectors];
  float* c = t.c + row * t.ldc + column;
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = t.accumulate ? _mm512_loadu_ps(c + r * t.ldc + 16 * v) : _mm512_setzero_ps();
    }
  }
  const BFloat16* a = t.a + row * t.lda;
  const BFloat16* b = t.b + 2 * column;
  for (std::int64_t k = 0; k < t.k; k += 2, b += 2 * t.ldb) {
    __m512bh pairs[kVectors];
    for (int v = 0; v < kVectors; ++v) pairs[v] = (__m512bh)_mm512_loadu_si512(b + 32 * v);
    for (int r = 0; r < kRows; ++r) {
      std::int32_t pair;
      __builtin_memcpy(&pair, a + r * t.lda + k, sizeof(pair));
      const auto x = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, pairs[v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + r * t.ldc + 16 * v, acc[r][v]);
  }
}

template <int kRows>
std::int64_t PairRows(const GemmTileBF16& t, std::int64_t row) {
  for (; row + kRows <= t.m; row += kRows) {
    std::int64_t column = 0;
    for (; column + 32 <= t.n; column += 32) PairBlock<kRows, 2>(t, row, column);
    for (; column < t.n; column += 16) PairBlock<kRows, 1>(t, row, column);
  }
  return row;
}

void GemmPairs(const GemmTileBF16& t) {
  std::int64_t row = PairRows<8>(t, 0);
  row = PairRows<4>(t, row);
  row = PairRows<2>(t, row);
  PairRows<1>(t, row);
}

}  // namespace

const Kernels& Avx512Bf16Kernels() {
  static const Kernels kernels = [] {
    Kernels k = Avx512Kernels();
    k.gemm_bf16 = &GemmPairs;
    return k;
  }();
  return kernels;
}

}  // namespace slalom::simd
