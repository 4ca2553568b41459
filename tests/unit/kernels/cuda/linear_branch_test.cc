// The linear branch on tensor cores against the plain one in f32, on the same values.
#include "kernels/cuda/attention/linear_branch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <utility>

#include "kernels/cuda/cuda_backend.h"

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

class LinearBranchKernels : public testing::Test {
 protected:
  void SetUp() override {
    if (CudaDeviceCount() == 0) GTEST_SKIP() << "this machine has no CUDA device";
    backend_ = std::make_unique<CudaBackend>(0, BackendOptions{});
  }

  // Values that are exact in bf16.
  Tensor Random(const Shape& shape, float scale = 1.0f) {
    const Tensor host = Tensor::Host(shape, DType::kF32);
    std::normal_distribution<float> normal(0.0f, scale);
    for (std::int64_t i = 0; i < host.NumElements(); ++i) {
      host.data<float>()[i] = static_cast<float>(BFloat16(normal(random_)));
    }
    return host;
  }
  Tensor Upload(const Tensor& host, DType type) {
    const Tensor device = backend_->Allocate(host.shape(), type);
    backend_->Copy(host, device);
    return device;
  }

  BlockMap RandomMap(const Case& c) {
    const Shape shape{c.batch, c.heads, (c.length + c.block_q - 1) / c.block_q,
                      (c.length + c.block_k - 1) / c.block_k};
    const Tensor classes = Tensor::Host(shape, DType::kU8);
    for (std::int64_t i = 0; i < classes.NumElements(); ++i) {
      classes.data<std::uint8_t>()[i] = static_cast<std::uint8_t>(random_() % 3);
    }
    return backend_->BlockMapFromClasses(Upload(classes, DType::kU8), c.block_q, c.block_k);
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
      const Tensor out = Tensor::Host(shape, DType::kF32);
      backend_->Copy(args.out, out);
      return out;
    };
    const Tensor expected = run(DType::kF32, StateKernelKind::kTensorCore);
    ExpectNear(c, expected, run(DType::kBF16, StateKernelKind::kTensorCore), "mma.sync");
    if (ChooseStateKernel(backend_->context().compute_major) == StateKernelKind::kHopper) {
      ExpectNear(c, expected, run(DType::kBF16, StateKernelKind::kHopper), "wgmma");
    }
  }

  static void ExpectNear(const Case& c, const Tensor& expected, const Tensor& actual,
                         const std::string& kernel) {
    float largest = 0.0f, worst = 0.0f;
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < expected.NumElements(); ++i) {
      const float error = std::abs(actual.data<float>()[i] - expected.data<float>()[i]);
      largest = std::max(largest, std::abs(expected.data<float>()[i]));
      if (error <= worst) continue;  // a NaN is the worst
      worst = error;
      at = i;
      if (std::isnan(error)) break;
    }
    EXPECT_LE(worst, largest * 0x1p-7f)
        << kernel << ", element " << at << " of " << ToString(expected.shape()) << ": "
        << actual.data<float>()[at] << " instead of " << expected.data<float>()[at] << ", feature "
        << static_cast<int>(c.feature) << ", scope " << static_cast<int>(c.scope);
  }

 private:
  std::unique_ptr<CudaBackend> backend_;
  std::mt19937 random_{testing::UnitTest::GetInstance()->random_seed() + 1u};
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

TEST(ChooseStateKernel, TakesWgmmaWhereItCan) {
  EXPECT_EQ(ChooseStateKernel(9), StateKernelKind::kHopper);
  EXPECT_EQ(ChooseStateKernel(8), StateKernelKind::kTensorCore);
}

}  // namespace
}  // namespace slalom::cuda
