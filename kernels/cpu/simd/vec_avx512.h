// Sixteen floats in an AVX-512 register. Only for files compiled with AVX-512; see kernels.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/core/dtype.h"

namespace slalom::simd {

// Eight doubles.
struct WideAvx512 {
  static constexpr int kLanes = 8;
  __m512d v;

  static WideAvx512 Zero() { return {_mm512_setzero_pd()}; }
  static WideAvx512 Load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static WideAvx512 Load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  void Store(double* p) const { _mm512_storeu_pd(p, v); }
  void Store(float* p) const { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
  friend WideAvx512 operator+(WideAvx512 a, WideAvx512 b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend WideAvx512 operator-(WideAvx512 a, WideAvx512 b) { return {_mm512_sub_pd(a.v, b.v)}; }
};

struct VecAvx512 {
  static constexpr int kLanes = 16;
  using Wide = WideAvx512;
  __m512 v;

  static VecAvx512 Zero() { return {_mm512_setzero_ps()}; }
  static VecAvx512 Set(float x) { return {_mm512_set1_ps(x)}; }
  static VecAvx512 Load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static VecAvx512 Load(const BFloat16* p) {
    return Widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // The first n lanes, n in [1, 16); zeros elsewhere.
  static VecAvx512 LoadN(const float* p, int n) { return {_mm512_maskz_loadu_ps(Mask(n), p)}; }
  static VecAvx512 LoadN(const BFloat16* p, int n) {
    return Widen(_mm256_maskz_loadu_epi16(Mask(n), p));
  }
  void Store(float* p) const { _mm512_storeu_ps(p, v); }
  void Store(BFloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), Narrow()); }
  void StoreN(float* p, int n) const { _mm512_mask_storeu_ps(p, Mask(n), v); }
  void StoreN(BFloat16* p, int n) const { _mm256_mask_storeu_epi16(p, Mask(n), Narrow()); }

  friend VecAvx512 operator+(VecAvx512 a, VecAvx512 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend VecAvx512 operator-(VecAvx512 a, VecAvx512 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend VecAvx512 operator*(VecAvx512 a, VecAvx512 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend VecAvx512 operator/(VecAvx512 a, VecAvx512 b) { return {_mm512_div_ps(a.v, b.v)}; }
  // a * b + c, rounded once.
  static VecAvx512 Fma(VecAvx512 a, VecAvx512 b, VecAvx512 c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
  }
  // Where x is NaN the result is NaN.
  static VecAvx512 Max(VecAvx512 bound, VecAvx512 x) { return {_mm512_max_ps(bound.v, x.v)}; }
  static VecAvx512 Min(VecAvx512 bound, VecAvx512 x) { return {_mm512_min_ps(bound.v, x.v)}; }
  // The lanes >= n become `other`.
  static VecAvx512 Keep(VecAvx512 x, int n, VecAvx512 other) {
    return {_mm512_mask_mov_ps(other.v, Mask(n), x.v)};
  }
  // where x > 0: a, elsewhere b.
  static VecAvx512 IfPositive(VecAvx512 x, VecAvx512 a, VecAvx512 b) {
    return {_mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GT_OQ), a.v)};
  }
  // Lanes (1, 0, 3, 2, ...).
  VecAvx512 SwapPairs() const { return {_mm512_permute_ps(v, 0xB1)}; }
  // (a0, b0, a1, b1, ...) sign pattern (-, +, -, +, ...) applied to x.
  VecAvx512 NegateEven() const { return {_mm512_mask_sub_ps(v, 0x5555, _mm512_setzero_ps(), v)}; }
  // Eight floats, each twice.
  static VecAvx512 LoadTwice(const float* p) {
    const __m512i index = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return {_mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_loadu_ps(p)))};
  }
  float Sum() const { return _mm512_reduce_add_ps(v); }
  float Largest() const { return _mm512_reduce_max_ps(v); }
  static VecAvx512 Round(VecAvx512 x) { return {_mm512_roundscale_ps(x.v, 0x08)}; }
  // x * 2^n for integral n.
  static VecAvx512 Scale(VecAvx512 x, VecAvx512 n) { return {_mm512_scalef_ps(x.v, n.v)}; }

 private:
  static __mmask16 Mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static VecAvx512 Widen(__m256i half) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  // To nearest even; a NaN stays a (quiet) NaN.
  __m256i Narrow() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
};

}  // namespace slalom::simd
