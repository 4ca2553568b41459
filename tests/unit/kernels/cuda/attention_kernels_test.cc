// Each attention kernel against the simplest one in f32: any length, lists of key blocks, lse.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/cuda/attention/problem.h"
#include "tests/unit/kernels/cuda/kernel_test.h"

namespace slalom::cuda {
namespace {

struct Case {
  std::int64_t batch = 1, heads = 2, q_length = 64, k_length = 64;
  int head_size = 128;
  int block_q = 0, block_k = 0;  // 0: dense
  bool bias = false;
};

struct Result {
  std::vector<float> out, lse;
};

class AttentionKernels : public KernelTest {
 protected:
  Tensor UploadInts(const Shape& shape, const std::vector<std::int32_t>& values) {
    const Tensor host = Tensor::Host(shape, DType::kI32);
    std::copy(values.begin(), values.end(), host.data<std::int32_t>());
    return Upload(host, DType::kI32);
  }

  // Random, some rows empty or whole; until the next one is made.
  BlockList MakeList(const Case& c) {
    const std::int64_t query_blocks = (c.q_length + c.block_q - 1) / c.block_q;
    const std::int64_t key_blocks = (c.k_length + c.block_k - 1) / c.block_k;
    const std::int64_t rows = c.batch * c.heads * query_blocks;
    std::vector<std::int32_t> indices(static_cast<std::size_t>(rows * key_blocks), 1 << 20);
    std::vector<std::int32_t> counts(static_cast<std::size_t>(rows), 0);
    for (std::int64_t r = 0; r < rows; ++r) {
      const unsigned share = random_() % 5;  // of 4
      std::int32_t& count = counts[static_cast<std::size_t>(r)];
      for (std::int64_t j = 0; j < key_blocks; ++j) {
        if (random_() % 4 >= share) continue;
        indices[static_cast<std::size_t>(r * key_blocks + count++)] = static_cast<std::int32_t>(j);
      }
    }
    indices_ = UploadInts({rows * key_blocks}, indices);
    counts_ = UploadInts({rows}, counts);
    return {indices_.data<std::int32_t>(),
            counts_.data<std::int32_t>(),
            query_blocks,
            key_blocks,
            c.block_q,
            c.block_k};
  }

  // `bias` may be undefined, `list` without indices.
  Result Run(AttentionKernel kernel, const Tensor& q, const Tensor& k, const Tensor& v,
             const Tensor& bias = {}, const BlockList& list = {}) {
    const Tensor out = Poisoned(q.shape(), q.dtype());
    const Tensor lse = Poisoned({q.dim(0), q.dim(2), q.dim(1)}, DType::kF32);
    AttentionProblem problem = AttentionProblem::Of(q, k, v, out);
    problem.lse = lse.data<float>();
    problem.relative_bias = bias.defined() ? bias.data<float>() : nullptr;
    problem.list = list;
    RunAttention(backend_->context(), problem, kernel);
    return {Download(out), Download(lse)};
  }

  void Compare(const Case& c, AttentionKernel kernel) {
    const Shape q_shape{c.batch, c.q_length, c.heads, c.head_size};
    const Shape k_shape{c.batch, c.k_length, c.heads, c.head_size};
    const auto [q, q32] = RandomBoth(q_shape);
    const auto [k, k32] = RandomBoth(k_shape);
    const auto [v, v32] = RandomBoth(k_shape);
    Tensor bias;
    if (c.bias) bias = Upload(Random({c.heads, c.q_length + c.k_length - 1}), DType::kF32);
    const BlockList list = c.block_q > 0 ? MakeList(c) : BlockList{};
    const Result exact = Run(AttentionKernel::kRow, q32, k32, v32, bias, list);
    const Result result = Run(kernel, q, k, v, bias, list);
    // bf16 probabilities and one rounding of the result: 2^-8 of the largest output each.
    ExpectNear(result.out, exact.out, 0x1p-7f, Name(c));
    float lse_error = 0.0f;
    for (std::size_t i = 0; i < exact.lse.size(); ++i) {
      if (std::isinf(exact.lse[i])) {
        EXPECT_EQ(exact.lse[i], result.lse[i]) << Name(c) << " row " << i << " has no key";
      } else {
        lse_error = std::max(lse_error, std::abs(exact.lse[i] - result.lse[i]));
      }
    }
    EXPECT_LE(lse_error, 1e-3f) << Name(c);
  }

  static std::string Name(const Case& c) {
    return "B " + std::to_string(c.batch) + " H " + std::to_string(c.heads) + " Lq " +
           std::to_string(c.q_length) + " Lk " + std::to_string(c.k_length) + " D " +
           std::to_string(c.head_size) + " blocks " + std::to_string(c.block_q) + "x" +
           std::to_string(c.block_k);
  }

