// The features that the linear branch takes of a token's channels, held in registers.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention/linear_branch.h"
#include "kernels/cuda/reduce.cuh"

namespace slalom::cuda {

// What the normaliser is added to before anything is divided by it.
inline constexpr float kNormaliserEpsilon = 1e-5f;

struct FeatureParameters {
  Feature feature;
  const float* cos;  // [L, D / 2] or null
  const float* sin;
};

// Features of kCount channels of one token; the token's others are with the kLanes lanes around.
template <int kLanes, int kCount>
__device__ inline void MapFeatures(Feature feature, float (&x)[kCount]) {
  if (feature == Feature::kSoftmax) {
    float max = x[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) max = fmaxf(max, x[i]);
    max = GroupMax<kLanes>(max);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += x[i] = __expf(x[i] - max);
    const float inverse = 1.0f / GroupSum<kLanes>(sum);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] *= inverse;
  } else if (feature == Feature::kElu) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = x[i] > 0.0f ? x[i] + 1.0f : __expf(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = fmaxf(x[i], 0.0f);
  }
}

__device__ inline void RotatePair(float c, float s, float& even, float& odd) {
  const float turned = even * c - odd * s;
  odd = even * s + odd * c;
  even = turned;
}

}  // namespace slalom::cuda
