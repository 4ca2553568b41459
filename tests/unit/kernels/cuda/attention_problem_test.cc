// One softmax attention as the kernels see it, and which of them takes it; on the host.
#include <gtest/gtest.h>

#include <cstdint>

#include "kernels/cuda/attention/problem.h"

namespace slalom::cuda {
namespace {

TEST(AttentionProblem, IsDenseAndTakesItsSizesFromTheTensors) {
  const Tensor q = Tensor::Host({2, 3, 5, 16}, DType::kBF16);
  const Tensor k = Tensor::Host({2, 7, 5, 16}, DType::kBF16),
               v = Tensor::Host(k.shape(), k.dtype());
  const Tensor out = Tensor::Host(q.shape(), q.dtype());
  const AttentionProblem problem = AttentionProblem::Of(q, k, v, out);
  EXPECT_EQ(problem.dtype, DType::kBF16);
  EXPECT_EQ(problem.q, q.raw());
  EXPECT_EQ(problem.k, k.raw());
  EXPECT_EQ(problem.v, v.raw());
  EXPECT_EQ(problem.out, out.raw());
  EXPECT_EQ(problem.batch, 2);
  EXPECT_EQ(problem.heads, 5);
  EXPECT_EQ(problem.q_length, 3);
  EXPECT_EQ(problem.k_length, 7);
  EXPECT_EQ(problem.head_size, 16);
  EXPECT_EQ(problem.scale, 0.25f);
  EXPECT_EQ(problem.list.indices, nullptr);
  EXPECT_EQ(problem.lse, nullptr);
  EXPECT_EQ(problem.relative_bias, nullptr);
}

TEST(ChooseAttentionKernel, TakesTheFastestThatCan) {
  AttentionProblem problem;
  problem.head_size = 128;
  EXPECT_EQ(ChooseAttentionKernel(problem, true, 9), AttentionKernel::kHopper);
  EXPECT_EQ(ChooseAttentionKernel(problem, true, 8), AttentionKernel::kTensorCore);
  EXPECT_EQ(ChooseAttentionKernel(problem, false, 9), AttentionKernel::kProduct);
  problem.head_size = 384;
  EXPECT_EQ(ChooseAttentionKernel(problem, true, 9), AttentionKernel::kProduct);
  problem.head_size = 7;
  EXPECT_EQ(ChooseAttentionKernel(problem, true, 9), AttentionKernel::kRow);
  problem.head_size = 64;
  const float bias = 0.0f;
  problem.relative_bias = &bias;
  EXPECT_EQ(ChooseAttentionKernel(problem, true, 9), AttentionKernel::kTensorCore);
  problem.relative_bias = nullptr;
  const std::int32_t index = 0;
  problem.list = {&index, &index, 1, 1, 128, 64};
  EXPECT_EQ(ChooseAttentionKernel(problem, true, 9), AttentionKernel::kHopper);
  problem.list.block_q = 48;
  EXPECT_EQ(ChooseAttentionKernel(problem, true, 9), AttentionKernel::kTensorCore);
  EXPECT_EQ(ChooseAttentionKernel(problem, false, 9), AttentionKernel::kRow);
  problem.list.block_q = 40;
  EXPECT_EQ(ChooseAttentionKernel(problem, true, 9), AttentionKernel::kRow);
  problem.list.block_q = 64;
  problem.dtype = DType::kF32;
  EXPECT_EQ(ChooseAttentionKernel(problem, true, 9), AttentionKernel::kRow);
}

}  // namespace
}  // namespace slalom::cuda
