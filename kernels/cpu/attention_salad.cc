// SALAD: softmax over the critical blocks, plus gate(x) times the projected linear attention over
// every key. The branches meet in one pass at the end, so that their sum is rounded once.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/block_map.h"
#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/linear_branch.h"

namespace slalom {
namespace {

struct SaladShape {
  std::int64_t batch, length, heads, head_size;
  std::int64_t width() const { return heads * head_size; }
};

SaladShape CheckSalad(const SaladArgs& args) {
  const Check check("SaladAttention");
  check.Rank(args.q, 4, "q");
  check.Compute(args.q, "q");
  const DType type = args.q.dtype();
  const SaladShape s{args.q.dim(0), args.q.dim(1), args.q.dim(2), args.q.dim(3)};
  check.Is(args.k, args.q.shape(), type, "k");
  check.Is(args.v, args.q.shape(), type, "v");
  check.Holds(args.out, args.q.NumElements(), type, "out");
  if (args.lse.defined()) {
    check.Is(args.lse, Shape{s.batch, s.heads, s.length}, DType::kF32, "lse");
  }
  CheckMap(check, args.map, s.batch, s.heads, s.length);
  if (args.map_kind == BlockMapKind::kWindow) {
    check.That(args.grid.size() == s.length, "grid", "does not hold q's tokens");
  }
  if (args.gate_out.defined()) {
    check.Is(args.gate_out, Shape{s.batch, s.length}, DType::kF32, "gate_out");
  }
  if (!args.proj_weight.defined()) return s;
  const std::int64_t d = s.width();
  check.Is(args.q_normed, args.q.shape(), type, "q_normed");
  check.Is(args.k_normed, args.q.shape(), type, "k_normed");
  check.That(s.head_size % 2 == 0, "q", "has an odd head size");
  check.Is(args.cos, Shape{s.length, s.head_size / 2}, DType::kF32, "cos");
  check.Is(args.sin, Shape{s.length, s.head_size / 2}, DType::kF32, "sin");
  check.Holds(args.x, args.q.NumElements(), type, "x");
  check.Is(args.proj_weight, Shape{d, d}, type, "proj_weight");
  check.Is(args.proj_bias, Shape{d}, DType::kF32, "proj_bias");
  check.Is(args.gate_weight, Shape{1, d}, DType::kF32, "gate_weight");
  check.Is(args.gate_bias, Shape{1}, DType::kF32, "gate_bias");
  return s;
}

// The sparse branch of all heads, unrounded: out [B, L, H * D] f32.
template <typename T>
void SparseBranch(CpuBackend& backend, const simd::Kernels& kernels, const Parallel& parallel,
                  const SaladArgs& args, const SaladShape& s, bool pairs, const Tensor& out) {
  const BlockMap& map = *args.map;
  const TileLayout layout{
      .length = s.length, .head_size = s.head_size, .block = map.block_k, .pairs = pairs};
  const TileEngine engine(kernels, layout, 1.0f / std::sqrt(static_cast<float>(s.head_size)));
  const std::int64_t blocks = layout.blocks();
  const std::int64_t query_blocks = map.classes.dim(2);
  const std::int64_t all_heads = s.batch * s.heads;
  const std::int64_t group = HeadsAtOnce(all_heads, blocks * layout.block_floats());
  const Tensor packed = backend.Allocate(Shape{group, blocks, layout.block_floats()}, DType::kF32);
  const std::int64_t scratch_floats =
      TileScratchFloats(layout) + layout.padded_block() * layout.padded_size();
  const Tensor scratch = backend.Allocate(Shape{parallel.threads(), scratch_floats}, DType::kF32);
  std::vector<std::int32_t> window_order;
  if (args.map_kind == BlockMapKind::kWindow) window_order = WindowOrder(args.grid);
  const auto order_of = [&](std::int64_t head) {
    return !window_order.empty() && head >= s.heads / 2 ? window_order.data() : nullptr;
  };

  for (std::int64_t first = 0; first < all_heads; first += group) {
    const std::int64_t heads = std::min(group, all_heads - first);
    parallel.Tasks(heads * blocks, [&](std::int64_t i, int thread) {
      const std::int64_t b = (first + i / blocks) / s.heads;
      const std::int64_t h = (first + i / blocks) % s.heads;
      engine.Pack(RowsOfHead<const T>(args.k, b, h, order_of(h)),
                  RowsOfHead<const T>(args.v, b, h, order_of(h)), i % blocks,
                  packed.data<float>() + i * layout.block_floats(),
                  scratch.data<float>() + thread * scratch_floats);
    });
    parallel.Tasks(heads * query_blocks, [&](std::int64_t i, int thread) {
      const std::int64_t slot = i / query_blocks;
      const std::int64_t b = (first + slot) / s.heads;
      const std::int64_t h = (first + slot) % s.heads;
      const std::int64_t row_index = (first + slot) * query_blocks + i % query_blocks;
      Cutter cutter(scratch.data<float>() + thread * scratch_floats);
      QueryTile tile(layout, cutter);
      const HeadRows<float> to{out.data<float>() + b * s.length * s.width() + h * s.head_size,
                               s.width(), order_of(h)};
      const std::int64_t begin_block = i % query_blocks * map.block_q;
      const std::int64_t end = std::min<std::int64_t>(s.length, begin_block + map.block_q);
      for (std::int64_t begin = begin_block; begin < end; begin += kTileRows) {
        const std::int64_t rows = std::min(kTileRows, end - begin);
        engine.Load(RowsOfHead<const T>(args.q, b, h, order_of(h)), begin, rows, tile);
        engine.AttendList(packed.data<float>() + slot * blocks * layout.block_floats(),
                          CriticalList(map, row_index), tile);
        if (args.lse.defined()) {
          tile.StoreLse(args.lse.data<float>() + (first + slot) * s.length + begin);
        }
        for (std::int64_t r = 0; r < rows; ++r) {
          kernels.f32.finish(tile.out + r * layout.padded_size(), tile.InverseSum(r), nullptr,
                             s.head_size, to.row(begin + r));
        }
      }
    });
  }
}

// The features of rows [begin, begin + rows) of one head: ReLU for the divisor; and rotated.
template <typename T>
void Features(const simd::Kernels& kernels, const SaladArgs& args, const HeadRows<const T>& x,
              std::int64_t begin, std::int64_t rows, std::int64_t size, std::int64_t width,
              float* divisors, float* rotated) {
  const float* cos = args.cos.data<float>();
  const float* sin = args.sin.data<float>();
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t angle = (begin + r) * (size / 2);
    float* row = divisors + r * width;
    simd::Rows<T>(kernels).widen(x.row(begin + r), 1.0f, size, row);
    kernels.f32.qk_norm_rope(row, nullptr, 0.0f, cos + angle, sin + angle, true, 1, size,
                             rotated + r * width);
    kernels.feature_map(FeatureMap::kRelu, row, size, row);
  }
}

// The linear branch of all heads before its projection: out [B, L, H * D] T.
template <typename T>
void LinearAttention(CpuBackend& backend, const simd::Kernels& kernels, const Parallel& parallel,
                     const SaladArgs& args, const SaladShape& s, const Tensor& out) {
  constexpr std::int64_t kRowsPerSum = 512;
  const TileLayout layout{.length = s.length, .head_size = s.head_size, .block = kTileRows};
  const LinearBranch branch(kernels, layout);
  const std::int64_t width = layout.padded_size();
  const std::int64_t state = RoundUp(branch.state_floats(), 16);
  const std::int64_t all_heads = s.batch * s.heads;
  const std::int64_t pieces = (s.length + kRowsPerSum - 1) / kRowsPerSum;
  const std::int64_t tiles = layout.blocks();
  const Tensor sums = backend.Allocate(Shape{all_heads, pieces, state}, DType::kF32);
  const std::int64_t scratch_floats = 3 * kTileRows * width;
  const Tensor scratch = backend.Allocate(Shape{parallel.threads(), scratch_floats}, DType::kF32);

  parallel.Tasks(all_heads * pieces, [&](std::int64_t i, int thread) {
    const std::int64_t b = i / pieces / s.heads;
    const std::int64_t h = i / pieces % s.heads;
    Cutter cutter(scratch.data<float>() + thread * scratch_floats);
    float* divisors = cutter.Take(kTileRows * width);
    float* rotated = cutter.Take(kTileRows * width);
    float* values = cutter.Take(kTileRows * width);
    std::fill_n(values, kTileRows * width, 0.0f);
    const auto v = RowsOfHead<const T>(args.v, b, h);
    const std::int64_t start = i % pieces * kRowsPerSum;
    const std::int64_t end = std::min(s.length, start + kRowsPerSum);
    for (std::int64_t begin = start; begin < end; begin += kTileRows) {
      const std::int64_t rows = std::min(kTileRows, end - begin);
      Features(kernels, args, RowsOfHead<const T>(args.k_normed, b, h), begin, rows, s.head_size,
               width, divisors, rotated);
      for (std::int64_t r = 0; r < rows; ++r) {
        simd::Rows<T>(kernels).widen(v.row(begin + r), 1.0f, s.head_size, values + r * width);
      }
      branch.AddKeys(rotated, divisors, values, rows, begin == start,
                     sums.data<float>() + i * state);
    }
  });
  // Every head's pieces into its first one, in order.
  parallel.Tasks(all_heads, [&](std::int64_t head, int /*thread*/) {
    float* total = sums.data<float>() + head * pieces * state;
    for (std::int64_t p = 1; p < pieces; ++p) {
      kernels.f32.add(total + p * state, branch.state_floats(), total);
    }
  });
  parallel.Tasks(all_heads * tiles, [&](std::int64_t i, int thread) {
    const std::int64_t b = i / tiles / s.heads;
    const std::int64_t h = i / tiles % s.heads;
    Cutter cutter(scratch.data<float>() + thread * scratch_floats);
    float* divisors = cutter.Take(kTileRows * width);
    float* rotated = cutter.Take(kTileRows * width);
    float* linear = cutter.Take(kTileRows * width);
    const std::int64_t begin = i % tiles * kTileRows;
    const std::int64_t rows = layout.rows(i % tiles);
    Features(kernels, args, RowsOfHead<const T>(args.q_normed, b, h), begin, rows, s.head_size,
             width, divisors, rotated);
    branch.Query(rotated, divisors, sums.data<float>() + i / tiles * pieces * state, rows, linear);
    const HeadRows<T> to{out.data<T>() + b * s.length * s.width() + h * s.head_size, s.width()};
    for (std::int64_t r = 0; r < rows; ++r) {
      simd::Rows<T>(kernels).narrow(linear + r * width, s.head_size, to.row(begin + r));
    }
  });
}

// sigmoid(x w + b) per token [B * L], averaged over each sample's tokens if asked.
template <typename T>
std::vector<float> Gates(const simd::Kernels& kernels, const Parallel& parallel,
                         const SaladArgs& args, const SaladShape& s) {
  std::vector<float> gates(static_cast<std::size_t>(s.batch * s.length));
  const std::int64_t d = s.width();
  const float bias = args.gate_bias.data<float>()[0];
  parallel.Rows(s.batch * s.length, d, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const float logit =
          simd::Rows<T>(kernels).dot(args.x.data<T>() + r * d, args.gate_weight.data<float>(), d);
      gates[static_cast<std::size_t>(r)] = 1.0f / (1.0f + std::exp(-(logit + bias)));
    }
  });
  if (args.gate == SaladGate::kSample) {
    for (std::int64_t b = 0; b < s.batch; ++b) {
      const auto begin = gates.begin() + b * s.length;
      double mean = 0;
      for (auto g = begin; g != begin + s.length; ++g) mean += *g;
      std::fill_n(begin, s.length, static_cast<float>(mean / static_cast<double>(s.length)));
    }
  }
  return gates;
}

}  // namespace

