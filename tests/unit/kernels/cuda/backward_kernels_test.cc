// Each of the gradients' kernels against the one with a warp per row, in f32.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "kernels/cuda/attention/backward.h"
#include "kernels/cuda/attention/problem.h"
#include "tests/unit/kernels/cuda/kernel_test.h"

namespace slalom::cuda {
namespace {

struct Case {
  std::int64_t batch = 1, heads = 1, length = 64;
  int head_size = 128, block_q = 64, block_k = 64;
  int share = 2;  // of 4: how many blocks are critical; 5: all
};

std::string Name(const Case& c) {
  return "B " + std::to_string(c.batch) + " H " + std::to_string(c.heads) + " L " +
         std::to_string(c.length) + " D " + std::to_string(c.head_size) + " blocks " +
         std::to_string(c.block_q) + "x" + std::to_string(c.block_k);
}

class BackwardTest : public KernelTest {
 protected:
  BlockMap RandomMap(const Case& c) {
    return MapOf(c.batch, c.heads, c.length, c.block_q, c.block_k, [&] {
      const bool critical = c.share >= 5 || static_cast<int>(random_() % 4) < c.share;
      return critical ? 1 : random_() % 2 * 2;
    });
  }

  // P, dS and the result are rounded to bf16.
  void ExpectClose(const Tensor& actual, const Tensor& exact, const std::string& what,
                   float floor = 0.0f) {
    ExpectNear(Download(actual), Download(exact), 0x1p-6f, what, floor);
  }

  // dS = P (dP - delta) is zero for a query with one key, but for the f32 roundings of two sums of
  // products over the channels, each in its own order. How much of that one such query leaves in a
  // gradient: times the largest of what dS is multiplied with.
  float CancelledSums(const Case& c, const Both& v, const Both& d_out, const Both& factor) {
    const std::vector<float> a = Download(v.wide), b = Download(d_out.wide);
    float terms = 0.0f, largest = 0.0f;
    for (std::size_t row = 0; row < a.size(); row += c.head_size) {
      float sum = 0.0f;
      for (int d = 0; d < c.head_size; ++d) sum += std::abs(a[row + d] * b[row + d]);
      terms = std::max(terms, sum);
    }
    for (const float x : Download(factor.wide)) largest = std::max(largest, std::abs(x));
    return 0x1p-23f * terms * largest / std::sqrt(static_cast<float>(c.head_size));
  }

  struct Gradients {
    Tensor q, k, v;
  };

  // `accumulate`: on top of ones.
  Gradients RunSparse(const Case& c, GradientKernel kernel, DType type, const Both& q,
                      const Both& k, const Both& v, const Both& d_out, const BlockMap& map,
                      bool accumulate) {
    const Shape shape{c.batch, c.length, c.heads, c.head_size};
    const Context& context = backend_->context();
    const QueryLists queries = MakeQueryLists(context, map);
    SparseGradientProblem problem =
        MakeSparseGradient(q.as(type), k.as(type), v.as(type), d_out.as(type), map, queries);
    const Tensor out = backend_->Allocate(shape, DType::kF32);
    const Tensor lse = backend_->Allocate({c.batch, c.heads, c.length}, DType::kF32);
    const Tensor delta = backend_->Allocate(lse.shape(), DType::kF32);
    // lse and delta are the same for all kernels.
    AttentionProblem forward;
    forward.dtype = DType::kF32;
    forward.q = q.wide.raw();
    forward.k = k.wide.raw();
    forward.v = v.wide.raw();
    forward.out = out.raw();
    forward.lse = lse.data<float>();
    forward.batch = c.batch;
    forward.heads = c.heads;
    forward.q_length = forward.k_length = c.length;
    forward.head_size = c.head_size;
    forward.scale = problem.scale;
    forward.list = problem.keys;
    RunAttention(context, forward, AttentionKernel::kRow);
    DeltaArgs rows;
    rows.out = out;
    rows.d_out = d_out.wide;
    rows.delta = delta;
    SparseDelta(context, rows);
    problem.lse = lse.data<float>();
    problem.delta = delta.data<float>();
    Gradients result;
    for (Tensor* x : {&result.q, &result.k, &result.v}) {
      *x = Filled(shape, type, accumulate ? 1.0f : NAN);
    }
    problem.d_q = result.q.raw();
    problem.d_k = result.k.raw();
    problem.d_v = result.v.raw();
    problem.accumulate = accumulate;
    SparseGradient(context, problem, kernel);
    return result;
  }

