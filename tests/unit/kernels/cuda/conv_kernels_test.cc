// Each convolution kernel against the simplest one in f32: edges, history, doubling, epilogues.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/conv.h"
#include "kernels/cuda/cuda_backend.h"

namespace slalom::cuda {
namespace {

class ConvKernels : public testing::Test {
 protected:
  void SetUp() override {
    if (CudaDeviceCount() == 0) GTEST_SKIP() << "this machine has no CUDA device";
    backend_ = std::make_unique<CudaBackend>(0, BackendOptions{});
  }

  // Values that are exact in bf16, in both types.
  std::pair<Tensor, Tensor> Random(const Shape& shape, float scale = 1.0f) {
    const Tensor host = Tensor::Host(shape, DType::kF32);
    std::normal_distribution<float> normal(0.0f, scale);
    for (std::int64_t i = 0; i < host.NumElements(); ++i) {
      host.data<float>()[i] = static_cast<float>(BFloat16(normal(random_)));
    }
    const Tensor narrow = backend_->Allocate(shape, DType::kBF16);
    const Tensor wide = backend_->Allocate(shape, DType::kF32);
    backend_->Copy(host, narrow);
    backend_->Copy(host, wide);
    return {narrow, wide};
  }

  std::vector<float> Download(const Tensor& tensor) {
    const Tensor host = Tensor::Host(tensor.shape(), DType::kF32);
    backend_->Copy(tensor, host);
    return {host.data<float>(), host.data<float>() + host.NumElements()};
  }

  Tensor Poisoned(const Shape& shape, DType type) {
    const Tensor host = Tensor::Host(shape, DType::kF32);
    std::fill_n(host.data<float>(), host.NumElements(), NAN);
    const Tensor device = backend_->Allocate(shape, type);
    backend_->Copy(host, device);
    return device;
  }

  void Compare(const ConvShape& shape, ConvKernel kernel, bool epilogue) {
    const Shape frame{shape.frames, shape.height, shape.width, shape.channels_in};
    const auto [x, x32] = Random(frame);
    const auto [history, history32] =
        Random({std::max(shape.history, 1), shape.height, shape.width, shape.channels_in});
    const auto [weight, weight32] =
        Random({shape.channels_out, shape.kt, shape.kh, shape.kw, shape.channels_in},
               1.0f / std::sqrt(static_cast<float>(shape.depth())));
    const Tensor bias = Random({shape.channels_out}).second;
    const Shape out_shape{shape.frames, shape.out_height(), shape.out_width(), shape.channels_out};
    const auto [residual, residual32] = Random(out_shape);
    const Tensor exact_out = Poisoned(out_shape, DType::kF32);
    // With an epilogue the residual is also where the result goes.
    const Tensor out = epilogue ? residual : Poisoned(out_shape, DType::kBF16);

    ConvProblem exact{shape, x32.raw(), shape.history > 0 ? history32.raw() : nullptr,
                      weight32.raw()};
    ConvProblem problem{shape, x.raw(), shape.history > 0 ? history.raw() : nullptr, weight.raw()};
    if (epilogue) {
      exact.bias = problem.bias = bias.data<float>();
      exact.residual = residual32.raw();
      problem.residual = residual.raw();
    }
    exact.out = exact_out.raw();
    problem.out = out.raw();
    RunConv(backend_->context(), exact, DType::kF32, ConvKernel::kSimple);
    RunConv(backend_->context(), problem, DType::kBF16, kernel);
    const std::vector<float> expected = Download(exact_out);
    const std::vector<float> actual = Download(out);
    float largest = 0.0f, error = 0.0f;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      ASSERT_TRUE(std::isfinite(actual[i])) << Name(shape) << " element " << i;
      largest = std::max(largest, std::abs(expected[i]));
      error = std::max(error, std::abs(expected[i] - actual[i]));
    }
    EXPECT_LE(error, 0x1p-8f * largest) << Name(shape);  // one rounding of the result
  }

  static std::string Name(const ConvShape& s) {
    return std::to_string(s.channels_in) + " to " + std::to_string(s.channels_out) + " at " +
           std::to_string(s.frames) + "x" + std::to_string(s.height) + "x" +
           std::to_string(s.width) + ", kernel " + std::to_string(s.kt) + std::to_string(s.kh) +
           std::to_string(s.kw) + ", history " + std::to_string(s.history) + ", doubling " +
           std::to_string(s.doubling);
  }

