// A transpose of 32-bit elements by 8 x 8 blocks in AVX registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace slalom::simd {

// Static, as everything in this file: one copy per instruction set.
static inline void TransposeBlock(const float* x, std::int64_t stride, float* out,
                                  std::int64_t out_stride) {
  __m256 row[8], pair[8], quad[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(x + i * stride);
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xEE);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_stride,
                     _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
  }
}

[[maybe_unused]] static void Transpose(const float* x, std::int64_t rows, std::int64_t columns,
                                       std::int64_t stride, float* out, std::int64_t out_stride) {
  const std::int64_t whole_rows = rows / 8 * 8;
  const std::int64_t whole_columns = columns / 8 * 8;
  for (std::int64_t r = 0; r < whole_rows; r += 8) {
    for (std::int64_t c = 0; c < whole_columns; c += 8) {
      TransposeBlock(x + r * stride + c, stride, out + c * out_stride + r, out_stride);
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
      __builtin_memcpy(out + c * out_stride + r, x + r * stride + c, sizeof(float));
    }
  }
}

}  // namespace slalom::simd