  Tensor indices_, counts_;
};

// From one tile to many: the first that fails says where to look.
class HopperAttentionSteps : public OnHopper<AttentionKernels> {
 protected:
  void CompareBoth(Case c) {
    for (const int head_size : {64, 128}) {
      c.head_size = head_size;
      Compare(c, AttentionKernel::kHopper);
    }
  }
};

TEST_F(HopperAttentionSteps, OneTile) { CompareBoth({1, 1, 128, 128}); }
TEST_F(HopperAttentionSteps, HalfATile) { CompareBoth({1, 1, 128, 64}); }
TEST_F(HopperAttentionSteps, RaggedTile) { CompareBoth({1, 1, 100, 50}); }
TEST_F(HopperAttentionSteps, TwoTiles) { CompareBoth({1, 1, 128, 256}); }
TEST_F(HopperAttentionSteps, RingWrapsAround) {
  for (int tiles = 3; tiles <= 9; ++tiles) CompareBoth({1, 1, 128, 128 * tiles});
}
TEST_F(HopperAttentionSteps, HeadsAndSamples) { CompareBoth({3, 5, 384, 384}); }
TEST_F(HopperAttentionSteps, ListsOfOneConsumer) { CompareBoth({1, 2, 640, 640, 0, 64, 64}); }
TEST_F(HopperAttentionSteps, ListsOfTwoConsumers) { CompareBoth({1, 2, 640, 640, 0, 128, 64}); }
// More than the device works on at once: a block of threads takes several.
TEST_F(HopperAttentionSteps, ManyTiles) { CompareBoth({1, 300, 200, 200}); }
TEST_F(HopperAttentionSteps, ManyTilesOfOneConsumer) { CompareBoth({2, 60, 640, 640, 0, 64, 64}); }
TEST_F(HopperAttentionSteps, ManyTilesOfTwoConsumers) {
  CompareBoth({2, 60, 640, 640, 0, 128, 64});
}

// Every kernel at every length, dense and, but for kProduct, by lists of blocks.
using AttentionLengths = KernelOn<AttentionKernels, AttentionKernel, std::int64_t>;

TEST_P(AttentionLengths, DenseAndLists) {
  const std::int64_t length = input();
  for (const int head_size : {64, 128}) {
    Compare({2, 3, length, length, head_size}, kernel());
    Compare({1, 2, length, 77, head_size}, kernel());
    Compare({1, 2, 77, length, head_size}, kernel());
    if (kernel() == AttentionKernel::kProduct) continue;
    Compare({2, 3, length, length, head_size, 64, 64}, kernel());
    Compare({2, 3, length, length, head_size, 128, 64}, kernel());
    Compare({1, 2, length, length, head_size, 128, 128}, kernel());
    Compare({1, 2, length, length, head_size, 64, 192}, kernel());
  }
}

std::string NameOfLength(const testing::TestParamInfo<AttentionLengths::ParamType>& info) {
  return std::to_string(std::get<1>(info.param));
}
const auto kLengths = testing::Values<std::int64_t>(1, 63, 64, 65, 127, 128, 129, 1000, 2176);
INSTANTIATE_TEST_SUITE_P(Hopper, AttentionLengths,
                         testing::Combine(testing::Values(AttentionKernel::kHopper), kLengths),
                         NameOfLength);
INSTANTIATE_TEST_SUITE_P(TensorCore, AttentionLengths,
                         testing::Combine(testing::Values(AttentionKernel::kTensorCore), kLengths),
                         NameOfLength);
INSTANTIATE_TEST_SUITE_P(Product, AttentionLengths,
                         testing::Combine(testing::Values(AttentionKernel::kProduct), kLengths),
                         NameOfLength);
// Goes 32 keys at a time, whatever the length: what a long row meets, a short one has met.
INSTANTIATE_TEST_SUITE_P(Row, AttentionLengths,
                         testing::Combine(testing::Values(AttentionKernel::kRow),
                                          testing::Values<std::int64_t>(1, 63, 64, 65, 127, 128,
                                                                        129, 300)),
                         NameOfLength);

// A warp for each 16 queries, in units of 16 keys: every multiple of 16 that is not one of 64.
class AttentionSmallBlocks : public AttentionKernels, public testing::WithParamInterface<Blocks> {};

TEST_P(AttentionSmallBlocks, TensorCore) {
  const auto [block_q, block_k] = GetParam();
  for (const int head_size : {64, 128}) {
    for (const std::int64_t length : {1, 15, 16, 17, 130, 1000}) {
      Compare({2, 3, length, length, head_size, block_q, block_k}, AttentionKernel::kTensorCore);
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Blocks, AttentionSmallBlocks,
                         testing::Values(Blocks{16, 16}, Blocks{32, 16}, Blocks{16, 32},
                                         Blocks{32, 32}, Blocks{48, 80}, Blocks{16, 64},
                                         Blocks{128, 16}),
                         NameOfBlocks);

TEST_F(AttentionKernels, TensorCoreManySmallBlocks) {
  for (const int head_size : {64, 128}) {
    Compare({2, 2, 2304, 2304, head_size, 16, 16}, AttentionKernel::kTensorCore);
    Compare({1, 60, 640, 640, head_size, 16, 16}, AttentionKernel::kTensorCore);
  }
}

TEST_F(AttentionKernels, TensorCoreWithBias) {
  for (const std::int64_t length : {1, 64, 65, 512}) {
    Compare({2, 3, length, length, 64, 0, 0, true}, AttentionKernel::kTensorCore);
    Compare({1, 2, length, 130, 128, 0, 0, true}, AttentionKernel::kTensorCore);
  }
}

TEST_F(AttentionKernels, ProductOfWideHeadsAndWithBias) {
  Compare({2, 1, 300, 300, 384}, AttentionKernel::kProduct);
  Compare({1, 2, 65, 65, 64, 0, 0, true}, AttentionKernel::kProduct);
}

// The same inputs give the same bits: a result that moves is a race.
TEST_F(HopperAttentionSteps, Repeats) {
  const Shape shape{1, 5000, 4, 128};
  const Tensor q = Upload(Random(shape), DType::kBF16), k = Upload(Random(shape), DType::kBF16);
  const Tensor v = Upload(Random(shape), DType::kBF16);
  const Result first = Run(AttentionKernel::kHopper, q, k, v);
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(Run(AttentionKernel::kHopper, q, k, v).out, first.out);
  }
}

}  // namespace
}  // namespace slalom::cuda
