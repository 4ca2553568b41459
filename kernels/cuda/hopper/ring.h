// The place of a producer or a consumer in a ring of stages.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace slalom::cuda::hopper {

// Counts tiles. A stage's "full" barrier is awaited with `parity`; its "empty" barrier with the
// other one, which lets the first round of a fresh barrier pass.
template <int kStages>
struct Ring {
  int stage = 0;
  std::uint32_t parity = 0;
  __host__ __device__ constexpr void Next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace slalom::cuda::hopper
