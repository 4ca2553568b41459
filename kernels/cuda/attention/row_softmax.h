// Softmax over rows of scores that lie in memory: the middle of ProductAttention.
#pragma once

#include <cstdint>

#include "kernels/core/dtype.h"
#include "kernels/cuda/context.h"

namespace slalom::cuda {

// probabilities = softmax(scores + bias) for `rows` query rows from `first_row` on. Rows lie
// row_stride elements apart, heads head_stride, in both; they may be the same memory in f32.
struct RowSoftmaxArgs {
  const float* scores = nullptr;  // already scaled
  void* probabilities = nullptr;
  DType type = DType::kF32;              // of the probabilities
  const float* relative_bias = nullptr;  // [H, Lq + Lk - 1] or null
  float* lse = nullptr;                  // [H, Lq] or null
  std::int64_t heads = 0, rows = 0, first_row = 0;
  std::int64_t head_stride = 0, row_stride = 0;
  std::int64_t q_length = 0, k_length = 0;
};

void RowSoftmax(const Context& context, const RowSoftmaxArgs& args);

}  // namespace slalom::cuda
