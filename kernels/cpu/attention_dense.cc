// Dense attention: every tile of queries over every block of keys. Keys that repeat the last one,
// as a text's padding does, are taken together.
#include <cmath>
#include <cstddef>
#include <cstring>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_backend.h"

namespace slalom {
namespace {

struct DenseShape {
  std::int64_t batch, queries, keys, heads, head_size;
};

DenseShape CheckAttention(const AttentionArgs& args) {
  const Check check("Attention");
  check.Rank(args.q, 4, "q");
  check.Compute(args.q, "q");
  check.Rank(args.k, 4, "k");
  const DType type = args.q.dtype();
  const DenseShape s{args.q.dim(0), args.q.dim(1), args.k.dim(1), args.q.dim(2), args.q.dim(3)};
  check.Is(args.k, Shape{s.batch, s.keys, s.heads, s.head_size}, type, "k");
  check.Is(args.v, args.k.shape(), type, "v");
  check.Is(args.out, args.q.shape(), type, "out");
  check.That(s.keys > 0, "k", "has no rows");
  check.That(s.head_size > 0, "q", "has no channels");
  if (args.relative_bias.defined()) {
    check.Is(args.relative_bias, Shape{s.heads, s.queries + s.keys - 1}, DType::kF32,
             "relative_bias");
  }
  if (args.lse.defined()) {
    check.Is(args.lse, Shape{s.batch, s.heads, s.queries}, DType::kF32, "lse");
  }
  return s;
}

// How many rows at the end of one batch element's keys and values are the same, bit by bit.
std::int64_t EqualTail(const AttentionArgs& args, const DenseShape& s, std::int64_t batch) {
  if (args.relative_bias.defined() || !(args.scale > 0)) return 1;
  const auto bytes = static_cast<std::size_t>(s.heads * s.head_size) * ByteSize(args.k.dtype());
  const auto repeats_last = [&](const Tensor& x, std::int64_t row) {
    const auto* rows =
        static_cast<const std::byte*>(x.raw()) + static_cast<std::size_t>(batch * s.keys) * bytes;
    return std::memcmp(rows + static_cast<std::size_t>(row) * bytes,
                       rows + static_cast<std::size_t>(s.keys - 1) * bytes, bytes) == 0;
  };
  std::int64_t row = s.keys - 1;
  while (row > 0 && repeats_last(args.k, row - 1) && repeats_last(args.v, row - 1)) --row;
  return s.keys - row;
}

// One element of the batch alone.
AttentionArgs OneOf(const AttentionArgs& args, std::int64_t b) {
  AttentionArgs one = args;
  for (Tensor AttentionArgs::*member :
       {&AttentionArgs::q, &AttentionArgs::k, &AttentionArgs::v, &AttentionArgs::out}) {
    one.*member = (args.*member).Slice(b, b + 1);
  }
  if (args.lse.defined()) one.lse = args.lse.Slice(b, b + 1);
  return one;
}

// One tile of queries of one head over all of its packed keys, the last one `last_counts` times.
template <typename T>
void AttendTile(const AttentionArgs& args, const DenseShape& s, const simd::Kernels& kernels,
                const TileEngine& engine, const float* packed, std::int64_t batch,
                std::int64_t head, std::int64_t begin, std::int64_t last_counts, float* scratch) {
  const TileLayout& layout = engine.layout();
  Cutter cutter(scratch);
  QueryTile tile(layout, cutter);
  const std::int64_t rows = std::min(kTileRows, s.queries - begin);
  engine.Load(RowsOfHead<const T>(args.q, batch, head), begin, rows, tile);
  const float* bias = nullptr;
  if (args.relative_bias.defined()) {
    bias =
        args.relative_bias.data<float>() + head * (s.queries + s.keys - 1) + s.queries - 1 - begin;
  }
  for (std::int64_t j = 0; j < layout.blocks(); ++j) {
    engine.Attend(packed + j * layout.block_floats(), j,
                  bias != nullptr ? bias + j * layout.block : nullptr, tile,
                  j + 1 < layout.blocks() ? 1 : last_counts);
  }
  const auto out = RowsOfHead<T>(args.out, batch, head);
  for (std::int64_t r = 0; r < rows; ++r) {
    simd::Rows<T>(kernels).finish(tile.out + r * layout.padded_size(), tile.InverseSum(r), nullptr,
                                  s.head_size, out.row(begin + r));
  }
  if (args.lse.defined()) {
    tile.StoreLse(args.lse.data<float>() + (batch * s.heads + head) * s.queries + begin);
  }
}

}  // namespace

void CpuBackend::Attention(const AttentionArgs& args) {
  const DenseShape s = CheckAttention(args);
  if (args.q.NumElements() == 0) return;
  const std::int64_t tail = EqualTail(args, s, 0);
  for (std::int64_t b = 0; s.batch > 1 && b < s.batch; ++b) {
    if (EqualTail(args, s, b) == 1) continue;
    for (std::int64_t i = 0; i < s.batch; ++i) Attention(OneOf(args, i));
    return;
  }
  const DType type = args.q.dtype();
  const TileLayout layout{
      .length = s.keys - tail + 1, .head_size = s.head_size, .block = 64, .pairs = UsePairs(type)};
  const TileEngine engine(kernels_, layout, args.scale);
  const std::int64_t all_heads = s.batch * s.heads;
  const std::int64_t head_floats = layout.blocks() * layout.block_floats();
  const std::int64_t group = HeadsAtOnce(all_heads, head_floats);
  const Tensor packed = Allocate(Shape{group, head_floats}, DType::kF32);
  const std::int64_t scratch_floats =
      TileScratchFloats(layout) + layout.padded_block() * layout.padded_size();
  const Tensor scratch = Allocate(Shape{parallel_.threads(), scratch_floats}, DType::kF32);
  const std::int64_t tiles = (s.queries + kTileRows - 1) / kTileRows;

  VisitCompute(type, [&](auto tag) {
    using T = decltype(tag);
    for (std::int64_t first = 0; first < all_heads; first += group) {
      const std::int64_t heads = std::min(group, all_heads - first);
      parallel_.Tasks(heads * layout.blocks(), [&](std::int64_t i, int thread) {
        const std::int64_t j = i % layout.blocks();
        const std::int64_t head = first + i / layout.blocks();
        engine.Pack(RowsOfHead<const T>(args.k, head / s.heads, head % s.heads),
                    RowsOfHead<const T>(args.v, head / s.heads, head % s.heads), j,
                    packed.data<float>() + i * layout.block_floats(),
                    scratch.data<float>() + thread * scratch_floats);
      });
      parallel_.Tasks(heads * tiles, [&](std::int64_t i, int thread) {
        const std::int64_t head = first + i / tiles;
        AttendTile<T>(args, s, kernels_, engine, packed.data<float>() + i / tiles * head_floats,
                      head / s.heads, head % s.heads, i % tiles * kTileRows, tail,
                      scratch.data<float>() + thread * scratch_floats);
      });
    }
  });
}

}  // namespace slalom
