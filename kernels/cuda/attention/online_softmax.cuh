// Online softmax over score fragments that lie in registers as tensor cores leave them: each thread
// has two rows; element 4 j + 2 r + {0, 1} is row r, columns 8 j + 2 * (lane % 4) + {0, 1}. Four
// neighbouring lanes share a row.
#pragma once

#include <cstdint>

#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {

__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct OnlineSoftmax {
  // How far, in powers of two, scores may rise above `max` before it follows. Probabilities up to
  // 2^8 lose nothing in bf16 and f32, and as long as `max` rests the output needs no correction:
  // that saves a pass over its registers for almost every tile.
  static constexpr float kSlack = 8.0f;

  float scale_log2 = 0.0f;                // scale * log2(e), positive
  float max[2] = {-INFINITY, -INFINITY};  // at least the largest score so far, less the slack
  float sum[2] = {0.0f, 0.0f};            // this lane's columns only, until Finish

  OnlineSoftmax() = default;
  __device__ explicit OnlineSoftmax(float scale) : scale_log2(scale * 1.4426950408889634f) {}

  // Turns scores into exp(scale * (score - max)) and says by what earlier sums and outputs are to
  // be multiplied: exactly 1 where max has not moved. At least one score per row is finite, here or
  // earlier.
  template <int kCount>
  __device__ void Update(float (&scores)[kCount], float (&correction)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      correction[r] = RaiseRow(r, scores);
      const float total = ExponentiateRow(r, scores);
      sum[r] = sum[r] * correction[r] + total;
    }
  }

  // The same in two halves, the second one part of the scores after the other.
  template <int kCount>
  __device__ void Raise(const float (&scores)[kCount], float (&correction)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      correction[r] = RaiseRow(r, scores);
      sum[r] *= correction[r];
    }
  }
  template <int kCount>
  __device__ void Exponentiate(float (&scores)[kCount]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] += ExponentiateRow(r, scores);
  }

  // Sums over the row's four lanes.
  __device__ void Finish() {
    sum[0] = GroupSum<4>(sum[0]);
    sum[1] = GroupSum<4>(sum[1]);
  }
  // Natural log of the row's sum of exp(scale * score); after Finish.
  __device__ float LogSumExp(int r) const {
    return max[r] * scale_log2 * 0.6931471805599453f + logf(sum[r]);
  }

 private:
  template <int kCount>
  __device__ float RaiseRow(int r, const float (&scores)[kCount]) {
    float largest = max[r];
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      largest = fmaxf(largest, fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]));
    }
    largest = GroupMax<4>(largest);
    if ((largest - max[r]) * scale_log2 <= kSlack) largest = max[r];
    const float correction = Exp2((max[r] - largest) * scale_log2);
    max[r] = largest;
    return correction;
  }
  template <int kCount>
  __device__ float ExponentiateRow(int r, float (&scores)[kCount]) const {
    const float offset = max[r] * scale_log2;
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[4 * j + 2 * r + i];
        score = Exp2(fmaf(score, scale_log2, -offset));
        total += score;
      }
    }
    return total;
  }
};

// Multiplies the output rows that are held like the scores.
template <int kCount>
__device__ inline void ScaleRows(float (&values)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    values[4 * j] *= factor[0];
    values[4 * j + 1] *= factor[0];
    values[4 * j + 2] *= factor[1];
    values[4 * j + 3] *= factor[1];
  }
}

// The same with corrections of OnlineSoftmax, which are mostly 1. All lanes of a warp come
// together.
template <int kCount>
__device__ inline void CorrectRows(float (&values)[kCount], const float (&correction)[2]) {
  if (__any_sync(kFullWarp, correction[0] != 1.0f || correction[1] != 1.0f)) {
    ScaleRows(values, correction);
  }
}

// Probabilities as bf16 A fragments: steps of 16 keys of 4 registers each.
template <int kCount>
__device__ inline void PackProbabilities(const float (&scores)[kCount],
                                         std::uint32_t (&packed)[kCount / 8][4]) {
#pragma unroll
  for (int step = 0; step < kCount / 8; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      packed[step][i] = PackBf16(scores[8 * step + 2 * i], scores[8 * step + 2 * i + 1]);
    }
  }
}

// Writes a thread's part of a 16-row output tile, 16 bytes at a time: four lanes transpose their
// 4 x 4 pairs, so that each holds 8 neighbouring columns. `row` points to the tile's row lane / 4,
// `second` to the one 8 below; null where there is no such row.
template <int kCount>
__device__ inline void StoreRows(const float (&values)[kCount], bf16* row, bf16* second) {
  const int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    bf16* const to = r == 0 ? row : second;
#pragma unroll
    for (int group = 0; group < kCount / 16; ++group) {  // 32 columns
      std::uint32_t pair[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 4 * (4 * group + j) + 2 * r;
        pair[j] = PackBf16(values[at], values[at + 1]);
      }
      // Two rounds of a butterfly: lanes one apart swap odd and even, lanes two apart swap halves.
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const bool odd = quad_lane & 1;
        const std::uint32_t got = __shfl_xor_sync(kFullWarp, odd ? pair[j] : pair[j + 1], 1);
        if (odd) {
          pair[j] = got;
        } else {
          pair[j + 1] = got;
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const bool upper = quad_lane & 2;
        const std::uint32_t got = __shfl_xor_sync(kFullWarp, upper ? pair[j] : pair[j + 2], 2);
        if (upper) {
          pair[j] = got;
        } else {
          pair[j + 2] = got;
        }
      }
      if (to != nullptr) {
        *reinterpret_cast<uint4*>(to + 32 * group + 8 * quad_lane) =
            make_uint4(pair[0], pair[1], pair[2], pair[3]);
      }
    }
  }
}

}  // namespace slalom::cuda
