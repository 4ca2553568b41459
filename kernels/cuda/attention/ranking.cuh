// Ranking a row of scores with one warp: classes of key blocks, and the list of the critical ones.
#pragma once

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/reduce.cuh"

namespace slalom::cuda {

inline constexpr auto kCriticalByte = static_cast<std::uint8_t>(BlockClass::kCritical);
inline constexpr auto kMarginalByte = static_cast<std::uint8_t>(BlockClass::kMarginal);
inline constexpr auto kNegligibleByte = static_cast<std::uint8_t>(BlockClass::kNegligible);

// An unsigned number that orders as the scores do; NaN counts as -infinity, -0 as 0.
__device__ inline std::uint32_t SortKey(float score) {
  const float value = isnan(score) ? -INFINITY : score + 0.0f;
  const std::uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The score of a sort key that is not 0.
__device__ inline float ScoreOf(std::uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The scores of one row as sort keys, spread over a warp: lane l has those of j = 32 i + l. They
// stay in registers when there are at most 32 * kPerLane; with kPerLane 0 there may be any number.
template <int kPerLane>
struct RowKeys {
  const float* scores;
  int count;
  std::uint32_t keys[kPerLane > 0 ? kPerLane : 1];

  __device__ RowKeys(const float* row, int n) : scores(row), count(n) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) keys[i] = Read(i);
  }
  __device__ int rounds() const { return kPerLane > 0 ? kPerLane : (count + 31) / 32; }
  // 0, which is below every score's key, for those beyond the end.
  __device__ std::uint32_t Key(int i) const {
    if constexpr (kPerLane > 0) {
      return keys[i];
    } else {
      return Read(i);
    }
  }

 private:
  __device__ std::uint32_t Read(int i) const {
    const int j = i * 32 + static_cast<int>(threadIdx.x % 32);
    return j < count ? SortKey(scores[j]) : 0u;
  }
};

// The first `wanted` of a row in the order (score descending, index ascending): those whose key is
// above `key`, and the first `ties` of those that have it, which no score need have.
struct Selection {
  int wanted;
  std::uint32_t key = 0;
  int ties = 0;
};

// reached[i] = how many keys of the row are at least least[i], which is not 0.
template <int kPerLane, int kCount>
__device__ inline void CountAtLeast(const RowKeys<kPerLane>& row,
                                    const std::uint32_t (&least)[kCount], int (&reached)[kCount]) {
#pragma unroll
  for (int c = 0; c < kCount; ++c) reached[c] = 0;
#pragma unroll
  for (int i = 0; i < row.rounds(); ++i) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) reached[c] += row.Key(i) >= least[c];
  }
#pragma unroll
  for (int c = 0; c < kCount; ++c) reached[c] = __reduce_add_sync(kFullWarp, reached[c]);
}

// Where to look for a score that exactly `wanted` reach: more reach `low`, fewer reach `high`.
struct Bracket {
  int wanted = 0;
  float low = 0.0f, high = 0.0f;
  int at_low = 0, at_high = 0;
  float guess = low;
  bool found = at_low == wanted;

  // Where the count would be right if it were linear; early on, and every other time, half as far
  // from the middle, because it is not. Seven or eight rounds for 512 normal scores.
  __device__ void Guess(int round) {
    if (found) return;
    const float share =
        __fdividef(static_cast<float>(at_low - wanted), static_cast<float>(at_low - at_high));
    const bool linear = round >= 6 && round % 2 == 0;
    guess = low + (high - low) * (linear ? share : 0.25f + 0.5f * share);
  }
  __device__ void Narrow(int reached) {
    found = reached == wanted;
    if (reached > wanted) low = guess, at_low = reached;
    if (reached < wanted) high = guess, at_high = reached;
  }
};

