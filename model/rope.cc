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

}  // namespace

RopeTables MakeRopeTables(Backend& backend, const TokenGrid& grid, int head_dim,
                          int max_positions) {
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
  for (std::int64_t t = 0; t < grid.frames; ++t) {
    for (std::int64_t y = 0; y < grid.height; ++y) {
      for (std::int64_t x = 0; x < grid.width; ++x) {
        frames.CopyTo(t, c, s);
        rows.CopyTo(y, c, s);
        columns.CopyTo(x, c, s);
      }
    }
  }
  RopeTables tables = {grid, backend.Allocate(shape, DType::kF32),
                       backend.Allocate(shape, DType::kF32)};
  backend.Copy(cos, tables.cos);
  backend.Copy(sin, tables.sin);
  return tables;
}

}  // namespace slalom
