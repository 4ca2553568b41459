// kernels/core: random numbers, tensors, devices, types.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "kernels/attention.h"
#include "kernels/core/error.h"
#include "kernels/core/random.h"
#include "kernels/core/tensor.h"

namespace slalom {
namespace {

// Known answers of the Random123 distribution, philox4x32 with 10 rounds.
TEST(Philox, KnownAnswers) {
  using Words = std::array<std::uint32_t, 4>;
  EXPECT_EQ(Philox4x32(0, 0, 0), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox4x32(~0ull, ~0ull, ~0ull),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32(0x299f31d0a4093822ull, 0x0370734413198a2eull, 0x85a308d3243f6a88ull),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(FillNormal, MomentsAndDistribution) {
  std::vector<float> x(1 << 20);
  FillNormal(20260101, 7, 0, x);
  const auto n = static_cast<double>(x.size());
  double mean = 0, variance = 0, skew = 0, kurtosis = 0;
  for (const float v : x) mean += v;
  mean /= n;
  for (const float v : x) {
    const double d = v - mean;
    variance += d * d;
    skew += d * d * d;
    kurtosis += d * d * d * d;
  }
  variance /= n;
  // Five standard errors each.
  EXPECT_NEAR(mean, 0, 5 / std::sqrt(n));
  EXPECT_NEAR(variance, 1, 5 * std::sqrt(2 / n));
  EXPECT_NEAR(skew / n, 0, 5 * std::sqrt(6 / n));
  EXPECT_NEAR(kurtosis / n, 3, 5 * std::sqrt(24 / n));

  // Kolmogorov and Smirnov: the largest distance from the normal distribution function.
  std::sort(x.begin(), x.end());
  double distance = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double cdf = 0.5 * std::erfc(-static_cast<double>(x[i]) / std::sqrt(2.0));
    distance = std::max(distance, std::abs(cdf - (static_cast<double>(i) + 0.5) / n));
  }
  EXPECT_LT(distance, 1.95 / std::sqrt(n));  // 0.1 %
}

TEST(FillNormal, ElementsDependOnTheirIndexAlone) {
  std::vector<float> whole(1001), part(300), other(1001);
  FillNormal(5, 9, 0, whole);
  for (const std::uint64_t offset : {0, 1, 2, 333, 700}) {
    FillNormal(5, 9, offset, part);
    EXPECT_TRUE(std::equal(part.begin(), part.end(), whole.begin() + static_cast<long>(offset)));
  }
  FillNormal(5, 10, 0, other);
  EXPECT_NE(whole, other);
  FillNormal(6, 9, 0, other);
  EXPECT_NE(whole, other);
}

// The same bits on every machine: centre, middle and tail of the inverse distribution function.
TEST(FillNormal, GoldenBits) {
  constexpr std::array<std::uint32_t, 12> kGolden = {
      0xbf927863, 0x3f0edfcb, 0x4018b6de, 0xbf40cc81, 0xbf949cf1, 0xbed3d968,
      0x3ef04a1e, 0xbfee1d5d, 0x3e4a8155, 0x3e624e82, 0x3fe9f3c3, 0x3f43f829};
  std::vector<float> x(kGolden.size());
  FillNormal(42, 1, 0, x);
  for (std::size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(std::bit_cast<std::uint32_t>(x[i]), kGolden[i]) << i << ": " << x[i];
  }
  std::vector<float> many(1 << 20);
  FillNormal(42, 1, 0, many);
  std::uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a over all the bits
  for (const float v : many) {
    const auto bits = std::bit_cast<std::uint32_t>(v);
    for (int byte = 0; byte < 4; ++byte)
      hash = (hash ^ ((bits >> (8 * byte)) & 0xffu)) * 0x100000001b3ull;
  }
  EXPECT_EQ(hash, 0xb270cd115e6fed28ull);
}

TEST(BFloat16, RoundsToNearestEven) {
  const auto round = [](float x) { return static_cast<float>(BFloat16(x)); };
  EXPECT_EQ(round(1.0f), 1.0f);
  EXPECT_EQ(round(1.0f + 0x1p-8f), 1.0f);                // half way, even below
  EXPECT_EQ(round(1.0f + 3 * 0x1p-8f), 1.0f + 0x1p-6f);  // half way, even above
  EXPECT_EQ(round(1.0f + 0x1.8p-8f), 1.0f + 0x1p-7f);
  EXPECT_TRUE(std::isnan(round(std::bit_cast<float>(0x7f800001u))));
  EXPECT_TRUE(std::isinf(round(3.4028234e38f)));
}

TEST(Tensor, ViewsShareMemory) {
  const std::vector<float> values = {0, 1, 2, 3, 4, 5};
  const Tensor x = Tensor::FromFloats(Shape{3, 2}, values);
  EXPECT_EQ(x.Slice(1, 3).Reshape(Shape{4}).data<float>()[0], 2.0f);
  x.data<float>()[5] = 9;
  EXPECT_EQ(x.Slice(2, 3).data<float>()[1], 9.0f);
  EXPECT_EQ(x.dim(-1), 2);
  EXPECT_THROW(x.Reshape(Shape{5}), Error);
  EXPECT_THROW(x.Slice(2, 4), Error);
  EXPECT_THROW(x.dim(2), Error);
  EXPECT_THROW(Tensor::FromFloats(Shape{7}, values), Error);
}

TEST(Shape, RefusesNonsense) {
  EXPECT_THROW((Shape{1, 1, 1, 1, 1, 1, 1}), Error);
  EXPECT_THROW((Shape{2, -1}), Error);
  EXPECT_EQ(ToString(Shape{2, 3}), "[2, 3]");
  EXPECT_EQ((Shape{2, 3}).NumElements(), 6);
  EXPECT_FALSE((Shape{2, 3}) == (Shape{3, 2}));
}

TEST(Device, Parses) {
  EXPECT_TRUE(ParseDevice("cpu").is_cpu());
  EXPECT_EQ(ParseDevice("cuda"), (Device{Device::Kind::kCuda, 0}));
  EXPECT_EQ(ParseDevice("cuda:3"), (Device{Device::Kind::kCuda, 3}));
  EXPECT_EQ(ToString(ParseDevice("cuda:3")), "cuda:3");
  for (const char* bad : {"", "gpu", "cuda:", "cuda:-1", "cuda:1x", "cuda:99999999999", "CPU"}) {
    EXPECT_THROW(ParseDevice(bad), Error) << bad;
  }
}

TEST(BlockCounts, FollowTheSettings) {
  EXPECT_EQ(CriticalBlocks(0.05, 512), 25);
  EXPECT_EQ(CriticalBlocks(0.05, 3), 1);
  EXPECT_EQ(CriticalBlocks(1.0, 7), 7);
  EXPECT_EQ(NegligibleBlocks(0.1, 512, 25), 51);
  EXPECT_EQ(NegligibleBlocks(0.9, 10, 5), 5);
  EXPECT_EQ(NegligibleBlocks(0.1, 3, 1), 0);
}

}  // namespace
}  // namespace slalom
