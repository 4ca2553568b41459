#include "kernels/cpu/attention_tile.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace slalom {
namespace {

// Pairs of value rows side by side: out[(r / 2) * width + c][r % 2] = v[r][c]; zeros beyond.
void InterleaveValues(const HeadRows<const BFloat16>& v, std::int64_t begin, std::int64_t rows,
                      std::int64_t padded_rows, std::int64_t size, std::int64_t width,
                      BFloat16* out) {
  std::fill_n(out, padded_rows * width, BFloat16(0.0f));
  for (std::int64_t r = 0; r < rows; ++r) {
    const BFloat16* row = v.row(begin + r);
    BFloat16* to = out + r / 2 * 2 * width + r % 2;
    for (std::int64_t c = 0; c < size; ++c) to[2 * c] = row[c];
  }
}

}  // namespace

QueryTile::QueryTile(const TileLayout& layout, Cutter& cutter)
    : q(cutter.Take(kTileRows * layout.padded_size())),
      scores(cutter.Take(kTileRows * layout.strip_blocks() * layout.padded_block())),
      rounded(cutter.Take(kTileRows * layout.strip_blocks() * layout.padded_block() / 2)),
      strip(cutter.Take(layout.strip_blocks() > 1 ? layout.strip_blocks() * layout.block_floats()
                                                  : 0)),
      out(cutter.Take(kTileRows * layout.padded_size())),
      maximum(cutter.Take(kTileRows)),
      sum(cutter.Take(kTileRows)) {}

void QueryTile::StoreLse(float* lse) const {
  for (std::int64_t r = 0; r < rows; ++r) lse[r] = maximum[r] + std::log(sum[r]);
}

std::int64_t TileScratchFloats(const TileLayout& layout) {
  Cutter cutter(nullptr);
  const QueryTile tile(layout, cutter);
  return cutter.taken();
}

std::int64_t HeadsAtOnce(std::int64_t heads, std::int64_t floats_per_head, std::int64_t most) {
  return std::clamp<std::int64_t>(most / std::max<std::int64_t>(floats_per_head, 1), 1, heads);
}

template <typename T>
void TileEngine::Pack(const HeadRows<const T>& k, const HeadRows<const T>& v, std::int64_t j,
                      float* packed, float* scratch) const {
  const std::int64_t begin = j * layout_.block;
  const std::int64_t rows = layout_.rows(j);
  const std::int64_t size = layout_.head_size;
  const std::int64_t width = layout_.padded_size();
  float* values = packed + layout_.key_floats();
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (layout_.pairs) {
      // A row of K seen as 32-bit pairs; the pair of an odd last channel has a zero in it.
      const std::int64_t pairs = width / 2;
      std::memset(scratch, 0, static_cast<std::size_t>(rows * pairs) * sizeof(float));
      std::memset(packed, 0, static_cast<std::size_t>(layout_.key_floats()) * sizeof(float));
      for (std::int64_t r = 0; r < rows; ++r) {
        std::memcpy(scratch + r * pairs, k.row(begin + r),
                    static_cast<std::size_t>(size) * sizeof(T));
      }
      kernels_.transpose(scratch, rows, pairs, pairs, packed, layout_.padded_block());
      InterleaveValues(v, begin, rows, layout_.padded_block(), size, width,
                       reinterpret_cast<BFloat16*>(values));
      return;
    }
  }
  const auto& loops = simd::Rows<T>(kernels_);
  if (rows < layout_.padded_block()) {
    std::fill_n(packed, layout_.key_floats(), 0.0f);
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    loops.widen(k.row(begin + r), 1.0f, size, scratch + r * width);
    loops.widen(v.row(begin + r), 1.0f, size, values + r * width);
    std::fill(values + r * width + size, values + (r + 1) * width, 0.0f);
  }
  kernels_.transpose(scratch, rows, size, width, packed, layout_.padded_block());
}

