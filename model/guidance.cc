#include "model/guidance.h"

#include <array>

namespace slalom {

Tensor Guide(Backend& backend, const Tensor& conditional, const Tensor& unconditional,
             double scale) {
  const std::array inputs = {unconditional, conditional};
  const std::array coefficients = {static_cast<float>(1.0 - scale), static_cast<float>(scale)};
  Tensor out = backend.Allocate(conditional.shape(), DType::kF32);
  backend.Combine({.inputs = inputs, .coefficients = coefficients, .out = out});
  return out;
}

}  // namespace slalom
