// Sums of linear attention's states, over lists of blocks.
#pragma once

#include <cstdint>

#include "kernels/cpu/simd/kernels.h"

namespace slalom::simd {

// kVectors registers of doubles: their sums stay there while the lists go by.
template <typename W, int kVectors>
inline __attribute__((always_inline)) void SumStateChunk(const StateSum& s, std::int64_t at) {
  W sum[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    sum[v] = s.from != nullptr ? W::Load(s.from + at + v * W::kLanes) : W::Zero();
  }
  for (std::int64_t i = 0; i < s.added_count; ++i) {
    const float* state = s.states + s.added[i] * s.stride + at;
    for (int v = 0; v < kVectors; ++v) sum[v] = sum[v] + W::Load(state + v * W::kLanes);
  }
  for (std::int64_t i = 0; i < s.removed_count; ++i) {
    const float* state = s.states + s.removed[i] * s.stride + at;
    for (int v = 0; v < kVectors; ++v) sum[v] = sum[v] - W::Load(state + v * W::kLanes);
  }
  for (int v = 0; v < kVectors; ++v) {
    sum[v].Store(s.sum + at + v * W::kLanes);
    if (s.rounded != nullptr) sum[v].Store(s.rounded + at + v * W::kLanes);
  }
}

template <typename W>
void SumStates(const StateSum& s) {
  constexpr std::int64_t kVectors = 8;
  std::int64_t at = 0;
  for (; at + kVectors * W::kLanes <= s.count; at += kVectors * W::kLanes) {
    SumStateChunk<W, kVectors>(s, at);
  }
  for (; at < s.count; at += W::kLanes) SumStateChunk<W, 1>(s, at);
}

}  // namespace slalom::simd
