#include "kernels/cpu/gemm.h"

#include <algorithm>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/scratch.h"

namespace slalom {
namespace {

constexpr std::int64_t kRows = 64;
constexpr std::int64_t kColumns = 64;

// The weight's rows [begin, begin + columns) as a [K, kColumns] block, in f32; zeros beyond.
template <typename T>
void PackWeight(const simd::Kernels& kernels, const T* weight, std::int64_t columns, std::int64_t k,
                float* rows, float* packed) {
  if (columns < kColumns) std::fill_n(packed, k * kColumns, 0.0f);
  for (std::int64_t c = 0; c < columns; ++c) {
    simd::Rows<T>(kernels).widen(weight + c * k, 1.0f, k, rows + c * k);
  }
  kernels.transpose(rows, columns, k, k, packed, kColumns);
}

// One tile of the result, from its sums to its place.
template <typename Out>
void StoreTile(const simd::Kernels& kernels, const MatmulCall& call, std::int64_t row,
               std::int64_t rows, std::int64_t column, std::int64_t columns, const float* sums,
               float* line, float* residual_line) {
  const auto& loops = simd::Rows<Out>(kernels);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t at = (row + r) * call.n + column;
    const float* residual = nullptr;
    if (call.residual != nullptr) {
      loops.widen(static_cast<const Out*>(call.residual) + at, 1.0f, columns, residual_line);
      residual = residual_line;
    }
    kernels.epilogue(sums + r * kColumns, call.bias != nullptr ? call.bias + column : nullptr,
                     call.activation, call.gate != nullptr ? call.gate + column : nullptr, residual,
                     columns, line);
    loops.narrow(line, columns, static_cast<Out*>(call.out) + at);
  }
}

template <typename T>
void Run(const simd::Kernels& kernels, const Parallel& parallel, Arena& arena,
         const MatmulCall& call) {
  const std::int64_t k = call.k;
  const std::int64_t panels = (call.n + kColumns - 1) / kColumns;
  const std::int64_t tiles = (call.m + kRows - 1) / kRows;
  // Per thread: the weight's rows or x's rows in f32, then a tile's sums and two lines.
  const std::int64_t rows_floats = RoundUp(kColumns * k, 16);
  const std::int64_t scratch_floats = rows_floats + kRows * kColumns + 2 * kColumns;
  const auto allocate = [&](std::int64_t floats) {
    return arena.Allocate(static_cast<std::size_t>(floats) * sizeof(float));
  };
  const auto packed_memory = allocate(panels * k * kColumns);
  const auto scratch_memory = allocate(parallel.threads() * scratch_floats);
  auto* packed = reinterpret_cast<float*>(packed_memory.get());
  auto* scratch = reinterpret_cast<float*>(scratch_memory.get());

  parallel.Tasks(panels, [&](std::int64_t p, int thread) {
    PackWeight(kernels, static_cast<const T*>(call.weight) + p * kColumns * k,
               std::min(kColumns, call.n - p * kColumns), k, scratch + thread * scratch_floats,
               packed + p * k * kColumns);
  });
  parallel.Tasks(tiles, [&](std::int64_t tile, int thread) {
    Cutter cutter(scratch + thread * scratch_floats);
    float* x = cutter.Take(rows_floats);
    float* sums = cutter.Take(kRows * kColumns);
    float* line = cutter.Take(kColumns);
    float* residual_line = cutter.Take(kColumns);
    const std::int64_t row = tile * kRows;
    const std::int64_t rows = std::min(kRows, call.m - row);
    simd::Rows<T>(kernels).widen(static_cast<const T*>(call.x) + row * k, 1.0f, rows * k, x);
    for (std::int64_t p = 0; p < panels; ++p) {
      kernels.gemm({.m = rows,
                    .n = kColumns,
                    .k = k,
                    .a = x,
                    .a_row = k,
                    .b = packed + p * k * kColumns,
                    .ldb = kColumns,
                    .c = sums,
                    .ldc = kColumns});
      const std::int64_t columns = std::min(kColumns, call.n - p * kColumns);
      VisitCompute(call.out_type, [&](auto tag) {
        StoreTile<decltype(tag)>(kernels, call, row, rows, p * kColumns, columns, sums, line,
                                 residual_line);
      });
    }
  });
}

}  // namespace

void OwnMatmul(const simd::Kernels& kernels, const Parallel& parallel, Arena& arena,
               const MatmulCall& call) {
  VisitCompute(call.type, [&](auto tag) { Run<decltype(tag)>(kernels, parallel, arena, call); });
}

}  // namespace slalom
