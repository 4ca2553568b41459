// The keys of one query tile, as a sequence of blocks of 64, or of 16 where the list's blocks are
// smaller: what every main loop walks along.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention/problem.h"

namespace slalom::cuda {

inline constexpr int kKeyBlock = 64;
inline constexpr int kSmallKeyBlock = 16;

// Reads a BlockList in units of kUnit keys; list.block_k is a multiple of it. Lists ascend, so only
// the last unit can reach beyond the keys.
template <int kUnit>
struct KeyBlocksOf {
  const std::int32_t* indices = nullptr;  // of this query block; null: dense
  int units_per_block = 1;
  int count = 0;  // units with at least one key
  int k_length = 0;

  __host__ __device__ static KeyBlocksOf Dense(int k_length) {
    return {nullptr, 1, (k_length + kUnit - 1) / kUnit, k_length};
  }

  __host__ __device__ static KeyBlocksOf Listed(const BlockList& list, std::int64_t head_index,
                                                std::int64_t query_block, int k_length) {
    const std::int64_t row = head_index * list.query_blocks + query_block;
    const std::int32_t* indices = list.indices + row * list.capacity;
    const int blocks = list.counts[row];
    if (blocks == 0) return {indices, 1, 0, k_length};
    const int units = list.block_k / kUnit;
    const int keys_from_last = k_length - indices[blocks - 1] * list.block_k;
    const int last = (keys_from_last + kUnit - 1) / kUnit;
    return {indices, units, (blocks - 1) * units + (last < units ? last : units), k_length};
  }

  // The first key of unit i.
  __host__ __device__ int Start(int i) const {
    if (indices == nullptr) return i * kUnit;
    return (indices[i / units_per_block] * units_per_block + i % units_per_block) * kUnit;
  }
  // How many keys unit i has: kUnit, fewer in the ragged one, 0 beyond the end.
  __host__ __device__ int Keys(int i) const {
    if (i >= count) return 0;
    const int rest = k_length - Start(i);
    return rest < kUnit ? rest : kUnit;
  }
};
using KeyBlocks = KeyBlocksOf<kKeyBlock>;

// The key blocks of the query tile that starts at `first_row`; tiles do not straddle query blocks.
template <int kUnit = kKeyBlock>
__host__ __device__ inline KeyBlocksOf<kUnit> KeyBlocksOfTile(const BlockList& list, int k_length,
                                                              std::int64_t head_index,
                                                              int first_row) {
  if (list.indices == nullptr) return KeyBlocksOf<kUnit>::Dense(k_length);
  return KeyBlocksOf<kUnit>::Listed(list, head_index, first_row / list.block_q, k_length);
}

}  // namespace slalom::cuda
