// How wgmma is told where an operand lies in shared memory (PTX ISA, "Matrix descriptor"). Plain
// arithmetic, so that a test can follow it on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace slalom::cuda::hopper {

// A tile in the 128-byte swizzle that TMA writes: panels of 64 bf16 (128 bytes) per row, groups of
// 8 rows 1024 bytes apart. `address` is a shared memory address, panels are aligned to 1024 bytes;
// a step along a row is a larger address. For an operand whose rows run along the product's k
// ("transposed"), `panel_bytes` is the distance of two panels; for the others it is not used.
__host__ __device__ constexpr std::uint64_t SwizzledTile(std::uint32_t address,
                                                         std::uint32_t panel_bytes) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  constexpr std::uint64_t kRowGroup = std::uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kRowGroup | static_cast<std::uint64_t>(panel_bytes / 16) << 16 |
         static_cast<std::uint64_t>((address & 0x3ffffu) / 16);
}

// A tile whose rows are one row of a swizzle each, 128 or 64 bytes, not transposed: 8 neighbouring
// rows, then the next 8 `group_rows` rows further on. `address` may lie at any row: the swizzle is
// a matter of the addresses alone.
template <std::uint32_t kRowBytes>
__host__ __device__ constexpr std::uint64_t SwizzledRows(std::uint32_t address, int group_rows) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  constexpr std::uint64_t kSwizzle = std::uint64_t{kRowBytes == 128 ? 1 : 2} << 62;
  return kSwizzle | static_cast<std::uint64_t>(group_rows * kRowBytes / 16) << 32 |
         static_cast<std::uint64_t>((address & 0x3ffffu) / 16);
}

}  // namespace slalom::cuda::hopper
