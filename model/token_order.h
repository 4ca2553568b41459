// The order in which tokens stand in the transformer: raster, or boxes of tokens that are near in
// space and time.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention.h"

namespace slalom {

// A box of tokens that stand together (VSA, arXiv 2505.13389, section 3), so that a block of sparse
// attention is near in space and time. 1 x 1 x 1 is the raster order.
struct TokenTile {
  int frames = 1;
  int rows = 1;
  int columns = 1;

  bool raster() const { return frames == 1 && rows == 1 && columns == 1; }
  bool operator==(const TokenTile&) const = default;
};

// The raster index of each token in the order of the tiles: boxes stand in raster order, and so do
// the tokens inside a box. Boxes at the far ends are smaller where the tile does not divide the
// grid. model/finetune/slalom_finetune/token_order.py computes the same.
std::vector<std::int32_t> TileOrder(const TokenGrid& grid, const TokenTile& tile);

}  // namespace slalom
