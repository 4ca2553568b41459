// Wan's transformer once more: in double precision, one sample, dense attention, loops as the
// formulas are written. What the fast one is held against.
#pragma once

#include <vector>

#include "model/config.h"
#include "model/weights.h"

namespace slalom {

// latent [C, F, 2h, 2w], text [rows, text_dim] with rows <= text_len; returns the velocity, shaped
// like the latent.
std::vector<double> ReferenceTransformer(const Weights& weights, const TransformerConfig& config,
                                         const std::vector<double>& latent, int frames, int height,
                                         int width, double timestep,
                                         const std::vector<double>& text);

}  // namespace slalom
