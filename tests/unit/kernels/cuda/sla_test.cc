// SLA on bf16, in one kernel and in two, against plain f32 arithmetic on the same values, for every
// combination of scope, blocks and head size, with forced maps.
#include "kernels/cuda/attention/sla.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/unit/kernels/cuda/kernel_test.h"

namespace slalom::cuda {
namespace {

struct Case {
  std::int64_t batch = 1, length = 64, heads = 1;
  int head_size = 128;
  LinearScope scope = LinearScope::kAll;
  int block_q = 64, block_k = 64;
  FeatureMap feature_map = FeatureMap::kSoftmax;
  int critical_of_8 = 2;  // how many of eight blocks are critical, at random; 8: every one
};

std::string Name(const Case& c) {
  return "B " + std::to_string(c.batch) + " L " + std::to_string(c.length) + " H " +
         std::to_string(c.heads) + " D " + std::to_string(c.head_size) + " blocks " +
         std::to_string(c.block_q) + "x" + std::to_string(c.block_k) + " scope " +
         std::to_string(static_cast<int>(c.scope)) + " features " +
         std::to_string(static_cast<int>(c.feature_map)) + " critical " +
         std::to_string(c.critical_of_8);
}

class SlaKernels : public OnHopper<KernelTest> {
 protected:
  // Rows of blocks may be without critical ones, or without any in scope.
  BlockMap RandomMap(const Case& c) {
    return MapOf(c.batch, c.heads, c.length, c.block_q, c.block_k, [&] {
      const bool critical = static_cast<int>(random_() % 8) < c.critical_of_8;
      return critical ? 1 : (random_() % 3 == 0 ? 0 : 2);
    });
  }

  struct Inputs {
    Tensor q, k, v, weight, bias;
    BlockMap map;
  };
  Inputs RandomInputs(const Case& c) {
    const Shape shape{c.batch, c.length, c.heads, c.head_size};
    return {Random(shape),         Random(shape),
            Random(shape),         Random({c.head_size, c.head_size}, 0.2f),
            Random({c.head_size}), RandomMap(c)};
  }

  std::vector<float> Run(const Case& c, const Inputs& in, DType type, SlaWay way) {
    SlaArgs args;
    args.q = Upload(in.q, type);
    args.k = Upload(in.k, type);
    args.v = Upload(in.v, type);
    args.map = &in.map;
    args.scope = c.scope;
    args.feature_map = c.feature_map;
    args.proj_weight = Upload(in.weight, DType::kF32);
    args.proj_bias = Upload(in.bias, DType::kF32);
    args.out = Poisoned(in.q.shape(), type);
    SlaAttention(backend_->context(), args, way);
    return Download(args.out);
  }

  void Compare(const Case& c) {
    const Inputs in = RandomInputs(c);
    const std::vector<float> expected = Run(c, in, DType::kF32, SlaWay::kSeparate);
    // Probabilities, features, sums and the result are each rounded to bf16 once.
    for (const SlaWay way : {SlaWay::kFused, SlaWay::kSeparate}) {
      ExpectNear(Run(c, in, DType::kBF16, way), expected, 0x1p-7f,
                 (way == SlaWay::kFused ? "fused, " : "separate, ") + Name(c));
    }
  }

