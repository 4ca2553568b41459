// The address arithmetic of convolutions, against the definition.
#include <gtest/gtest.h>

#include <vector>

#include "kernels/cuda/conv.h"

namespace slalom::cuda {
namespace {

ConvShape Example(int kt, int kh, int kw, int history, int doubling) {
  ConvShape shape;
  shape.frames = 3;
  shape.height = 4;
  shape.width = 5;
  shape.channels_in = 16;
  shape.channels_out = 8;
  shape.kt = kt;
  shape.kh = kh;
  shape.kw = kw;
  shape.history = history;
  shape.doubling = doubling;
  return shape;
}

// A number that says which element it is; 0 outside.
double Element(const ConvShape& s, int frame, int y, int x, int channel) {
  if (y < 0 || y >= s.out_height() || x < 0 || x >= s.out_width() || frame < -s.history) return 0;
  return 1.0 + channel + s.channels_in * (x / (1 << s.doubling)) +
         1000.0 * (y / (1 << s.doubling)) + 100000.0 * (frame + s.history);
}

double Fetch(const ConvShape& s, const ConvSource& source) {
  if (source.place == ConvSource::Place::kNowhere) return 0;
  const auto channel = static_cast<int>(source.offset % s.channels_in);
  const std::int64_t pixel = source.offset / s.channels_in;
  const auto x = static_cast<int>(pixel % s.width);
  const auto y = static_cast<int>(pixel / s.width % s.height);
  const auto frame = static_cast<int>(pixel / s.width / s.height) -
                     (source.place == ConvSource::Place::kHistory ? s.history : 0);
  EXPECT_LT(frame, source.place == ConvSource::Place::kHistory ? 0 : s.frames);
  return 1.0 + channel + s.channels_in * x + 1000.0 * y + 100000.0 * (frame + s.history);
}

TEST(ConvIndex, EveryTapReadsItsElement) {
  for (const ConvShape& s :
       {Example(3, 3, 3, 0, 0), Example(3, 3, 3, 1, 0), Example(3, 3, 3, 2, 0),
        Example(3, 1, 1, 2, 0), Example(1, 3, 3, 0, 1), Example(1, 1, 5, 0, 0)}) {
    for (std::int64_t i = 0; i < s.pixels(); ++i) {
      const ConvPixel pixel = ConvPixel::At(s, i);
      ASSERT_EQ(
          (static_cast<std::int64_t>(pixel.t) * s.out_height() + pixel.y) * s.out_width() + pixel.x,
          i);
      for (int k = 0; k < s.depth(); k += 8) {
        const ConvTap tap = ConvTap::At(s, k);
        const double expected =
            Element(s, pixel.t + tap.dt - (s.kt - 1), pixel.y + tap.dy - s.kh / 2,
                    pixel.x + tap.dx - s.kw / 2, tap.channel);
        ASSERT_EQ(Fetch(s, ConvSource::Find(s, pixel, tap)), expected)
            << "pixel " << i << " k " << k;
      }
    }
  }
}

TEST(ConvIndex, AdvancingIsCounting) {
  for (const int channels : {8, 16, 24, 96}) {
    ConvShape s = Example(3, 3, 3, 0, 0);
    s.channels_in = channels;
    for (int start = 0; start < 32; start += 8) {
      ConvTap tap = ConvTap::At(s, start);
      for (int k = start; k < s.depth(); k += 32) {
        const ConvTap expected = ConvTap::At(s, k);
        ASSERT_EQ(tap.dt, expected.dt);
        ASSERT_EQ(tap.dy, expected.dy);
        ASSERT_EQ(tap.dx, expected.dx);
        ASSERT_EQ(tap.channel, expected.channel);
        tap.Advance(s, 32);
      }
      EXPECT_GE(tap.dt, s.kt) << "beyond the last tap nothing may be read";
    }
  }
}

}  // namespace
}  // namespace slalom::cuda