// Looks for keys that exactly as many scores reach as are wanted, in fewer rounds than bits take,
// and leaves the ones below. False where ties, or infinite scores, leave none.
template <int kPerLane, int kCount>
__device__ inline bool Guess(const RowKeys<kPerLane>& row, Selection (&selections)[kCount]) {
  constexpr int kGuesses = 16;
  std::uint32_t smallest = 0xffffffffu, largest = 0;
#pragma unroll
  for (int i = 0; i < row.rounds(); ++i) {
    const std::uint32_t key = row.Key(i);
    smallest = min(smallest, key - 1);  // 0, which is no score's, comes last
    largest = max(largest, key);
  }
  const float low = ScoreOf(__reduce_min_sync(kFullWarp, smallest) + 1);
  const float high = ScoreOf(__reduce_max_sync(kFullWarp, largest));
  if (!isfinite(high - low)) return false;
  Bracket brackets[kCount];
#pragma unroll
  for (int c = 0; c < kCount; ++c) brackets[c] = {selections[c].wanted, low, high, row.count};
  bool found = false;
#pragma unroll 1
  for (int round = 0; round < kGuesses && !found; ++round) {
    std::uint32_t least[kCount];
    int reached[kCount];
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      brackets[c].Guess(round);
      least[c] = SortKey(brackets[c].guess);
      selections[c].key = least[c] - 1;
    }
    CountAtLeast(row, least, reached);
    found = true;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      brackets[c].Narrow(reached[c]);
      found = found && brackets[c].found;
    }
  }
  return found;
}

// The largest key that at least `wanted` scores reach, bit by bit.
template <int kPerLane, int kCount>
__device__ inline void Bisect(const RowKeys<kPerLane>& row, Selection (&selections)[kCount]) {
  std::uint32_t keys[kCount];
  int reached[kCount];
#pragma unroll
  for (int c = 0; c < kCount; ++c) selections[c].key = 0;
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) keys[c] = selections[c].key | 1u << bit;
    CountAtLeast(row, keys, reached);
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      if (reached[c] >= selections[c].wanted) selections[c].key = keys[c];
    }
  }
  // No score's key is the largest number: key + 1 does not wrap.
#pragma unroll
  for (int c = 0; c < kCount; ++c) keys[c] = selections[c].key + 1;
  CountAtLeast(row, keys, reached);
#pragma unroll
  for (int c = 0; c < kCount; ++c) selections[c].ties = selections[c].wanted - reached[c];
}

// Which of the row's scores are within a selection, round after round of lanes.
template <bool kTies>
struct Members {
  Selection selection;
  int ties = 0;  // seen in earlier rounds

  __device__ bool Next(std::uint32_t key) {
    bool within = key > selection.key;
    if constexpr (kTies) {
      const unsigned equal = __ballot_sync(kFullWarp, key != 0 && key == selection.key);
      const unsigned before = equal & ((1u << threadIdx.x % 32) - 1);
      within = within || (key == selection.key && ties + __popc(before) < selection.ties);
      ties += __popc(equal);
    }
    return within;
  }
};

// With kCount 1 nothing is negligible.
template <int kPerLane, bool kTies, int kCount>
__device__ inline void WriteClasses(const RowKeys<kPerLane>& row,
                                    const Selection (&selections)[kCount], std::uint8_t* classes,
                                    std::int32_t* list) {
  const int lane = threadIdx.x % 32;
  Members<kTies> best{selections[0]}, kept{selections[kCount - 1]};
#pragma unroll
  for (int i = 0; i < row.rounds(); ++i) {
    const int j = i * 32 + lane;
    const std::uint32_t key = row.Key(i);
    const bool is_best = best.Next(key);
    const bool is_kept = kCount == 1 || kept.Next(key);
    const unsigned mask = __ballot_sync(kFullWarp, is_best);
    if (j < row.count) {
      classes[j] = is_best ? kCriticalByte : is_kept ? kMarginalByte : kNegligibleByte;
    }
    if (is_best) list[__popc(mask & ((1u << lane) - 1))] = j;
    list += __popc(mask);
  }
}

template <int kPerLane, int kCount>
__device__ inline void SelectAndWrite(const RowKeys<kPerLane>& row, Selection (&selections)[kCount],
                                      std::uint8_t* classes, std::int32_t* list) {
  if (Guess(row, selections)) {
    WriteClasses<kPerLane, false>(row, selections, classes, list);
  } else {
    Bisect(row, selections);
    WriteClasses<kPerLane, true>(row, selections, classes, list);
  }
}

// `classes` and `list` are the row's.
template <int kPerLane>
__device__ inline void ClassifyRow(const float* scores, int count, int critical, int negligible,
                                   std::uint8_t* classes, std::int32_t* list) {
  const RowKeys<kPerLane> row(scores, count);
  if (negligible == 0) {
    Selection selections[] = {{critical}};
    SelectAndWrite(row, selections, classes, list);
  } else {
    Selection selections[] = {{critical}, {count - negligible}};
    SelectAndWrite(row, selections, classes, list);
  }
}

}  // namespace slalom::cuda
