// Small host tensors as floats. Internal to model/.
#pragma once

#include <vector>

#include "kernels/core/tensor.h"

namespace slalom {

// The values of a host tensor of type f32, bf16, f16 or f64. Throws Error(kInternal) otherwise.
std::vector<float> ToFloats(const Tensor& tensor);

}  // namespace slalom
