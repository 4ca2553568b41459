// Rotary position embedding over frames, rows and columns of a clip (Su et al. 2021; Wan's 3D
// form).
#pragma once

#include "kernels/attention.h"
#include "kernels/backend.h"
#include "kernels/core/tensor.h"
#include "model/token_order.h"

namespace slalom {

// What a clip's size says about its tokens: one angle per token and channel pair, and their order.
// Concurrent reads are safe.
struct RopeTables {
  TokenGrid grid;
  TokenTile tile;
  Tensor cos;  // [L, D / 2] f32
  Tensor sin;  // [L, D / 2] f32
  // Undefined when tokens stand in raster order.
  Tensor order;  // [L] i32: the raster index of each token; cos and sin follow it
  Tensor place;  // [L] i32: its inverse, where each raster index stands
};

// The tables of a grid, on the backend's device. Of the D / 2 pairs of a head the last two thirds
// (D / 6 each, rounded down) turn with the row and the column, what is left in front with the
// frame; each axis has the frequencies of its own width. Angles are made in fp64, as diffusers
// does. Throws Error(kInvalidArgument) when an axis is longer than max_positions.
RopeTables MakeRopeTables(Backend& backend, const TokenGrid& grid, int head_dim, int max_positions,
                          const TokenTile& tile = {});

}  // namespace slalom