  void CompareBoth(Case c) {
    for (const int head_size : {64, 128}) {
      c.head_size = head_size;
      Compare(c);
    }
  }
};

// From one tile to many: the first that fails says where to look.
TEST_F(SlaKernels, OneTile) {
  CompareBoth({.length = 128, .block_q = 128, .critical_of_8 = 8});
  CompareBoth({.length = 64, .critical_of_8 = 8});
}
TEST_F(SlaKernels, OneTileProjected) {
  CompareBoth({.length = 256, .scope = LinearScope::kNonCritical, .block_q = 128});
  CompareBoth({.length = 256, .scope = LinearScope::kNonCritical});
}
TEST_F(SlaKernels, NoCriticalBlock) {
  for (const LinearScope scope : {LinearScope::kAll, LinearScope::kMarginal}) {
    CompareBoth({.length = 300, .scope = scope, .block_q = 128, .critical_of_8 = 0});
    CompareBoth({.length = 300, .scope = scope, .critical_of_8 = 0});
  }
}
TEST_F(SlaKernels, EveryBlockCritical) {
  for (const LinearScope scope :
       {LinearScope::kAll, LinearScope::kMarginal, LinearScope::kNonCritical}) {
    CompareBoth({.length = 700, .scope = scope, .block_q = 128, .critical_of_8 = 8});
    CompareBoth({.length = 700, .scope = scope, .critical_of_8 = 8});
  }
}
TEST_F(SlaKernels, FeatureMaps) {
  for (const FeatureMap map : {FeatureMap::kElu, FeatureMap::kRelu}) {
    CompareBoth({.length = 200, .heads = 2, .block_q = 128, .feature_map = map});
    CompareBoth({.length = 200, .heads = 2, .scope = LinearScope::kMarginal, .feature_map = map});
  }
}

class SlaLengths : public SlaKernels, public testing::WithParamInterface<std::int64_t> {};

TEST_P(SlaLengths, ScopesAndBlocks) {
  const std::int64_t length = GetParam();
  for (const LinearScope scope :
       {LinearScope::kAll, LinearScope::kMarginal, LinearScope::kNonCritical}) {
    CompareBoth({.batch = 2, .length = length, .heads = 3, .scope = scope});
    CompareBoth({.length = length, .heads = 2, .scope = scope, .block_q = 128});
    CompareBoth({.length = length, .heads = 2, .scope = scope, .block_q = 128, .block_k = 128});
    CompareBoth({.length = length, .scope = scope, .block_q = 192, .block_k = 192});
    CompareBoth({.length = length, .scope = scope, .block_q = 256, .critical_of_8 = 1});
  }
}
INSTANTIATE_TEST_SUITE_P(L, SlaLengths, testing::Values(1, 63, 64, 65, 127, 129, 1000, 2176),
                         testing::PrintToStringParamName());

// More query tiles than the device works on at once: a block of threads takes several.
class SlaManyTiles : public SlaKernels, public testing::WithParamInterface<int> {};

TEST_P(SlaManyTiles, Scopes) {
  for (const LinearScope scope : {LinearScope::kAll, LinearScope::kMarginal}) {
    CompareBoth(
        {.length = 700, .heads = 60, .scope = scope, .block_q = GetParam(), .critical_of_8 = 0});
    CompareBoth(
        {.length = 700, .heads = 60, .scope = scope, .block_q = GetParam(), .critical_of_8 = 3});
  }
}
INSTANTIATE_TEST_SUITE_P(BlockQ, SlaManyTiles, testing::Values(64, 128),
                         testing::PrintToStringParamName());

// The same inputs give the same bits: a result that moves is a race.
TEST_F(SlaKernels, FusedRepeats) {
  for (const LinearScope scope : {LinearScope::kAll, LinearScope::kMarginal}) {
    for (const int block_q : {64, 128}) {
      const Case c{.length = 5000, .heads = 4, .scope = scope, .block_q = block_q};
      const Inputs in = RandomInputs(c);
      const std::vector<float> first = Run(c, in, DType::kBF16, SlaWay::kFused);
      for (int i = 0; i < 10; ++i) {
        ASSERT_EQ(first, Run(c, in, DType::kBF16, SlaWay::kFused)) << Name(c);
      }
    }
  }
}

TEST(ChooseSlaWay, FusesWhereBothBranchesFit) {
  EXPECT_EQ(ChooseSlaWay(AttentionKernel::kHopper, true, Feature::kSoftmax), SlaWay::kFused);
  EXPECT_EQ(ChooseSlaWay(AttentionKernel::kTensorCore, true, Feature::kSoftmax), SlaWay::kSeparate);
  EXPECT_EQ(ChooseSlaWay(AttentionKernel::kHopper, false, Feature::kSoftmax), SlaWay::kSeparate);
  EXPECT_EQ(ChooseSlaWay(AttentionKernel::kHopper, true, Feature::kRotatedRelu), SlaWay::kSeparate);
}

}  // namespace
}  // namespace slalom::cuda
