#include "model/token_order.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/tensor.h"
#include "model/rope.h"

namespace slalom {
namespace {

TEST(TokenOrder, OneTokenTilesAreTheRaster) {
  const std::vector<std::int32_t> order = TileOrder({2, 3, 4}, {});
  for (std::size_t i = 0; i < order.size(); ++i) {
    EXPECT_EQ(order[i], static_cast<std::int32_t>(i));
  }
  EXPECT_EQ(order.size(), 24u);
}

TEST(TokenOrder, BoxesStandTogetherAndEndsAreShort) {
  // Two rows of three: boxes of 2 x 2, then 2 x 1.
  EXPECT_EQ(TileOrder({1, 2, 3}, {1, 2, 2}), (std::vector<std::int32_t>{0, 1, 3, 4, 2, 5}));
  // Two frames of one row: a box holds both frames.
  EXPECT_EQ(TileOrder({2, 1, 3}, {4, 4, 2}), (std::vector<std::int32_t>{0, 1, 3, 4, 2, 5}));
}

TEST(TokenOrder, IsAPermutation) {
  for (const TokenTile& tile : {TokenTile{4, 4, 4}, TokenTile{1, 8, 8}, TokenTile{3, 5, 2}}) {
    std::vector<std::int32_t> order = TileOrder({5, 6, 9}, tile);
    std::sort(order.begin(), order.end());
    std::vector<std::int32_t> all(5 * 6 * 9);
    std::iota(all.begin(), all.end(), 0);
    EXPECT_EQ(order, all);
  }
}

TEST(TokenOrder, AnglesFollowTheirTokens) {
  const std::unique_ptr<Backend> backend = MakeBackend(Device{}, {});
  const TokenGrid grid = {3, 4, 5};
  const RopeTables raster = MakeRopeTables(*backend, grid, 16, 64);
  const RopeTables tiled = MakeRopeTables(*backend, grid, 16, 64, {2, 2, 2});
  EXPECT_FALSE(raster.order.defined());
  ASSERT_TRUE(tiled.order.defined());
  for (std::int64_t i = 0; i < grid.size(); ++i) {
    const std::int32_t token = tiled.order.data<std::int32_t>()[i];
    EXPECT_EQ(tiled.place.data<std::int32_t>()[token], i);
    for (std::int64_t p = 0; p < 8; ++p) {
      EXPECT_EQ(tiled.cos.data<float>()[i * 8 + p], raster.cos.data<float>()[token * 8 + p]);
      EXPECT_EQ(tiled.sin.data<float>()[i * 8 + p], raster.sin.data<float>()[token * 8 + p]);
    }
  }
}

}  // namespace
}  // namespace slalom