  void CompareChannels(ConvKernel kernel, int in, int out) {
    for (const bool epilogue : {false, true}) {
      for (int history = 0; history <= 2; ++history) {
        Compare({4, 9, 13, in, out, 3, 3, 3, history, 0}, kernel, epilogue);
      }
      Compare({1, 40, 66, in, out, 3, 3, 3, 2, 0}, kernel, epilogue);
      Compare({2, 17, 8, in, out, 3, 1, 1, 2, 0}, kernel, epilogue);
      Compare({2, 30, 52, in, out, 1, 3, 3, 0, 0}, kernel, epilogue);
      Compare({2, 15, 26, in, out, 1, 3, 3, 0, 1}, kernel, epilogue);
    }
  }

  std::unique_ptr<CudaBackend> backend_;
  std::mt19937 random_{23};
};

// From one stage to all of it: the first that fails says where to look.
TEST_F(ConvKernels, HopperSteps) {
  if (backend_->context().compute_major != 9) GTEST_SKIP() << "this device is not a Hopper";
  for (const int channels : {96, 192}) {
    Compare({1, 16, 16, 96, channels, 1, 1, 1, 0, 0}, ConvKernel::kHopper, false);
    Compare({1, 16, 16, 192, channels, 1, 1, 1, 0, 0}, ConvKernel::kHopper, false);
    Compare({1, 16, 16, 96, channels, 1, 3, 3, 0, 0}, ConvKernel::kHopper, false);
    Compare({2, 16, 16, 96, channels, 3, 1, 1, 0, 0}, ConvKernel::kHopper, false);
    Compare({2, 16, 16, 96, channels, 3, 1, 1, 2, 0}, ConvKernel::kHopper, false);
    Compare({1, 16, 16, 96, channels, 1, 1, 1, 0, 0}, ConvKernel::kHopper, true);
  }
}

// Channels in and out.
using Channels = std::pair<int, int>;
std::string NameOfChannels(const testing::TestParamInfo<Channels>& info) {
  return std::to_string(info.param.first) + "to" + std::to_string(info.param.second);
}

class HopperConv : public ConvKernels, public testing::WithParamInterface<Channels> {};

TEST_P(HopperConv, ShapesAndEpilogues) {
  if (backend_->context().compute_major != 9) GTEST_SKIP() << "this device is not a Hopper";
  CompareChannels(ConvKernel::kHopper, GetParam().first, GetParam().second);
}
INSTANTIATE_TEST_SUITE_P(Channels, HopperConv,
                         testing::Values(Channels{96, 96}, Channels{96, 192}, Channels{192, 96},
                                         Channels{192, 384}, Channels{288, 192}, Channels{96, 3},
                                         Channels{192, 8}),
                         NameOfChannels);

class TensorCoreConv : public ConvKernels, public testing::WithParamInterface<Channels> {};

TEST_P(TensorCoreConv, ShapesAndEpilogues) {
  CompareChannels(ConvKernel::kTensorCore, GetParam().first, GetParam().second);
}
INSTANTIATE_TEST_SUITE_P(Channels, TensorCoreConv,
                         testing::Values(Channels{8, 8}, Channels{16, 384}, Channels{24, 40},
                                         Channels{96, 3}, Channels{96, 96}, Channels{40, 64},
                                         Channels{64, 130}),
                         NameOfChannels);

TEST(ChooseConvKernel, TakesTheFastestThatCan) {
  ConvShape shape{1, 8, 8, 192, 96, 3, 3, 3, 2, 0};
  EXPECT_EQ(ChooseConvKernel(shape, DType::kBF16, true, 9), ConvKernel::kHopper);
  EXPECT_EQ(ChooseConvKernel(shape, DType::kBF16, true, 8), ConvKernel::kTensorCore);
  EXPECT_EQ(ChooseConvKernel(shape, DType::kBF16, false, 9), ConvKernel::kSimple);
  EXPECT_EQ(ChooseConvKernel(shape, DType::kF32, true, 9), ConvKernel::kSimple);
  shape.channels_out = 3;
  EXPECT_EQ(ChooseConvKernel(shape, DType::kBF16, true, 9), ConvKernel::kHopper);
  shape.kw = 5;
  EXPECT_EQ(ChooseConvKernel(shape, DType::kBF16, true, 9), ConvKernel::kTensorCore);
  shape.channels_in = 12;
  EXPECT_EQ(ChooseConvKernel(shape, DType::kBF16, true, 9), ConvKernel::kSimple);
}

}  // namespace
}  // namespace slalom::cuda
