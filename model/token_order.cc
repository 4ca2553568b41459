#include "model/token_order.h"

#include <algorithm>

namespace slalom {
namespace {

// Calls visit(begin, end) for every box along one axis.
template <typename Visit>
void ForBoxes(std::int64_t size, int box, const Visit& visit) {
  for (std::int64_t begin = 0; begin < size; begin += box) {
    visit(begin, std::min(begin + box, size));
  }
}

}  // namespace

std::vector<std::int32_t> TileOrder(const TokenGrid& grid, const TokenTile& tile) {
  std::vector<std::int32_t> order;
  order.reserve(static_cast<std::size_t>(grid.size()));
  ForBoxes(grid.frames, tile.frames, [&](std::int64_t t0, std::int64_t t1) {
    ForBoxes(grid.height, tile.rows, [&](std::int64_t y0, std::int64_t y1) {
      ForBoxes(grid.width, tile.columns, [&](std::int64_t x0, std::int64_t x1) {
        for (std::int64_t t = t0; t < t1; ++t) {
          for (std::int64_t y = y0; y < y1; ++y) {
            for (std::int64_t x = x0; x < x1; ++x) {
              order.push_back(static_cast<std::int32_t>((t * grid.height + y) * grid.width + x));
            }
          }
        }
      });
    });
  });
  return order;
}

}  // namespace slalom
