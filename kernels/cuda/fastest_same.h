// Which of several kernels is the fastest among those that compute the same bits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>

namespace slalom::cuda {

// run(i) queues candidate i on `stream`, which writes all `bytes` at `out` (a multiple of 4) and
// reads nothing that it or another candidate writes; false: it cannot. The answer is 0, or a
// candidate whose result is candidate 0's bit for bit and which is clearly faster: so a choice
// that noise may turn can never turn a result. Runs every candidate a few times and waits for the
// device; `out` is left with some candidate's result. `sum`: 8 bytes of device memory. Throws
// what CUDA reports.
int FastestOfSame(cudaStream_t stream, int candidates, const std::function<bool(int)>& run,
                  const void* out, std::size_t bytes, void* sum);

}  // namespace slalom::cuda
