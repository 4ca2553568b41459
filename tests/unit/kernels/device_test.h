// One test body per operation, run on every device and compute type.
//
// Inputs are random, from a seed that a failure prints; --gtest_random_seed=N repeats it. Outputs
// are poisoned with NaN before each run. The error rule: against the double-precision reference,
// the worst element may be off by at most twice what the worst element of a plain implementation in
// the same type is off by. NaN never passes.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "tests/reference/array.h"

namespace slalom {

struct DeviceCase {
  std::string name;  // letters and digits
  // Null where this machine has no such device: the tests say so and are skipped.
  std::function<std::unique_ptr<Backend>()> make;
};

// Defined once per test program: devices_cpu.cc or devices_cuda.cc.
std::vector<DeviceCase> DeviceCases();

struct OpCase {
  DeviceCase device;
  DType type = DType::kF32;
};

std::vector<OpCase> OpCases();
std::string OpCaseName(const testing::TestParamInfo<OpCase>& info);

class OpTest : public testing::TestWithParam<OpCase> {
 protected:
  void SetUp() override;

  Backend& backend() { return *backend_; }
  DType type() const { return GetParam().type; }

  // N(0, scale^2) values, rounded to `type` so that the device sees exactly these.
  reference::Array Random(const Shape& shape, DType type, double scale = 1.0, double mean = 0.0);
  std::int64_t RandomInt(std::int64_t low, std::int64_t high);

  Tensor Upload(const reference::Array& array, DType type);
  // Undefined for an undefined array.
  Tensor UploadIf(const reference::Array& array, DType type);
  // A tensor full of NaN (of 0xFF bytes).
  Tensor Poisoned(const Shape& shape, DType type);
  reference::Array Download(const Tensor& tensor);
  std::vector<std::uint8_t> DownloadBytes(const Tensor& tensor);

  // The error rule. `floor` is what is forgiven on top, in float32 units in the last place of the
  // largest value: a plain implementation can be lucky in the few elements of a test. In bf16,
  // where rounding the result outweighs all else, it is one unit of that type. `forgiven` is
  // absolute.
  void ExpectClose(const Tensor& actual, const reference::Array& exact,
                   const reference::Array& plain, const std::string& what, double floor = 8.0,
                   double forgiven = 0.0);
  // Calls run(P{}) with the plain policy of type().
  template <typename Run>
  reference::Array Plain(const Run& run) {
    return type() == DType::kBF16 ? run(reference::PlainBF16{}) : run(reference::PlainF32{});
  }

 private:
  std::unique_ptr<Backend> backend_;
  std::mt19937_64 generator_;
  std::unique_ptr<testing::ScopedTrace> trace_;
};

// Values, bit for bit.
std::vector<std::uint8_t> HostBytes(const Tensor& host);

}  // namespace slalom
