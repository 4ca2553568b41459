// TMA descriptors, made on the host.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

namespace slalom::cuda::hopper {

// A bf16 tensor of four dimensions, innermost first and dense there; boxes of it land in shared
// memory with the 128-byte swizzle when box[0] is 64, with the 64-byte swizzle when it is 32.
// `strides` counts elements between
// neighbours of dimensions 1 to 3, multiples of 8; `data` is aligned to 16 bytes. Throws
// Error(kInternal) on anything else, Error(kFailedPrecondition) when the driver has no TMA.
CUtensorMap MakeTensorMap(const void* data, const std::array<std::uint64_t, 4>& extents,
                          const std::array<std::uint64_t, 3>& strides,
                          const std::array<std::uint32_t, 4>& box);

// Rows [batch, length, heads, head_size], in boxes of 64 rows and 64 channels of one head; a box's
// coordinates are (channel, head, row, sample).
CUtensorMap MakeRowsMap(const void* data, std::int64_t batch, std::int64_t length,
                        std::int64_t heads, std::int64_t head_size);

}  // namespace slalom::cuda::hopper
