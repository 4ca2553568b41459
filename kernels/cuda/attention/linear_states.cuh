// Sums of feature(k)^T v over chunks of keys: what the linear branch reduces keys and values to.
#pragma once

#include "kernels/core/tensor.h"
#include "kernels/cuda/attention/features.cuh"
#include "kernels/cuda/attention/linear_branch.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {

struct StateProblem {
  FeatureParameters features;
  const bf16* k = nullptr;  // [batch, length, heads, head_size]
  const bf16* v = nullptr;
  std::int64_t batch = 0, length = 0, heads = 0;
  int head_size = 0;
  int first_head = 0;  // of all samples' heads
  int chunk = 0;       // keys per state, a multiple of 16
  // [heads from first_head on, chunks, D + 1, D] f32 or bf16: rows 0 .. D - 1 of a chunk are its
  // sum of feature(k)^T v, row D is the sum of the normalisers.
  Tensor states;
};

// Blocks of threads that keep the device busy, for one sample's heads.
std::int64_t TensorCoreStateBlocks(const Context& context);
void TensorCoreStates(const Context& context, const StateProblem& problem);

// For chunks in multiples of 64.
std::int64_t HopperStateBlocks(const Context& context, int head_size);
void HopperStates(const Context& context, const StateProblem& problem);

// By `kernel` where it takes these chunks.
void RunStates(const Context& context, const StateProblem& problem, StateKernelKind kernel);

}  // namespace slalom::cuda
