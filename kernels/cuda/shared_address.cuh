// Addresses of shared memory as instructions want them.
#pragma once

#include <cstdint>

namespace slalom::cuda {

__device__ inline std::uint32_t SharedAddress(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace slalom::cuda
