// Allocation, copies and conversions.
#include <cmath>
#include <limits>

#include "kernels/core/error.h"
#include "tests/unit/kernels/device_test.h"

namespace slalom {
namespace {

using reference::Array;

class MemoryTest : public OpTest {};

TEST_P(MemoryTest, CopyConverts) {
  const Array x = Random(Shape{5, 1003}, DType::kF32, 3.0);
  const Array back = Download(Upload(x, type()));
  for (std::int64_t i = 0; i < x.size(); ++i) {
    const auto single = static_cast<float>(x[i]);
    const float wanted = type() == DType::kBF16 ? static_cast<float>(BFloat16(single)) : single;
    ASSERT_EQ(back[i], wanted) << i;
  }
}

TEST_P(MemoryTest, CopyReadsHalfAndDouble) {
  const std::vector<std::uint16_t> halves = {0x0000, 0x3C00, 0xC000, 0x0001,
                                             0x7BFF, 0x7C00, 0x3555};
  const std::vector<float> values = {
      0, 1, -2, 0x1p-24f, 65504, std::numeric_limits<float>::infinity(), 0.333251953125f};
  const Tensor half = Tensor::Host(Shape{7}, DType::kF16);
  const Tensor wide = Tensor::Host(Shape{7}, DType::kF64);
  std::copy(halves.begin(), halves.end(), half.data<std::uint16_t>());
  std::copy(values.begin(), values.end(), wide.data<double>());
  for (const Tensor& from : {half, wide}) {
    const Tensor to = Poisoned(Shape{7}, type());
    backend().Copy(from, to);
    const Array result = Download(to);
    for (std::int64_t i = 0; i < 7; ++i) {
      const float value = values[static_cast<std::size_t>(i)];
      EXPECT_EQ(result[i], type() == DType::kBF16 ? static_cast<float>(BFloat16(value)) : value);
    }
  }
}

TEST_P(MemoryTest, CopyRefusesAnotherSize) {
  EXPECT_THROW(backend().Copy(Poisoned(Shape{3}, type()), Poisoned(Shape{4}, type())), Error);
}

TEST_P(MemoryTest, ZeroIsZero) {
  const Tensor x = Poisoned(Shape{1000}, type());
  backend().Zero(x);
  for (const double v : Download(x).values) ASSERT_EQ(v, 0.0);
}

TEST_P(MemoryTest, TheArenaCountsAndReuses) {
  backend().ResetPeak();
  const std::size_t before = backend().Memory().bytes_in_use;
  const std::size_t size = std::size_t{8} << 20;
  {
    const Tensor x = backend().Allocate(Shape{8, 1 << 20}, DType::kU8);
    EXPECT_GE(backend().Memory().bytes_in_use, before + size);
  }
  const MemoryStats after = backend().Memory();
  EXPECT_EQ(after.bytes_in_use, before);
  EXPECT_GE(after.bytes_peak, before + size);
  EXPECT_GT(after.bytes_total, size);
  const std::size_t reserved = after.bytes_reserved;
  const Tensor again = backend().Allocate(Shape{8, 1 << 20}, DType::kU8);
  EXPECT_EQ(backend().Memory().bytes_reserved, reserved) << "a freed block was not used again";
}

TEST_P(MemoryTest, TooMuchIsAnError) {
  try {
    const Tensor x = backend().Allocate(Shape{std::int64_t{1} << 55}, DType::kU8);
    FAIL() << "32 PiB were handed out";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kResourceExhausted);
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, MemoryTest, testing::ValuesIn(OpCases()), OpCaseName);

}  // namespace
}  // namespace slalom