void CpuBackend::SaladAttention(const SaladArgs& args) {
  const SaladShape s = CheckSalad(args);
  if (args.q.NumElements() == 0) return;
  const DType type = args.q.dtype();
  const Shape rows{s.batch, s.length, s.width()};
  const Tensor sparse = Allocate(rows, DType::kF32);
  const bool linear = args.proj_weight.defined();
  VisitCompute(type, [&](auto tag) {
    using T = decltype(tag);
    SparseBranch<T>(*this, kernels_, parallel_, args, s, UsePairs(type), sparse);
    Tensor projected;
    std::vector<float> gates(static_cast<std::size_t>(s.batch * s.length), 0.0f);
    if (linear) {
      const Tensor branch = Allocate(rows, type);
      LinearAttention<T>(*this, kernels_, parallel_, args, s, branch);
      projected = Allocate(rows, DType::kF32);
      Linear({.x = branch, .weight = args.proj_weight, .bias = args.proj_bias, .out = projected});
      gates = Gates<T>(kernels_, parallel_, args, s);
    }
    const std::int64_t d = s.width();
    parallel_.Rows(s.batch * s.length, d, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        const float* from = sparse.data<float>() + r * d;
        T* to = args.out.data<T>() + r * d;
        const auto& loops = simd::Rows<T>(kernels_);
        if (linear) {
          loops.finish(projected.data<float>() + r * d, gates[static_cast<std::size_t>(r)], from, d,
                       to);
        } else {
          loops.narrow(from, d, to);
        }
      }
    });
    if (args.gate_out.defined()) {
      std::copy(gates.begin(), gates.end(), args.gate_out.data<float>());
    }
  });
}

}  // namespace slalom
