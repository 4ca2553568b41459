// Eight floats in an AVX2 register. Only for files compiled with AVX2 and FMA; see kernels.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/core/dtype.h"

namespace slalom::simd {

// Four doubles.
struct WideAvx2 {
  static constexpr int kLanes = 4;
  __m256d v;

  static WideAvx2 Zero() { return {_mm256_setzero_pd()}; }
  static WideAvx2 Load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static WideAvx2 Load(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
  void Store(double* p) const { _mm256_storeu_pd(p, v); }
  void Store(float* p) const { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
  friend WideAvx2 operator+(WideAvx2 a, WideAvx2 b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend WideAvx2 operator-(WideAvx2 a, WideAvx2 b) { return {_mm256_sub_pd(a.v, b.v)}; }
};

struct VecAvx2 {
  static constexpr int kLanes = 8;
  using Wide = WideAvx2;
  __m256 v;

  static VecAvx2 Zero() { return {_mm256_setzero_ps()}; }
  static VecAvx2 Set(float x) { return {_mm256_set1_ps(x)}; }
  static VecAvx2 Load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static VecAvx2 Load(const BFloat16* p) {
    return Widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // The first n lanes, n in [1, 8); zeros elsewhere.
  static VecAvx2 LoadN(const float* p, int n) { return {_mm256_maskload_ps(p, Mask(n))}; }
  static VecAvx2 LoadN(const BFloat16* p, int n) {
    alignas(16) std::uint16_t buffer[8] = {};
    for (int i = 0; i < n; ++i) buffer[i] = p[i].bits;
    return Widen(_mm_load_si128(reinterpret_cast<const __m128i*>(buffer)));
  }
  void Store(float* p) const { _mm256_storeu_ps(p, v); }
  void Store(BFloat16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), Narrow()); }
  void StoreN(float* p, int n) const { _mm256_maskstore_ps(p, Mask(n), v); }
  void StoreN(BFloat16* p, int n) const {
    alignas(16) std::uint16_t buffer[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(buffer), Narrow());
    for (int i = 0; i < n; ++i) p[i].bits = buffer[i];
  }

  friend VecAvx2 operator+(VecAvx2 a, VecAvx2 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend VecAvx2 operator-(VecAvx2 a, VecAvx2 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend VecAvx2 operator*(VecAvx2 a, VecAvx2 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend VecAvx2 operator/(VecAvx2 a, VecAvx2 b) { return {_mm256_div_ps(a.v, b.v)}; }
  // a * b + c, rounded once.
  static VecAvx2 Fma(VecAvx2 a, VecAvx2 b, VecAvx2 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  // Where x is NaN the result is NaN.
  static VecAvx2 Max(VecAvx2 bound, VecAvx2 x) { return {_mm256_max_ps(bound.v, x.v)}; }
  static VecAvx2 Min(VecAvx2 bound, VecAvx2 x) { return {_mm256_min_ps(bound.v, x.v)}; }
  // The lanes >= n become `other`.
  static VecAvx2 Keep(VecAvx2 x, int n, VecAvx2 other) {
    return {_mm256_blendv_ps(other.v, x.v, _mm256_castsi256_ps(Mask(n)))};
  }
  // where x > 0: a, elsewhere b.
  static VecAvx2 IfPositive(VecAvx2 x, VecAvx2 a, VecAvx2 b) {
    return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_GT_OQ))};
  }
  // Lanes (1, 0, 3, 2, ...).
  VecAvx2 SwapPairs() const { return {_mm256_permute_ps(v, 0xB1)}; }
  // The lanes 0, 2, 4, ... change sign.
  VecAvx2 NegateEven() const {
    const __m256 sign = _mm256_castsi256_ps(
        _mm256_set_epi32(0, INT32_MIN, 0, INT32_MIN, 0, INT32_MIN, 0, INT32_MIN));
    return {_mm256_xor_ps(v, sign)};
  }
  // Four floats, each twice.
  static VecAvx2 LoadTwice(const float* p) {
    const __m256i index = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
    return {_mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), index)};
  }
  float Sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  float Largest() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static VecAvx2 Round(VecAvx2 x) { return {_mm256_round_ps(x.v, 0x08)}; }
  // x * 2^n for integral n in [-252, 252], in two steps so that neither factor overflows.
  static VecAvx2 Scale(VecAvx2 x, VecAvx2 n) {
    const __m256i whole = _mm256_cvtps_epi32(n.v);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return {_mm256_mul_ps(_mm256_mul_ps(x.v, PowerOfTwo(half)),
                          PowerOfTwo(_mm256_sub_epi32(whole, half)))};
  }

 private:
  static __m256i Mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
  }
  static __m256 PowerOfTwo(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  static VecAvx2 Widen(__m128i half) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  // To nearest even; a NaN stays a (quiet) NaN.
  __m128i Narrow() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i chosen = _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
    const __m256i high = _mm256_srli_epi32(chosen, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
};

}  // namespace slalom::simd
