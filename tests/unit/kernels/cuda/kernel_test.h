// What tests share that hold one CUDA kernel against another on the same values.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_backend.h"

namespace slalom::cuda {

// Rows of a block of queries and of a block of keys; a parameter of tests that go through many.
using Blocks = std::pair<int, int>;
inline std::string NameOf(const Blocks& blocks) {
  return std::to_string(blocks.first) + "x" + std::to_string(blocks.second);
}
inline std::string NameOfBlocks(const testing::TestParamInfo<Blocks>& info) {
  return NameOf(info.param);
}

class KernelTest : public testing::Test {
 protected:
  void SetUp() override {
    if (CudaDeviceCount() == 0) GTEST_SKIP() << "this machine has no CUDA device";
    backend_ = std::make_unique<CudaBackend>(0, BackendOptions{});
  }
  // For SetUp.
  void SkipWithoutHopper() const {
    if (IsSkipped() || backend_->context().compute_major == kHopperMajor) return;
    GTEST_SKIP() << "this device is not a Hopper";
  }

  // On the host, in f32; values that are exact in bf16.
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
  // Values that are exact in bf16, on the device in both types.
  struct Both {
    Tensor narrow, wide;
    const Tensor& as(DType type) const { return type == DType::kBF16 ? narrow : wide; }
  };
  Both RandomBoth(const Shape& shape, float scale = 1.0f) {
    const Tensor host = Random(shape, scale);
    return {Upload(host, DType::kBF16), Upload(host, DType::kF32)};
  }
  Tensor Filled(const Shape& shape, DType type, float value) {
    const Tensor host = Tensor::Host(shape, DType::kF32);
    std::fill_n(host.data<float>(), host.NumElements(), value);
    return Upload(host, type);
  }
  Tensor Poisoned(const Shape& shape, DType type) { return Filled(shape, type, NAN); }
  std::vector<float> Download(const Tensor& device) {
    const Tensor host = Tensor::Host(device.shape(), DType::kF32);
    backend_->Copy(device, host);
    return {host.data<float>(), host.data<float>() + host.NumElements()};
  }

  // Classes of a map's pairs of blocks, each from `draw()`.
  template <typename Draw>
  BlockMap MapOf(std::int64_t batch, std::int64_t heads, std::int64_t length, int block_q,
                 int block_k, const Draw& draw) {
    const Tensor host = Tensor::Host(
        {batch, heads, (length + block_q - 1) / block_q, (length + block_k - 1) / block_k},
        DType::kU8);
    for (std::int64_t i = 0; i < host.NumElements(); ++i) {
      host.data<std::uint8_t>()[i] = static_cast<std::uint8_t>(draw());
    }
    return backend_->BlockMapFromClasses(Upload(host, DType::kU8), block_q, block_k);
  }

  // The worst element may be off by `tolerance` of the largest, and by `floor` where all is almost
  // zero; a NaN or an infinity never passes.
  static void ExpectNear(const std::vector<float>& actual, const std::vector<float>& expected,
                         float tolerance, const std::string& what, float floor = 0.0f) {
    ASSERT_EQ(actual.size(), expected.size()) << what;
    float largest = 0.0f, error = 0.0f;
    std::size_t worst = 0;
    for (std::size_t i = 0; i < actual.size(); ++i) {
      ASSERT_TRUE(std::isfinite(actual[i])) << what << " element " << i << " is " << actual[i];
      largest = std::max(largest, std::abs(expected[i]));
      if (std::abs(actual[i] - expected[i]) <= error) continue;
      error = std::abs(actual[i] - expected[i]);
      worst = i;
    }
    EXPECT_LE(error, tolerance * largest + floor)
        << what << " element " << worst << " is " << actual[worst] << " instead of "
        << expected[worst];
  }

  std::unique_ptr<CudaBackend> backend_;
  std::mt19937 random_{17};
};

// What needs a Hopper.
template <typename Fixture>
class OnHopper : public Fixture {
 protected:
  void SetUp() override {
    Fixture::SetUp();
    this->SkipWithoutHopper();
  }
};

// A kernel and what it is tried on; kHopper is skipped elsewhere.
template <typename Fixture, typename Kernel, typename Input>
class KernelOn : public Fixture, public testing::WithParamInterface<std::tuple<Kernel, Input>> {
 protected:
  void SetUp() override {
    Fixture::SetUp();
    if (kernel() == Kernel::kHopper) this->SkipWithoutHopper();
  }
  Kernel kernel() const { return std::get<0>(this->GetParam()); }
  Input input() const { return std::get<1>(this->GetParam()); }
};

}  // namespace slalom::cuda
