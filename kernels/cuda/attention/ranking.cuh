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

// How many keys of the row are at least a, and at least b, which are not 0.
template <int kPerLane>
__device__ inline int2 CountAtLeast(const RowKeys<kPerLane>& row, std::uint32_t a,
                                    std::uint32_t b) {
  int above_a = 0, above_b = 0;
#pragma unroll
  for (int i = 0; i < row.rounds(); ++i) {
    above_a += row.Key(i) >= a;
    above_b += row.Key(i) >= b;
  }
  return make_int2(__reduce_add_sync(kFullWarp, above_a), __reduce_add_sync(kFullWarp, above_b));
}

// Where to look for a score that exactly `wanted` reach: more reach `low`, fewer reach `high`.
struct Bracket {
  int wanted;
  float low, high;
  int at_low, at_high = 0;
  float guess = low;
  bool found = at_low == wanted;

  // Where the count would be right if it were linear; early on, and every other time, half as far
  // from the middle, because it is not. Seven or eight rounds for 512 normal scores.
  __device__ void Guess(int round) {
    if (found) return;
    const float share = static_cast<float>(at_low - wanted) / static_cast<float>(at_low - at_high);
    const bool linear = round >= 6 && round % 2 == 0;
    guess = low + (high - low) * (linear ? share : 0.25f + 0.5f * share);
  }
  __device__ void Narrow(int reached) {
    found = reached == wanted;
    if (reached > wanted) low = guess, at_low = reached;
    if (reached < wanted) high = guess, at_high = reached;
  }
};

// Looks for keys that exactly as many scores reach as are wanted, in fewer rounds than bits take.
// False where ties, or infinite scores, leave none.
template <int kPerLane>
__device__ inline bool Guess(const RowKeys<kPerLane>& row, Selection& first, Selection& second) {
  constexpr int kGuesses = 16;
  std::uint32_t smallest = 0xffffffffu, largest = 0;
#pragma unroll
  for (int i = 0; i < row.rounds(); ++i) {
    const std::uint32_t key = row.Key(i);
    smallest = min(smallest, key == 0 ? 0xffffffffu : key);
    largest = max(largest, key);
  }
  const float low = ScoreOf(__reduce_min_sync(kFullWarp, smallest));
  const float high = ScoreOf(__reduce_max_sync(kFullWarp, largest));
  if (!isfinite(high - low)) return false;
  Bracket a{first.wanted, low, high, row.count}, b{second.wanted, low, high, row.count};
#pragma unroll 1
  for (int i = 0; i < kGuesses && !(a.found && b.found); ++i) {
    a.Guess(i);
    b.Guess(i);
    const int2 reached = CountAtLeast(row, SortKey(a.guess), SortKey(b.guess));
    a.Narrow(reached.x);
    b.Narrow(reached.y);
  }
  first.key = SortKey(a.guess);
  second.key = SortKey(b.guess);
  return a.found && b.found;
}

// The largest key that at least `wanted` scores reach, bit by bit.
template <int kPerLane>
__device__ inline void Bisect(const RowKeys<kPerLane>& row, Selection& first, Selection& second) {
  first.key = second.key = 0;
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit) {
    const std::uint32_t a = first.key | 1u << bit, b = second.key | 1u << bit;
    const int2 reached = CountAtLeast(row, a, b);
    if (reached.x >= first.wanted) first.key = a;
    if (reached.y >= second.wanted) second.key = b;
  }
}

template <int kPerLane>
__device__ inline void Select(const RowKeys<kPerLane>& row, Selection& first, Selection& second) {
  if (!Guess(row, first, second)) Bisect(row, first, second);
  // No score's key is the largest number: key + 1 does not wrap.
  const int2 above = CountAtLeast(row, first.key + 1, second.key + 1);
  first.ties = first.wanted - above.x;
  second.ties = second.wanted - above.y;
}

// `classes` and `list` are the row's.
template <int kPerLane>
__device__ inline void ClassifyRow(const float* scores, int count, int critical, int negligible,
                                   std::uint8_t* classes, std::int32_t* list) {
  const int lane = threadIdx.x % 32;
  const unsigned before = (1u << lane) - 1;
  const RowKeys<kPerLane> row(scores, count);
  Selection best{critical}, kept{count - negligible};
  Select(row, best, kept);
  int best_ties = 0, kept_ties = 0, listed = 0;
#pragma unroll
  for (int i = 0; i < row.rounds(); ++i) {
    const int j = i * 32 + lane;
    const std::uint32_t key = row.Key(i);
    const unsigned best_equal = __ballot_sync(kFullWarp, j < count && key == best.key);
    const unsigned kept_equal = __ballot_sync(kFullWarp, j < count && key == kept.key);
    const auto within = [&](const Selection& selection, unsigned equal, int ties) {
      return key > selection.key ||
             (key == selection.key && ties + __popc(equal & before) < selection.ties);
    };
    const bool is_best = j < count && within(best, best_equal, best_ties);
    const unsigned best_mask = __ballot_sync(kFullWarp, is_best);
    if (j < count) {
      classes[j] = is_best                               ? kCriticalByte
                   : within(kept, kept_equal, kept_ties) ? kMarginalByte
                                                         : kNegligibleByte;
    }
    if (is_best) list[listed + __popc(best_mask & before)] = j;
    best_ties += __popc(best_equal);
    kept_ties += __popc(kept_equal);
    listed += __popc(best_mask);
  }
}

}  // namespace slalom::cuda
