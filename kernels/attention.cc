#include "kernels/attention.h"

#include <algorithm>
#include <cmath>

namespace slalom {

std::int64_t CriticalBlocks(double topk, std::int64_t key_blocks) {
  const auto wanted = static_cast<std::int64_t>(std::floor(topk * static_cast<double>(key_blocks)));
  return std::clamp<std::int64_t>(wanted, 1, key_blocks);
}

std::int64_t NegligibleBlocks(double negligible, std::int64_t key_blocks, std::int64_t critical) {
  const auto wanted =
      static_cast<std::int64_t>(std::floor(negligible * static_cast<double>(key_blocks)));
  return std::clamp<std::int64_t>(wanted, 0, key_blocks - critical);
}

}  // namespace slalom
