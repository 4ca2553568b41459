// Element conversions and a typed visit over the two compute types.
#pragma once

#include "kernels/core/dtype.h"

namespace slalom {

inline float ToFloat(float value) { return value; }
inline float ToFloat(BFloat16 value) { return static_cast<float>(value); }

template <typename T>
T FromFloat(float value) {
  return static_cast<T>(value);
}

// Calls visitor(T{}) with T = float or BFloat16; the caller has checked that dtype is one of them.
template <typename Visitor>
void VisitCompute(DType dtype, Visitor&& visitor) {
  if (dtype == DType::kBF16) {
    visitor(BFloat16{});
  } else {
    visitor(float{});
  }
}

}  // namespace slalom
