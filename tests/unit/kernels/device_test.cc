#include "tests/unit/kernels/device_test.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace slalom {
namespace {

double RoundTo(double value, DType type) {
  const auto single = static_cast<float>(value);
  return type == DType::kBF16 ? static_cast<float>(BFloat16(single)) : single;
}

double Epsilon(DType type) { return type == DType::kBF16 ? 0x1p-8 : 0x1p-24; }

}  // namespace

std::vector<OpCase> OpCases() {
  std::vector<OpCase> cases;
  for (const DeviceCase& device : DeviceCases()) {
    cases.push_back({device, DType::kF32});
    cases.push_back({device, DType::kBF16});
  }
  return cases;
}

std::string OpCaseName(const testing::TestParamInfo<OpCase>& info) {
  return info.param.device.name + (info.param.type == DType::kBF16 ? "_bf16" : "_f32");
}

void OpTest::SetUp() {
  if (!GetParam().device.make) GTEST_SKIP() << "this machine has no " << GetParam().device.name;
  backend_ = GetParam().device.make();
  const auto flag = static_cast<std::uint64_t>(GTEST_FLAG_GET(random_seed));
  const std::uint64_t seed = flag != 0 ? flag : std::random_device{}() % 99999 + 1;
  generator_.seed(seed);
  trace_ = std::make_unique<testing::ScopedTrace>(
      __FILE__, __LINE__, "repeat with --gtest_random_seed=" + std::to_string(seed));
}

reference::Array OpTest::Random(const Shape& shape, DType type, double scale, double mean) {
  reference::Array array(shape);
  std::normal_distribution<double> normal(mean, scale);
  for (double& v : array.values) v = RoundTo(normal(generator_), type);
  return array;
}

std::int64_t OpTest::RandomInt(std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(generator_);
}

Tensor OpTest::Upload(const reference::Array& array, DType type) {
  const Tensor host = Tensor::Host(array.shape, DType::kF32);
  std::copy(array.values.begin(), array.values.end(), host.data<float>());
  Tensor device = backend_->Allocate(array.shape, type);
  backend_->Copy(host, device);
  return device;
}

Tensor OpTest::UploadIf(const reference::Array& array, DType type) {
  return array.defined() ? Upload(array, type) : Tensor();
}

Tensor OpTest::Poisoned(const Shape& shape, DType type) {
  const Tensor host = Tensor::Host(shape, type);
  std::memset(host.raw(), 0xFF, host.NumBytes());
  Tensor device = backend_->Allocate(shape, type);
  backend_->Copy(host, device);
  return device;
}

reference::Array OpTest::Download(const Tensor& tensor) {
  const Tensor host = Tensor::Host(tensor.shape(), DType::kF32);
  backend_->Copy(tensor, host);
  reference::Array array(tensor.shape());
  std::copy_n(host.data<float>(), array.values.size(), array.values.begin());
  return array;
}

std::vector<std::uint8_t> OpTest::DownloadBytes(const Tensor& tensor) {
  const Tensor host = Tensor::Host(tensor.shape(), tensor.dtype());
  backend_->Copy(tensor, host);
  return HostBytes(host);
}

std::vector<std::uint8_t> HostBytes(const Tensor& host) {
  return {host.data<std::uint8_t>(), host.data<std::uint8_t>() + host.NumBytes()};
}

void OpTest::ExpectClose(const Tensor& actual, const reference::Array& exact,
                         const reference::Array& plain, const std::string& what, double floor,
                         double forgiven) {
  const reference::Array values = Download(actual);
  ASSERT_EQ(values.size(), exact.size()) << what;
  ASSERT_EQ(plain.size(), exact.size()) << what;
  double largest = 0;
  double plain_error = 0;
  double error = 0;
  std::int64_t worst = 0;
  for (std::int64_t i = 0; i < exact.size(); ++i) {
    ASSERT_TRUE(std::isfinite(values[i])) << what << ": element " << i << " is " << values[i];
    largest = std::max(largest, std::abs(exact[i]));
    plain_error = std::max(plain_error, std::abs(plain[i] - exact[i]));
    if (std::abs(values[i] - exact[i]) > error) {
      error = std::abs(values[i] - exact[i]);
      worst = i;
    }
  }
  const double units = actual.dtype() == DType::kBF16 ? 1.0 : floor;
  const double allowed = 2.0 * plain_error + units * Epsilon(actual.dtype()) * largest + forgiven;
  EXPECT_LE(error, allowed) << what << ": element " << worst << " of " << ToString(actual.shape())
                            << " is " << values[worst] << ", exactly " << exact[worst]
                            << "; a plain implementation is off by " << plain_error;
}

}  // namespace slalom
