#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "kernels/core/error.h"

namespace slalom {
namespace {

constexpr double kBase = 10000.0;

// Writes the angles of one axis at `position` into `pairs` entries.
void FillAxis(double position, int pairs, float* cos, float* sin) {
  const double width = 2.0 * pairs;
  for (int j = 0; j < pairs; ++j) {
    const double angle = position * std::pow(kBase, -2.0 * j / width);
    cos[j] = static_cast<float>(std::cos(angle));
    sin[j] = static_cast<float>(std::sin(angle));
  }
}

struct Axis {
  int pairs;
  std::vector<float> cos;  // [positions, pairs]
  std::vector<float> sin;

  Axis(std::int64_t positions, int pairs)
      : pairs(pairs), cos(static_cast<std::size_t>(positions * pairs)), sin(cos.size()) {
    for (std::int64_t p = 0; p < positions; ++p) {
      FillAxis(static_cast<double>(p), pairs, cos.data() + p * pairs, sin.data() + p * pairs);
    }
  }
  void CopyTo(std::int64_t position, float*& cos_out, float*& sin_out) const {
    cos_out = std::copy_n(cos.data() + position * pairs, pairs, cos_out);
    sin_out = std::copy_n(sin.data() + position * pairs, pairs, sin_out);
  }
};

void PutOrder(Backend& backend, const std::vector<std::int32_t>& order, RopeTables& tables) {
  const auto length = static_cast<std::int64_t>(order.size());
  Tensor raster = Tensor::Host({length}, DType::kI32);
  Tensor place = Tensor::Host({length}, DType::kI32);
  for (std::int64_t i = 0; i < length; ++i) {
    const std::int32_t token = order[static_cast<std::size_t>(i)];
    raster.data<std::int32_t>()[i] = token;
    place.data<std::int32_t>()[token] = static_cast<std::int32_t>(i);
  }
  tables.order = backend.Allocate({length}, DType::kI32);
  tables.place = backend.Allocate({length}, DType::kI32);
  backend.Copy(raster, tables.order);
  backend.Copy(place, tables.place);
}

}  // namespace

RopeTables MakeRopeTables(Backend& backend, const TokenGrid& grid, int head_dim, int max_positions,
                          const TokenTile& tile) {
  if (std::max({grid.frames, grid.height, grid.width}) > max_positions) {
    throw Error(ErrorCode::kInvalidArgument,
                "the clip has more than " + std::to_string(max_positions) +
                    " token positions along one axis, for which the model has no angles");
  }
  const int space_pairs = head_dim / 6;
  const int time_pairs = head_dim / 2 - 2 * space_pairs;
  const Axis frames(grid.frames, time_pairs);
  const Axis rows(grid.height, space_pairs);
  const Axis columns(grid.width, space_pairs);

  const Shape shape = {grid.size(), head_dim / 2};
  Tensor cos = Tensor::Host(shape, DType::kF32);
  Tensor sin = Tensor::Host(shape, DType::kF32);
  auto* c = cos.data<float>();
  auto* s = sin.data<float>();
  const std::vector<std::int32_t> order = TileOrder(grid, tile);
  for (const std::int32_t token : order) {
    frames.CopyTo(token / (grid.height * grid.width), c, s);
    rows.CopyTo(token / grid.width % grid.height, c, s);
    columns.CopyTo(token % grid.width, c, s);
  }
  RopeTables tables = {.grid = grid,
                       .tile = tile,
                       .cos = backend.Allocate(shape, DType::kF32),
                       .sin = backend.Allocate(shape, DType::kF32)};
  backend.Copy(cos, tables.cos);
  backend.Copy(sin, tables.sin);
  if (!tile.raster()) PutOrder(backend, order, tables);
  return tables;
}

}  // namespace slalom
