// What the sparse attentions share about block maps.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/check.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd/kernels.h"

namespace slalom {

// Throws unless the map is there and fits [batch, length, heads].
void CheckMap(const Check& check, const BlockMap* map, std::int64_t batch, std::int64_t heads,
              std::int64_t length);

// The critical key blocks of one query block: row (b * H + h) * Nq + i of the map.
inline std::span<const std::int32_t> CriticalList(const BlockMap& map, std::int64_t row) {
  return {map.critical.data<std::int32_t>() + row * map.critical.dim(3),
          static_cast<std::size_t>(map.counts.data<std::int32_t>()[row])};
}

// Whether SLA's linear branch sums over a key block of that class.
inline bool InScope(LinearScope scope, BlockClass block_class) {
  return scope == LinearScope::kAll || block_class == BlockClass::kMarginal ||
         (scope == LinearScope::kNonCritical && block_class == BlockClass::kNegligible);
}

// means [B, blocks, width] f32: of x's rows [B, L, width], `block` at a time.
void PoolBlocks(const simd::Kernels& kernels, const Parallel& parallel, const Tensor& x,
                std::int64_t width, std::int64_t block, const Tensor& means);

// The token at each position of the order (y, x, t) that the second half of a window map's heads
// use.
std::vector<std::int32_t> WindowOrder(const TokenGrid& grid);

}  // namespace slalom
