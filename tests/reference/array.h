// Arrays of doubles for the reference operations, and how they round.
#pragma once

#include <cstdint>
#include <functional>
#include <numeric>
#include <vector>

#include "kernels/core/tensor.h"

namespace slalom::reference {

// A dense row-major array; every value that a test feeds to a device is exact in the device's type.
struct Array {
  Shape shape;
  std::vector<double> values;

  Array() = default;
  explicit Array(const Shape& s)
      : shape(s), values(static_cast<std::size_t>(s.NumElements()), 0.0) {}

  bool defined() const { return shape.rank() > 0; }
  std::int64_t dim(int i) const { return shape[i]; }
  std::int64_t size() const { return static_cast<std::int64_t>(values.size()); }
  double& operator[](std::int64_t i) { return values[static_cast<std::size_t>(i)]; }
  double operator[](std::int64_t i) const { return values[static_cast<std::size_t>(i)]; }
};

// The policies that the operations are templates over: Real is what sums run in, Store is what
// happens to a value that a plain implementation would write to memory.

// The truth: double all the way.
struct Exact {
  using Real = double;
  static Real Store(Real x) { return x; }
};

// What a straightforward float program does.
struct PlainF32 {
  using Real = float;
  static Real Store(Real x) { return x; }
};

// What a straightforward bf16 program does: float sums, every stored value rounded.
struct PlainBF16 {
  using Real = float;
  static Real Store(Real x) { return static_cast<float>(BFloat16(x)); }
};

}  // namespace slalom::reference
