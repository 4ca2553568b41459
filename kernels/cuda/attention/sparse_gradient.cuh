// What the kernels of the sparse branch's gradients share.
#pragma once

#include "kernels/cuda/attention/backward.h"
#include "kernels/cuda/attention/key_blocks.cuh"
#include "kernels/cuda/check.h"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;

struct SparseGradientParameters {
  const bf16 *q, *k, *v, *d_out;
  const float *lse, *delta;
  bf16 *d_q, *d_k, *d_v;
  bool accumulate;
  int heads, length;
  float scale;
  BlockList list;  // of the side that the kernel owns

  // By key block: the lists of queries; else of keys.
  static SparseGradientParameters Of(const SparseGradientProblem& problem, bool by_key_block) {
    return {static_cast<const bf16*>(problem.q),
            static_cast<const bf16*>(problem.k),
            static_cast<const bf16*>(problem.v),
            static_cast<const bf16*>(problem.d_out),
            problem.lse,
            problem.delta,
            static_cast<bf16*>(problem.d_q),
            static_cast<bf16*>(problem.d_k),
            static_cast<bf16*>(problem.d_v),
            problem.accumulate,
            static_cast<int>(problem.heads),
            static_cast<int>(problem.length),
            problem.scale,
            by_key_block ? problem.queries : problem.keys};
  }
};

// Grid (tiles of `rows` rows, heads, samples).
template <typename Kernel, typename... Arguments>
void LaunchSparseGradient(const Context& context, const SparseGradientProblem& problem,
                          Kernel kernel, int threads, std::size_t shared_bytes, int rows,
                          const Arguments&... arguments) {
  Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        "SparseGradient: shared memory");
  const dim3 grid(static_cast<unsigned>((problem.length + rows - 1) / rows),
                  static_cast<unsigned>(problem.heads), static_cast<unsigned>(problem.batch));
  kernel<<<grid, threads, shared_bytes, context.stream>>>(arguments...);
  CheckLaunch("SparseGradient");
}

}  // namespace slalom::cuda
