// Classifier-free guidance (Ho & Salimans, 2022).
#pragma once

#include "kernels/backend.h"
#include "kernels/core/tensor.h"

namespace slalom {

// At a scale of 1 or less the unconditional half cancels or is not wanted: the references skip it.
inline bool UsesGuidance(double scale) { return scale > 1.0; }

// v_u + scale * (v_c - v_u), in f32; a new tensor.
Tensor Guide(Backend& backend, const Tensor& conditional, const Tensor& unconditional,
             double scale);

}  // namespace slalom
