// The sums that linear attention is made of. A state is phi(K)^T V, [D, padded D], followed by the
// sum of the divisor's features, [padded D].
#pragma once

#include <cstdint>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/simd/kernels.h"

namespace slalom {

class LinearBranch {
 public:
  LinearBranch(const simd::Kernels& kernels, const TileLayout& layout)
      : kernels_(kernels), size_(layout.head_size), width_(layout.padded_size()) {}

  std::int64_t state_floats() const { return size_ * width_ + width_; }
  const float* Divisors(const float* state) const { return state + size_ * width_; }

  // Adds some keys to a state (or starts it): features, divisors and values are [rows, padded D].
  void AddKeys(const float* features, const float* divisors, const float* values, std::int64_t rows,
               bool start, float* state) const;
  // out[r] = features[r] state / (divisors[r] . state's sums + 1e-5), [rows, padded D].
  void Query(const float* features, const float* divisors, const float* state, std::int64_t rows,
             float* out) const;

 private:
  const simd::Kernels& kernels_;
  std::int64_t size_;
  std::int64_t width_;
};

}  // namespace slalom