  void CompareSparse(const Case& c, GradientKernel kernel, bool accumulate = false) {
    const Shape shape{c.batch, c.length, c.heads, c.head_size};
    const Both q = RandomBoth(shape), k = RandomBoth(shape), v = RandomBoth(shape),
               d_out = RandomBoth(shape);
    const BlockMap map = RandomMap(c);
    const Gradients exact =
        RunSparse(c, GradientKernel::kRow, DType::kF32, q, k, v, d_out, map, accumulate);
    const Gradients result = RunSparse(c, kernel, DType::kBF16, q, k, v, d_out, map, accumulate);
    ExpectClose(result.q, exact.q, Name(c) + " d_q", CancelledSums(c, v, d_out, k));
    ExpectClose(result.k, exact.k, Name(c) + " d_k", CancelledSums(c, v, d_out, q));
    ExpectClose(result.v, exact.v, Name(c) + " d_v");
  }

  void CompareLengthsAndShares(GradientKernel kernel) {
    CompareSparse({1, 1, 1}, kernel);
    CompareSparse({1, 1, 65, 128, 128, 64, 5}, kernel);
    CompareSparse({1, 1, 300, 64, 64, 64, 0}, kernel);  // lists without an entry
    CompareSparse({1, 1, 2100, 128, 128, 64, 5}, kernel);
  }

  void CompareLinear(const Case& c, Feature feature, LinearScope scope, bool projected) {
    const Shape shape{c.batch, c.length, c.heads, c.head_size};
    const Both q = RandomBoth(shape), k = RandomBoth(shape), v = RandomBoth(shape),
               d_out = RandomBoth(shape);
    const BlockMap map = RandomMap(c);
    const Tensor weight = Upload(Random({c.head_size, c.head_size}), DType::kF32);
    const Tensor cos = Poisoned({c.length, c.head_size / 2}, DType::kF32);
    const Tensor sin = Poisoned({c.length, c.head_size / 2}, DType::kF32);
    FillAngles(cos, sin);
    LinearGradientArgs args;
    args.feature = feature;
    args.cos = cos;
    args.sin = sin;
    args.scope = scope;
    args.map = &map;
    if (projected) args.proj_weight = weight;
    const auto run = [&](DType type) {
      LinearGradientArgs own = args;
      own.q = q.as(type);
      own.k = k.as(type);
      own.v = v.as(type);
      own.d_out = d_out.as(type);
      own.d_q = Poisoned(shape, type);
      own.d_k = Poisoned(shape, type);
      own.d_v = Poisoned(shape, type);
      own.delta = Poisoned({c.batch, c.heads, c.length}, DType::kF32);
      own.d_proj_weight = Poisoned(weight.shape(), DType::kF32);
      type == DType::kBF16 ? TensorCoreLinearGradient(backend_->context(), own)
                           : RowLinearGradient(backend_->context(), own);
      return own;
    };
    const LinearGradientArgs exact = run(DType::kF32), result = run(DType::kBF16);
    const std::string what = Name(c) + " feature " + std::to_string(static_cast<int>(feature)) +
                             " scope " + std::to_string(static_cast<int>(scope));
    ExpectClose(result.delta, exact.delta, what + " delta");
    ExpectClose(result.d_q, exact.d_q, what + " d_q");
    ExpectClose(result.d_k, exact.d_k, what + " d_k");
    ExpectClose(result.d_v, exact.d_v, what + " d_v");
    if (projected) ExpectClose(result.d_proj_weight, exact.d_proj_weight, what + " d_weight");
  }

