// Where TMA puts the bytes of a box in shared memory: what its swizzles mean, by the CUDA driver
// API's description of CUtensorMapSwizzle.
#pragma once

#include <cstdint>

namespace slalom::cuda {

// Rows of `row_bytes` (64 or 128) lie one after the other, from an address aligned to 1024 bytes;
// within them, 16-byte chunks change places by the number of their 128-byte line.
constexpr std::uint32_t SwizzledByte(std::uint32_t offset, int row_bytes) {
  const std::uint32_t mask = row_bytes == 128 ? 7 : 3;
  return offset ^ ((offset >> 7 & mask) << 4);
}

}  // namespace slalom::cuda
