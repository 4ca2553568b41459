// Convolution, norms over channels, reorderings and pixels against the reference.
#include "tests/reference/frames.h"

#include <limits>

#include "kernels/core/error.h"
#include "tests/unit/kernels/device_test.h"

namespace slalom {
namespace {

using reference::Array;
using reference::Exact;

constexpr DType kF32 = DType::kF32;

class FramesTest : public OpTest {
 protected:
  struct ConvSetup {
    std::int64_t frames, height, width, channels_in, channels_out;
    std::int64_t kt = 3, kh = 3, kw = 3, history = 0;
    bool bias = true, residual = false, in_place = false, upsample = false;
  };

  void RunConv(const ConvSetup& s) {
    const Array none;
    const std::int64_t factor = s.upsample ? 2 : 1;
    const Shape out_shape{s.frames, s.height * factor, s.width * factor, s.channels_out};
    const Array x = Random(Shape{s.frames, s.height, s.width, s.channels_in}, type());
    const Array history =
        s.history > 0 ? Random(Shape{s.history, s.height, s.width, s.channels_in}, type()) : none;
    const double taps = static_cast<double>(s.kt * s.kh * s.kw * s.channels_in);
    const Array weight = Random(Shape{s.channels_out, s.kt, s.kh, s.kw, s.channels_in}, type(),
                                1.0 / std::sqrt(taps));
    const Array bias = s.bias ? Random(Shape{s.channels_out}, kF32) : none;
    const Array residual = s.residual ? Random(out_shape, type()) : none;
    Tensor out = Poisoned(out_shape, type());
    const Tensor device_residual = UploadIf(residual, type());
    if (s.in_place) out = device_residual;
    backend().Conv({.x = Upload(x, type()),
                    .history = UploadIf(history, type()),
                    .weight = Upload(weight, type()),
                    .bias = UploadIf(bias, kF32),
                    .residual = device_residual,
                    .upsample = s.upsample,
                    .out = out});
    const auto run = [&](auto policy) {
      return reference::Conv<decltype(policy)>(x, history, weight, bias, residual, s.upsample);
    };
    ExpectClose(out, run(Exact{}), Plain(run),
                "Conv " + std::to_string(s.channels_in) + " to " + std::to_string(s.channels_out));
  }
};

TEST_P(FramesTest, ConvKernels) {
  RunConv({2, 6, 5, 16, 16});
  RunConv({1, 7, 9, 16, 24, 3, 3, 3, 1});
  RunConv({4, 5, 6, 32, 64, 3, 3, 3, 2});
  RunConv({3, 5, 4, 16, 16, 1, 1, 1});
  RunConv({3, 4, 6, 32, 64, 3, 1, 1, 2});
  RunConv({2, 8, 8, 48, 3, 3, 3, 3, 2});
  RunConv({1, 5, 5, 3, 5, 3, 3, 3, 0, false});
}

TEST_P(FramesTest, ConvFusions) {
  RunConv({2, 6, 7, 32, 16, 1, 3, 3, 0, true, false, false, true});
  RunConv({2, 6, 7, 16, 16, 3, 3, 3, 2, true, true, false});
  RunConv({2, 6, 7, 16, 16, 3, 3, 3, 2, true, true, true});
  RunConv({1, 3, 3, 7, 9, 3, 3, 3, 1, false, true, true});
}

// Frames one by one, with the two before them as history, give what all at once give.
TEST_P(FramesTest, ConvStreams) {
  const std::int64_t frames = 5, height = 6, width = 6, in = 16, out = 16;
  const Tensor x = Upload(Random(Shape{frames, height, width, in}, type()), type());
  const Array weight = Random(Shape{out, 3, 3, 3, in}, type(), 0.05);
  const Tensor device_weight = Upload(weight, type());
  const Tensor whole = Poisoned(Shape{frames, height, width, out}, type());
  backend().Conv({.x = x, .weight = device_weight, .out = whole});
  const Tensor streamed = Poisoned(whole.shape(), type());
  for (std::int64_t f = 0; f < frames; ++f) {
    Tensor history;
    if (f > 0) history = x.Slice(std::max<std::int64_t>(0, f - 2), f);
    backend().Conv({.x = x.Slice(f, f + 1),
                    .history = history,
                    .weight = device_weight,
                    .out = streamed.Slice(f, f + 1)});
  }
  const Array a = Download(whole);
  const Array b = Download(streamed);
  const double tolerance = type() == DType::kBF16 ? 0x1p-6 : 1e-5;
  for (std::int64_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], tolerance) << i;
}

TEST_P(FramesTest, ChannelNorm) {
  for (const std::int64_t channels : {3, 16, 32, 64, 96, 384}) {
    for (const bool silu : {false, true}) {
      const Array x = Random(Shape{2, 3, 5, channels}, type());
      const Array gamma = Random(Shape{channels}, kF32);
      const Tensor out = Upload(x, type());
      backend().ChannelNorm({.x = out, .gamma = Upload(gamma, kF32), .silu = silu, .out = out});
      const auto run = [&](auto policy) {
        return reference::ChannelNorm<decltype(policy)>(x, gamma, silu);
      };
      ExpectClose(out, run(Exact{}), Plain(run), "ChannelNorm " + std::to_string(channels));
    }
  }
}

TEST_P(FramesTest, ChannelNormOfZerosIsZero) {
  const Tensor x = Upload(Array(Shape{1, 2, 2, 32}), type());
  const Tensor gamma = Upload(Random(Shape{32}, kF32), kF32);
  const Tensor out = Poisoned(x.shape(), type());
  backend().ChannelNorm({.x = x, .gamma = gamma, .silu = true, .out = out});
  for (const double v : Download(out).values) EXPECT_EQ(v, 0.0);
}

TEST_P(FramesTest, PatchesAndBack) {
  const Array latent = Random(Shape{2, 5, 3, 4, 6}, type());
  const Tensor tokens = Poisoned(Shape{2, 3 * 2 * 3, 20}, type());
  backend().Patchify({.latent = Upload(latent, kF32), .tokens = tokens});
  EXPECT_EQ(Download(tokens).values, reference::Patchify(latent).values);

  const Array outputs = Random(Shape{2, 18, 20}, type());
  const Tensor back = Poisoned(latent.shape, kF32);
  backend().Unpatchify({.tokens = Upload(outputs, type()), .latent = back});
  EXPECT_EQ(Download(back).values, reference::Unpatchify(outputs, latent.shape).values);
}

TEST_P(FramesTest, InterleaveFrames) {
  const Array x = Random(Shape{3, 4, 5, 2 * 7}, type());
  const Tensor out = Poisoned(Shape{6, 4, 5, 7}, type());
  backend().InterleaveFrames({.x = Upload(x, type()), .out = out});
  EXPECT_EQ(Download(out).values, reference::InterleaveFrames(x).values);
}

TEST_P(FramesTest, ToPixels) {
  Array x = Random(Shape{2, 9, 11, 3}, type(), 0.7);
  x[0] = -1;
  x[1] = 1;
  x[2] = 0;
  x[3] = -7;
  x[4] = 7;
  const Tensor out = Poisoned(x.shape, DType::kU8);
  backend().ToPixels({.x = Upload(x, type()), .out = out});
  const auto pixels = DownloadBytes(out);
  EXPECT_EQ(pixels[0], 0);
  EXPECT_EQ(pixels[1], 255);
  EXPECT_EQ(pixels[2], 127);
  EXPECT_EQ(pixels[3], 0);
  EXPECT_EQ(pixels[4], 255);
  for (std::int64_t i = 0; i < x.size(); ++i) {
    // Single precision may fall to either side of a whole number.
    const int low = reference::ToPixel(x[i] - 1e-6);
    const int high = reference::ToPixel(x[i] + 1e-6);
    EXPECT_GE(pixels[static_cast<std::size_t>(i)], low);
    EXPECT_LE(pixels[static_cast<std::size_t>(i)], high);
  }
}

TEST_P(FramesTest, CountNonFinite) {
  Array x = Random(Shape{70001}, type());
  EXPECT_EQ(slalom::CountNonFinite(backend(), Upload(x, type())), 0);
  x[0] = std::numeric_limits<double>::infinity();
  x[65536] = std::numeric_limits<double>::quiet_NaN();
  x[70000] = -std::numeric_limits<double>::infinity();
  const Tensor bad = Upload(x, type());
  EXPECT_EQ(slalom::CountNonFinite(backend(), bad), 3);
  const Tensor counter = backend().Allocate({1}, DType::kI64);
  backend().Zero(counter);
  backend().CountNonFinite(bad, counter);
  backend().CountNonFinite(bad, counter);
  const Tensor sum = Tensor::Host({1}, DType::kI64);
  backend().Copy(counter, sum);
  EXPECT_EQ(*sum.data<std::int64_t>(), 6) << "each call adds";
}

INSTANTIATE_TEST_SUITE_P(Devices, FramesTest, testing::ValuesIn(OpCases()), OpCaseName);

}  // namespace
}  // namespace slalom
