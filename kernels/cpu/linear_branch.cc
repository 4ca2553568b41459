#include "kernels/cpu/linear_branch.h"

#include <algorithm>

namespace slalom {

void LinearBranch::AddKeys(const float* features, const float* divisors, const float* values,
                           std::int64_t rows, bool start, float* state) const {
  kernels_.gemm({.m = size_,
                 .n = width_,
                 .k = rows,
                 .a = features,
                 .a_row = 1,
                 .a_column = width_,
                 .b = values,
                 .ldb = width_,
                 .c = state,
                 .ldc = width_,
                 .accumulate = !start});
  float* sums = state + size_ * width_;
  if (start) std::fill_n(sums, width_, 0.0f);
  for (std::int64_t r = 0; r < rows; ++r) kernels_.f32.add(divisors + r * width_, size_, sums);
}

void LinearBranch::Query(const float* features, const float* divisors, const float* state,
                         std::int64_t rows, float* out) const {
  constexpr float kEpsilon = 1e-5f;
  kernels_.gemm({.m = rows,
                 .n = width_,
                 .k = size_,
                 .a = features,
                 .a_row = width_,
                 .b = state,
                 .ldb = width_,
                 .c = out,
                 .ldc = width_});
  for (std::int64_t r = 0; r < rows; ++r) {
    const float divisor = kernels_.dot(divisors + r * width_, Divisors(state), size_) + kEpsilon;
    kernels_.f32.widen(out + r * width_, 1.0f / divisor, width_, out + r * width_);
  }
}

}  // namespace slalom
