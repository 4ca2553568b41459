// The linear branch on tensor cores against the plain one in f32, on the same values.
#include "kernels/cuda/attention/linear_branch.h"

#include <gtest/gtest.h>

#include <string>

#include "tests/unit/kernels/cuda/kernel_test.h"

namespace slalom::cuda {
namespace {

struct Case {
  std::int64_t batch = 1, length = 64, heads = 1;
  int head_size = 128;
  Feature feature = Feature::kSoftmax;
  LinearScope scope = LinearScope::kAll;
  int block_q = 64, block_k = 64;
  bool project = true, accumulate = true;
};

class LinearBranchKernels : public KernelTest {
 protected:
  BlockMap RandomMap(const Case& c) {
    return MapOf(c.batch, c.heads, c.length, c.block_q, c.block_k, [&] { return random_() % 3; });
  }

  void Compare(const Case& c) {
    const Shape shape{c.batch, c.length, c.heads, c.head_size};
    const Tensor q = Random(shape), k = Random(shape), v = Random(shape), before = Random(shape);
    const Tensor angles = Random({c.length, c.head_size / 2});
    const Tensor weight = Random({c.head_size, c.head_size}, 0.2f), bias = Random({c.head_size});
    const BlockMap map = RandomMap(c);
    const auto run = [&](DType type, StateKernelKind kernel) {
      LinearBranchArgs args;
      args.q = Upload(q, type);
      args.k = Upload(k, type);
      args.v = Upload(v, type);
      args.feature = c.feature;
      if (c.feature == Feature::kRotatedRelu) {
        args.cos = Upload(angles, DType::kF32);
        args.sin = Upload(angles, DType::kF32);
      }
      args.scope = c.scope;
      args.map = &map;
      if (c.project) {
        args.proj_weight = Upload(weight, DType::kF32);
        args.proj_bias = Upload(bias, DType::kF32);
      }
      args.accumulate = c.accumulate;
      args.out = Upload(before, type);
      EXPECT_EQ(TensorCoreLinearBranchFits(args), type == DType::kBF16);
      type == DType::kBF16 ? TensorCoreLinearBranch(backend_->context(), args, kernel)
                           : LinearBranch(backend_->context(), args);
      return Download(args.out);
    };
    const auto expected = run(DType::kF32, StateKernelKind::kTensorCore);
    const std::string what = " B " + std::to_string(c.batch) + " L " + std::to_string(c.length) +
                             " H " + std::to_string(c.heads) + " D " + std::to_string(c.head_size) +
                             " feature " + std::to_string(static_cast<int>(c.feature)) + " scope " +
                             std::to_string(static_cast<int>(c.scope));
    ExpectNear(run(DType::kBF16, StateKernelKind::kTensorCore), expected, 0x1p-7f,
               "mma.sync," + what);
    if (ChooseStateKernel(backend_->context().compute_major) == StateKernelKind::kHopper) {
      ExpectNear(run(DType::kBF16, StateKernelKind::kHopper), expected, 0x1p-7f, "wgmma," + what);
    }
  }
};

TEST_F(LinearBranchKernels, OneTile) {
  for (const int head_size : {64, 128}) {
    Compare({.head_size = head_size, .project = false, .accumulate = false});
    Compare({.head_size = head_size});
  }
}

TEST_F(LinearBranchKernels, Features) {
  for (const Feature feature :
       {Feature::kSoftmax, Feature::kElu, Feature::kRelu, Feature::kRotatedRelu}) {
    Compare({.length = 200, .heads = 3, .head_size = 64, .feature = feature});
    Compare({.length = 200, .heads = 3, .feature = feature, .project = false});
  }
  for (const int head_size : {64, 128}) {
    Compare({.length = 777,
             .heads = 132,
             .head_size = head_size,
             .feature = Feature::kRotatedRelu,
             .project = false});
  }
}

TEST_F(LinearBranchKernels, ManyChunksOfKeys) {
  Compare({.batch = 2, .length = 2500, .heads = 2});
  Compare({.batch = 2, .length = 1, .heads = 2, .head_size = 64});
}

// More tiles than stages in one state, and states that end within a block of threads.
TEST_F(LinearBranchKernels, RingWrapsAround) {
  for (const int head_size : {64, 128}) {
    Compare({.length = 64 * 9 + 1, .heads = 132, .head_size = head_size});
    Compare({.length = 64 * 11 + 5,
             .heads = 132,
             .head_size = head_size,
             .scope = LinearScope::kNonCritical,
             .block_k = 128});
  }
}

TEST_F(LinearBranchKernels, Scopes) {
  for (const LinearScope scope : {LinearScope::kMarginal, LinearScope::kNonCritical}) {
    Compare({.batch = 2, .length = 700, .heads = 3, .head_size = 64, .scope = scope});
    Compare({.batch = 2, .length = 999, .heads = 2, .scope = scope, .block_q = 128});
    Compare({.length = 640, .heads = 2, .scope = scope, .block_q = 128, .block_k = 128});
    Compare({.length = 50, .scope = scope});
  }
}

// Blocks of 16 and other multiples of it: a tile does not reach beyond its block.
class LinearBranchSmallBlocks : public LinearBranchKernels,
                                public testing::WithParamInterface<Blocks> {};

TEST_P(LinearBranchSmallBlocks, Scopes) {
  for (const int head_size : {64, 128}) {
    for (const LinearScope scope : {LinearScope::kMarginal, LinearScope::kNonCritical}) {
      Compare({.batch = 2,
               .length = 501,
               .heads = 2,
               .head_size = head_size,
               .scope = scope,
               .block_q = GetParam().first,
               .block_k = GetParam().second});
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Blocks, LinearBranchSmallBlocks,
                         testing::Values(Blocks{16, 16}, Blocks{32, 16}, Blocks{16, 64},
                                         Blocks{48, 80}, Blocks{64, 16}, Blocks{96, 32}),
                         NameOfBlocks);

TEST_F(LinearBranchKernels, OneAndManySmallBlocks) {
  for (const int head_size : {64, 128}) {
    for (const LinearScope scope : {LinearScope::kMarginal, LinearScope::kNonCritical}) {
      Compare({.length = 2304,
               .heads = 2,
               .head_size = head_size,
               .scope = scope,
               .block_q = 16,
               .block_k = 16});
      Compare({.length = 7, .head_size = head_size, .scope = scope, .block_q = 16, .block_k = 16});
    }
  }
}

TEST(ChooseStateKernel, TakesWgmmaWhereItCan) {
  EXPECT_EQ(ChooseStateKernel(9), StateKernelKind::kHopper);
  EXPECT_EQ(ChooseStateKernel(8), StateKernelKind::kTensorCore);
}

}  // namespace
}  // namespace slalom::cuda