template <typename T>
void TileEngine::Load(const HeadRows<const T>& q, std::int64_t begin, std::int64_t rows,
                      QueryTile& tile) const {
  const std::int64_t size = layout_.head_size;
  const std::int64_t width = layout_.padded_size();
  tile.rows = rows;
  std::fill_n(tile.out, rows * width, 0.0f);
  std::fill_n(tile.maximum, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(tile.sum, rows, 0.0f);
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (layout_.pairs) {
      auto* to = reinterpret_cast<BFloat16*>(tile.q);
      for (std::int64_t r = 0; r < rows; ++r) {
        std::copy_n(q.row(begin + r), size, to + r * width);
        std::fill(to + r * width + size, to + (r + 1) * width, BFloat16(0.0f));
      }
      return;
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    simd::Rows<T>(kernels_).widen(q.row(begin + r), 1.0f, size, tile.q + r * width);
  }
}

void TileEngine::Gather(const float* packed, std::span<const std::int32_t> list,
                        float* strip) const {
  constexpr std::int64_t kPiece = 16;  // floats: a length that the compiler knows
  const std::int64_t block = layout_.padded_block(), floats = layout_.key_floats();
  const std::int64_t count = std::ssize(list), stride = count * block;
  for (std::int64_t i = 0; i < count; ++i) {
    const float* keys = packed + list[static_cast<std::size_t>(i)] * layout_.block_floats();
    for (std::int64_t row = 0; row < floats / block; ++row) {
      for (std::int64_t c = 0; c < block; c += kPiece) {
        std::memcpy(strip + row * stride + i * block + c, keys + row * block + c,
                    kPiece * sizeof(float));
      }
    }
    std::copy_n(keys + floats, floats, strip + (count + i) * floats);
  }
}

void TileEngine::AttendList(const float* packed, std::span<const std::int32_t> list,
                            QueryTile& tile) const {
  const auto at_once = static_cast<std::size_t>(layout_.strip_blocks());
  while (!list.empty()) {
    const auto strip = list.first(std::min(at_once, list.size()));
    list = list.subspan(strip.size());
    if (strip.size() == 1) {
      Attend(packed + strip.front() * layout_.block_floats(), strip.front(), nullptr, tile);
      continue;
    }
    Gather(packed, strip, tile.strip);
    // Only the head's last block may be short, and it comes last in a list.
    const std::int64_t before = (std::ssize(strip) - 1) * layout_.block;
    AttendKeys(tile.strip, before + layout_.rows(strip.back()), before + layout_.block, nullptr, 1,
               tile);
  }
}

void TileEngine::AttendKeys(const float* packed, std::int64_t keys, std::int64_t padded,
                            const float* bias, std::int64_t last_counts, QueryTile& tile) const {
  const std::int64_t width = layout_.padded_size();
  const float* values = packed + width * padded / (layout_.pairs ? 2 : 1);
  auto* rounded = layout_.pairs ? reinterpret_cast<BFloat16*>(tile.rounded) : nullptr;
  if (layout_.pairs) {
    kernels_.gemm_bf16({.m = tile.rows,
                        .n = padded,
                        .k = width,
                        .a = reinterpret_cast<const BFloat16*>(tile.q),
                        .lda = width,
                        .b = reinterpret_cast<const BFloat16*>(packed),
                        .ldb = padded,
                        .c = tile.scores,
                        .ldc = padded});
  } else {
    kernels_.gemm({.m = tile.rows,
                   .n = padded,
                   .k = layout_.head_size,
                   .a = tile.q,
                   .a_row = width,
                   .b = packed,
                   .ldb = padded,
                   .c = tile.scores,
                   .ldc = padded});
  }
  if (last_counts > 1) {
    const float more = std::log(static_cast<float>(last_counts)) / scale_;
    for (std::int64_t r = 0; r < tile.rows; ++r) tile.scores[r * padded + keys - 1] += more;
  }
  kernels_.softmax({.rows = tile.rows,
                    .columns = keys,
                    .padded = padded,
                    .scores = tile.scores,
                    .stride = padded,
                    .scale = scale_,
                    .bias = bias,
                    .rounded = rounded,
                    .maximum = tile.maximum,
                    .sum = tile.sum,
                    .accumulator = tile.out,
                    .width = width});
  if (layout_.pairs) {
    kernels_.gemm_bf16({.m = tile.rows,
                        .n = width,
                        .k = RoundUp(keys, 2),
                        .a = rounded,
                        .lda = padded,
                        .b = reinterpret_cast<const BFloat16*>(values),
                        .ldb = width,
                        .c = tile.out,
                        .ldc = width,
                        .accumulate = true});
  } else {
    kernels_.gemm({.m = tile.rows,
                   .n = width,
                   .k = keys,
                   .a = tile.scores,
                   .a_row = padded,
                   .b = values,
                   .ldb = width,
                   .c = tile.out,
                   .ldc = width,
                   .accumulate = true});
  }
}

template void TileEngine::Pack(const HeadRows<const float>&, const HeadRows<const float>&,
                               std::int64_t, float*, float*) const;
template void TileEngine::Pack(const HeadRows<const BFloat16>&, const HeadRows<const BFloat16>&,
                               std::int64_t, float*, float*) const;
template void TileEngine::Load(const HeadRows<const float>&, std::int64_t, std::int64_t,
                               QueryTile&) const;
template void TileEngine::Load(const HeadRows<const BFloat16>&, std::int64_t, std::int64_t,
                               QueryTile&) const;

}  // namespace slalom
