// Each convolution kernel against the simplest one in f32: edges, history, doubling, epilogues.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>

#include "kernels/cuda/conv.h"
#include "tests/unit/kernels/cuda/kernel_test.h"

namespace slalom::cuda {
namespace {

class ConvKernels : public KernelTest {
 protected:
  void Compare(const ConvShape& shape, ConvKernel kernel, bool epilogue) {
    const Shape frame{shape.frames, shape.height, shape.width, shape.channels_in};
    const auto [x, x32] = RandomBoth(frame);
    const auto [history, history32] =
        RandomBoth({std::max(shape.history, 1), shape.height, shape.width, shape.channels_in});
    const auto [weight, weight32] =
        RandomBoth({shape.channels_out, shape.kt, shape.kh, shape.kw, shape.channels_in},
                   1.0f / std::sqrt(static_cast<float>(shape.depth())));
    const Tensor bias = Upload(Random({shape.channels_out}), DType::kF32);
    const Shape out_shape{shape.frames, shape.out_height(), shape.out_width(), shape.channels_out};
    const auto [residual, residual32] = RandomBoth(out_shape);
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
    // One rounding of the result.
    ExpectNear(Download(out), Download(exact_out), 0x1p-8f, Name(shape));
  }

  static std::string Name(const ConvShape& s) {
    return std::to_string(s.channels_in) + " to " + std::to_string(s.channels_out) + " at " +
           std::to_string(s.frames) + "x" + std::to_string(s.height) + "x" +
           std::to_string(s.width) + ", kernel " + std::to_string(s.kt) + std::to_string(s.kh) +
           std::to_string(s.kw) + ", history " + std::to_string(s.history) + ", doubling " +
           std::to_string(s.doubling);
  }
};

// From one stage to all of it: the first that fails says where to look.
using HopperConvSteps = OnHopper<ConvKernels>;
TEST_F(HopperConvSteps, OneStageToAll) {
  for (const int channels : {96, 192}) {
    Compare({1, 16, 16, 96, channels, 1, 1, 1, 0, 0}, ConvKernel::kHopper, false);
    Compare({1, 16, 16, 192, channels, 1, 1, 1, 0, 0}, ConvKernel::kHopper, false);
    Compare({1, 16, 16, 96, channels, 1, 3, 3, 0, 0}, ConvKernel::kHopper, false);
    Compare({2, 16, 16, 96, channels, 3, 1, 1, 0, 0}, ConvKernel::kHopper, false);
    Compare({2, 16, 16, 96, channels, 3, 1, 1, 2, 0}, ConvKernel::kHopper, false);
    Compare({1, 16, 16, 96, channels, 1, 1, 1, 0, 0}, ConvKernel::kHopper, true);
  }
}

using Channels = std::pair<int, int>;  // in and out
using ConvChannels = KernelOn<ConvKernels, ConvKernel, Channels>;

TEST_P(ConvChannels, ShapesAndEpilogues) {
  const auto [in, out] = input();
  for (const bool epilogue : {false, true}) {
    for (int history = 0; history <= 2; ++history) {
      Compare({4, 9, 13, in, out, 3, 3, 3, history, 0}, kernel(), epilogue);
    }
    Compare({1, 40, 66, in, out, 3, 3, 3, 2, 0}, kernel(), epilogue);
    Compare({2, 17, 8, in, out, 3, 1, 1, 2, 0}, kernel(), epilogue);
    Compare({2, 30, 52, in, out, 1, 3, 3, 0, 0}, kernel(), epilogue);
    Compare({2, 15, 26, in, out, 1, 3, 3, 0, 1}, kernel(), epilogue);
  }
}
std::string NameOfChannels(const testing::TestParamInfo<ConvChannels::ParamType>& info) {
  const auto [in, out] = std::get<1>(info.param);
  return std::to_string(in) + "to" + std::to_string(out);
}
INSTANTIATE_TEST_SUITE_P(Hopper, ConvChannels,
                         testing::Combine(testing::Values(ConvKernel::kHopper),
                                          testing::Values(Channels{96, 96}, Channels{96, 192},
                                                          Channels{192, 96}, Channels{192, 384},
                                                          Channels{288, 192}, Channels{96, 3},
                                                          Channels{192, 8})),
                         NameOfChannels);
INSTANTIATE_TEST_SUITE_P(TensorCore, ConvChannels,
                         testing::Combine(testing::Values(ConvKernel::kTensorCore),
                                          testing::Values(Channels{8, 8}, Channels{16, 384},
                                                          Channels{24, 40}, Channels{96, 3},
                                                          Channels{96, 96}, Channels{40, 64},
                                                          Channels{64, 130})),
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
