#include "model/host_floats.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/core/error.h"

namespace slalom {
namespace {

float HalfToFloat(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 0x1f;
  const int fraction = bits & 0x3ff;
  float magnitude;
  if (exponent == 0x1f) {
    magnitude = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(fraction + 0x400), exponent - 25);
  }
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

}  // namespace

std::vector<float> ToFloats(const Tensor& tensor) {
  std::vector<float> values(static_cast<std::size_t>(tensor.NumElements()));
  const auto convert = [&](const auto* data, const auto& function) {
    std::transform(data, data + values.size(), values.begin(), function);
  };
  switch (tensor.dtype()) {
    case DType::kF32:
      convert(tensor.data<const float>(), [](float x) { return x; });
      return values;
    case DType::kBF16:
      convert(tensor.data<const BFloat16>(), [](BFloat16 x) { return static_cast<float>(x); });
      return values;
    case DType::kF16:
      convert(tensor.data<const std::uint16_t>(), HalfToFloat);
      return values;
    case DType::kF64:
      convert(tensor.data<const double>(), [](double x) { return static_cast<float>(x); });
      return values;
    default:
      throw Error(ErrorCode::kInternal,
                  std::string("ToFloats: element type ") + DTypeName(tensor.dtype()));
  }
}

}  // namespace slalom
