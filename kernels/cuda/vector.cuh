// Loads and stores of a few neighbouring elements at once, as floats.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace slalom::cuda {

using bf16 = __nv_bfloat16;

__device__ inline float ToFloat(float x) { return x; }
__device__ inline float ToFloat(bf16 x) { return __bfloat162float(x); }
template <typename T>
__device__ inline T FromFloat(float x);
template <>
__device__ inline float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 FromFloat<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two floats as a pair of bf16 in one register, `low` in the lower half.
__device__ inline std::uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(pair);
}
__device__ inline float2 UnpackBf16(std::uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}

// kWidth is 1, 2, 4 (floats only) or 8; with 4 and 8 the address must be a multiple of 16 bytes,
// with 2 of the pair's size.
template <int kWidth>
__device__ inline void LoadFloats(const float* from, float* to) {
  if constexpr (kWidth == 4) {
    const float4 a = *reinterpret_cast<const float4*>(from);
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
  } else if constexpr (kWidth == 8) {
    const float4 a = reinterpret_cast<const float4*>(from)[0];
    const float4 b = reinterpret_cast<const float4*>(from)[1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = from[i];
  }
}

template <int kWidth>
__device__ inline void LoadFloats(const bf16* from, float* to) {
  if constexpr (kWidth == 8) {
    const uint4 packed = *reinterpret_cast<const uint4*>(from);
    const float2 pairs[4] = {UnpackBf16(packed.x), UnpackBf16(packed.y), UnpackBf16(packed.z),
                             UnpackBf16(packed.w)};
#pragma unroll
    for (int i = 0; i < 4; ++i) to[2 * i] = pairs[i].x, to[2 * i + 1] = pairs[i].y;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = ToFloat(from[i]);
  }
}

template <int kWidth>
__device__ inline void StoreFloats(float* to, const float* from) {
  if constexpr (kWidth == 8) {
    reinterpret_cast<float4*>(to)[0] = make_float4(from[0], from[1], from[2], from[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(from[4], from[5], from[6], from[7]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = from[i];
  }
}

template <int kWidth>
__device__ inline void StoreFloats(bf16* to, const float* from) {
  if constexpr (kWidth == 8) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(PackBf16(from[0], from[1]), PackBf16(from[2], from[3]),
                   PackBf16(from[4], from[5]), PackBf16(from[6], from[7]));
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = FromFloat<bf16>(from[i]);
  }
}

// Eight neighbouring elements as they lie in memory; the address is a multiple of 16 bytes. Loading
// and widening are apart so that a thread can have many loads under way: widened at once, a load's
// registers are wanted for the next one, and that one waits.
template <typename T>
struct Packed8;
template <>
struct Packed8<float> {
  float4 low, high;
  __device__ void Load(const float* from) {
    low = reinterpret_cast<const float4*>(from)[0];
    high = reinterpret_cast<const float4*>(from)[1];
  }
  __device__ void Unpack(float* to) const {
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  }
};
template <>
struct Packed8<bf16> {
  uint4 bits;
  __device__ void Load(const bf16* from) { bits = *reinterpret_cast<const uint4*>(from); }
  __device__ void Unpack(float* to) const {
    const float2 pairs[4] = {UnpackBf16(bits.x), UnpackBf16(bits.y), UnpackBf16(bits.z),
                             UnpackBf16(bits.w)};
#pragma unroll
    for (int i = 0; i < 4; ++i) to[2 * i] = pairs[i].x, to[2 * i + 1] = pairs[i].y;
  }
};

// As LoadFloats, from what nothing writes while the kernel runs: such loads may overtake stores.
template <int kWidth>
__device__ inline void LoadConstants(const float* from, float* to) {
  if constexpr (kWidth % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      const float4 a = __ldg(reinterpret_cast<const float4*>(from + i));
      to[i] = a.x, to[i + 1] = a.y, to[i + 2] = a.z, to[i + 3] = a.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = __ldg(from + i);
  }
}

__device__ inline float GeluTanh(float x) {
  constexpr float kSqrt2OverPi = 0.7978845608028654f;
  return 0.5f * x * (1.0f + tanhf(kSqrt2OverPi * (x + 0.044715f * x * x * x)));
}
__device__ inline float Silu(float x) { return x / (1.0f + expf(-x)); }
// Good for results that are rounded to bf16, at a third of the instructions.
__device__ inline float FastSilu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

}  // namespace slalom::cuda