  void FillAngles(const Tensor& cos, const Tensor& sin) {
    const Tensor c = Tensor::Host(cos.shape(), DType::kF32);
    const Tensor s = Tensor::Host(cos.shape(), DType::kF32);
    for (std::int64_t i = 0; i < c.NumElements(); ++i) {
      c.data<float>()[i] = std::cos(0.1f * static_cast<float>(i % 977));
      s.data<float>()[i] = std::sin(0.1f * static_cast<float>(i % 977));
    }
    backend_->Copy(c, cos);
    backend_->Copy(s, sin);
  }
};

using SparseGradientKernels = BackwardTest;
using HopperGradientSteps = OnHopper<BackwardTest>;
using LinearGradientKernels = BackwardTest;

TEST_F(SparseGradientKernels, TensorCoreOneTile) {
  CompareSparse({.head_size = 64, .share = 5}, GradientKernel::kTensorCore);
  CompareSparse({.share = 5}, GradientKernel::kTensorCore);
}
TEST_F(SparseGradientKernels, TensorCore) { CompareLengthsAndShares(GradientKernel::kTensorCore); }
// In small blocks one warp for each 16 rows, in units of 16 of the other side.
using SparseGradientBlocks = KernelOn<BackwardTest, GradientKernel, Blocks>;
TEST_P(SparseGradientBlocks, SharesAndAccumulated) {
  const auto [block_q, block_k] = input();
  for (const int head_size : {64, 128}) {
    CompareSparse({2, 3, 517, head_size, block_q, block_k}, kernel());
    CompareSparse({1, 2, 1000, head_size, block_q, block_k, 1}, kernel(), true);
  }
}
std::string NameOfInput(const testing::TestParamInfo<SparseGradientBlocks::ParamType>& info) {
  return NameOf(std::get<1>(info.param));
}
INSTANTIATE_TEST_SUITE_P(TensorCore, SparseGradientBlocks,
                         testing::Combine(testing::Values(GradientKernel::kTensorCore),
                                          testing::Values(Blocks{64, 64}, Blocks{128, 64},
                                                          Blocks{64, 128}, Blocks{128, 128},
                                                          Blocks{16, 16}, Blocks{32, 16},
                                                          Blocks{16, 32}, Blocks{48, 80},
                                                          Blocks{16, 64}, Blocks{128, 16})),
                         NameOfInput);
INSTANTIATE_TEST_SUITE_P(Hopper, SparseGradientBlocks,
                         testing::Combine(testing::Values(GradientKernel::kHopper),
                                          testing::Values(Blocks{64, 64}, Blocks{128, 64},
                                                          Blocks{64, 128}, Blocks{128, 128})),
                         NameOfInput);
TEST_F(SparseGradientKernels, TensorCoreSmallBlocks) {
  for (const int head_size : {64, 128}) {
    CompareSparse({1, 1, 1, head_size, 16, 16}, GradientKernel::kTensorCore);
    CompareSparse({1, 2, 2304, head_size, 16, 16, 1}, GradientKernel::kTensorCore);
    CompareSparse({1, 1, 300, head_size, 16, 16, 0}, GradientKernel::kTensorCore);
  }
}

// The Hopper kernels from one tile upwards.
TEST_F(HopperGradientSteps, OneTile) {
  CompareSparse({.head_size = 64, .share = 5}, GradientKernel::kHopper);
  CompareSparse({.share = 5}, GradientKernel::kHopper);
}
TEST_F(HopperGradientSteps, RaggedTile) {
  CompareSparse({.length = 37, .share = 5}, GradientKernel::kHopper);
  CompareSparse({.length = 101, .share = 5}, GradientKernel::kHopper);
}
TEST_F(HopperGradientSteps, TwoConsumers) {
  CompareSparse({.length = 128, .block_q = 128, .share = 5}, GradientKernel::kHopper);
  CompareSparse({.length = 256, .block_q = 128, .share = 5}, GradientKernel::kHopper);
}
TEST_F(HopperGradientSteps, RingWrapsAround) {
  CompareSparse({.length = 64 * 9, .share = 5}, GradientKernel::kHopper);
  CompareSparse({.length = 64 * 10, .block_q = 128, .share = 5}, GradientKernel::kHopper);
}
TEST_F(HopperGradientSteps, TwoTilesOfNarrowHeads) {
  CompareSparse({.length = 128, .head_size = 64, .share = 5}, GradientKernel::kHopper);
  CompareSparse({.length = 64 * 9, .head_size = 64, .share = 5}, GradientKernel::kHopper);
}
TEST_F(HopperGradientSteps, Lists) {
  CompareSparse({.length = 64 * 9}, GradientKernel::kHopper);
  CompareSparse({.length = 64 * 9, .head_size = 64}, GradientKernel::kHopper);
}
TEST_F(HopperGradientSteps, Accumulates) {
  CompareSparse({.length = 200, .share = 5}, GradientKernel::kHopper, true);
}
TEST_F(HopperGradientSteps, LengthsAndShares) { CompareLengthsAndShares(GradientKernel::kHopper); }

TEST_F(LinearGradientKernels, OneTile) {
  CompareLinear({.head_size = 64}, Feature::kSoftmax, LinearScope::kAll, false);
  CompareLinear({}, Feature::kSoftmax, LinearScope::kAll, false);
  CompareLinear({}, Feature::kSoftmax, LinearScope::kAll, true);
}
TEST_F(LinearGradientKernels, EveryKeyInScope) {
  for (const Feature feature : {Feature::kSoftmax, Feature::kElu, Feature::kRotatedRelu}) {
    CompareLinear({2, 2, 517, 64}, feature, LinearScope::kAll, true);
    CompareLinear({1, 3, 700, 128}, feature, LinearScope::kAll, feature != Feature::kRotatedRelu);
  }
}
TEST_F(LinearGradientKernels, Scopes) {
  for (const LinearScope scope : {LinearScope::kMarginal, LinearScope::kNonCritical}) {
    for (const Feature feature : {Feature::kSoftmax, Feature::kElu}) {
      CompareLinear({2, 2, 517, 64, 64, 64}, feature, scope, true);
      CompareLinear({1, 2, 700, 128, 128, 64}, feature, scope, true);
      CompareLinear({1, 1, 330, 128, 64, 128}, feature, scope, true);
    }
  }
}
// A tile of rows does not reach beyond its block.
class LinearGradientBlocks : public BackwardTest, public testing::WithParamInterface<Blocks> {};
TEST_P(LinearGradientBlocks, Scopes) {
  const auto [block_q, block_k] = GetParam();
  for (const LinearScope scope : {LinearScope::kMarginal, LinearScope::kNonCritical}) {
    CompareLinear({2, 2, 517, 64, block_q, block_k}, Feature::kSoftmax, scope, true);
    CompareLinear({1, 2, 333, 128, block_q, block_k}, Feature::kElu, scope, true);
  }
}
INSTANTIATE_TEST_SUITE_P(Blocks, LinearGradientBlocks,
                         testing::Values(Blocks{16, 16}, Blocks{32, 16}, Blocks{16, 64},
                                         Blocks{48, 80}, Blocks{64, 16}),
                         NameOfBlocks);
class LinearGradientScopes : public BackwardTest,
                             public testing::WithParamInterface<LinearScope> {};
TEST_P(LinearGradientScopes, OneAndManySmallBlocks) {
  CompareLinear({1, 1, 2070, 128, 16, 16}, Feature::kSoftmax, GetParam(), true);
  CompareLinear({1, 1, 7, 128, 16, 16}, Feature::kSoftmax, GetParam(), true);
}
INSTANTIATE_TEST_SUITE_P(Scopes, LinearGradientScopes,
                         testing::Values(LinearScope::kMarginal, LinearScope::kNonCritical),
                         [](const auto& info) {
                           return info.param == LinearScope::kMarginal ? "Marginal" : "NonCritical";
                         });

}  // namespace
}  // namespace slalom::cuda
