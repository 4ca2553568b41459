// The main loop that dense attention, SLA and SALAD share: keys and values packed by blocks, and
// the online softmax of one tile of queries over a list of those blocks.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/core/tensor.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/simd/kernels.h"

namespace slalom {

// Rows of one head inside [B, L, H, D]: row p of the head's own order starts at row(p).
template <typename T>
struct HeadRows {
  T* base = nullptr;
  std::int64_t stride = 0;              // H * D
  const std::int32_t* order = nullptr;  // optional: position -> token

  T* row(std::int64_t position) const {
    return base + (order != nullptr ? order[position] : position) * stride;
  }
};

template <typename T>
HeadRows<T> RowsOfHead(const Tensor& x, std::int64_t batch, std::int64_t head,
                       const std::int32_t* order = nullptr) {
  const std::int64_t stride = x.dim(2) * x.dim(3);
  return {x.data<T>() + batch * x.dim(1) * stride + head * x.dim(3), stride, order};
}

// How a head's keys and values are cut and stored. With `pairs` the products run on bf16 pairs
// (inputs must be bf16), else in f32.
struct TileLayout {
  std::int64_t length = 0;     // keys
  std::int64_t head_size = 0;  // D
  std::int64_t block = 64;     // keys per block
  bool pairs = false;

  std::int64_t blocks() const { return (length + block - 1) / block; }
  std::int64_t padded_block() const { return RoundUp(block, 16); }
  std::int64_t padded_size() const { return RoundUp(head_size, 16); }
  std::int64_t rows(std::int64_t j) const { return std::min(block, length - j * block); }
  // Floats that one packed block takes: K transposed [D, padded_block], then V
  // [padded_block, padded_size]; half of that as pairs.
  std::int64_t key_floats() const { return padded_size() * padded_block() / (pairs ? 2 : 1); }
  std::int64_t block_floats() const { return 2 * key_floats(); }
  // Blocks of a list that are laid side by side, so that small ones make long loops: one when that
  // would not help, or would leave gaps.
  std::int64_t strip_blocks() const {
    constexpr std::int64_t kStripKeys = 128;
    return block % 16 == 0 && block < kStripKeys / 2 ? kStripKeys / block : 1;
  }
};

// One tile of queries: at most kTileRows rows, the running softmax and the output so far.
constexpr std::int64_t kTileRows = 64;

struct QueryTile {
  std::int64_t rows = 0;
  float* q = nullptr;        // [kTileRows, padded_size] f32, or bf16 with pairs; unscaled
  float* scores = nullptr;   // [kTileRows, strip_blocks * padded_block]
  float* rounded = nullptr;  // the same in bf16, with pairs
  float* strip = nullptr;    // blocks side by side, [strip_blocks * block_floats]
  float* out = nullptr;      // [kTileRows, padded_size]: sum of exp * v
  float* maximum = nullptr;  // [kTileRows]
  float* sum = nullptr;      // [kTileRows]

  QueryTile(const TileLayout& layout, Cutter& cutter);
  // The log of each row's sum of exp; -infinity where no key was attended to.
  void StoreLse(float* lse) const;
  // 0 where no key was attended to.
  float InverseSum(std::int64_t row) const { return sum[row] != 0.0f ? 1.0f / sum[row] : 0.0f; }
};

// What one QueryTile takes from its Cutter.
std::int64_t TileScratchFloats(const TileLayout& layout);

// How many heads are worked on at once: all, or what fits `most` floats, a quarter of a GiB.
std::int64_t HeadsAtOnce(std::int64_t heads, std::int64_t floats_per_head,
                         std::int64_t most = std::int64_t{1} << 26);

// Const: one engine serves all threads.
class TileEngine {
 public:
  TileEngine(const simd::Kernels& kernels, const TileLayout& layout, float scale)
      : kernels_(kernels), layout_(layout), scale_(scale) {}

  const TileLayout& layout() const { return layout_; }

  // Packs block j of a head into `packed` (block_floats()); `row` is scratch of
  // padded_block * padded_size floats.
  template <typename T>
  void Pack(const HeadRows<const T>& k, const HeadRows<const T>& v, std::int64_t j, float* packed,
            float* scratch) const;
  // Starts a tile with query rows [begin, begin + rows).
  template <typename T>
  void Load(const HeadRows<const T>& q, std::int64_t begin, std::int64_t rows,
            QueryTile& tile) const;
  // Attends to block j. `bias`, if any, is that of the tile's row 0 and the block's column 0, and
  // moves back by one per row. The block's last key counts last_counts times.
  void Attend(const float* packed, std::int64_t j, const float* bias, QueryTile& tile,
              std::int64_t last_counts = 1) const {
    AttendKeys(packed, layout_.rows(j), layout_.padded_block(), bias, last_counts, tile);
  }
  // Attends to the blocks of an ascending list; `packed` holds all blocks of the head.
  void AttendList(const float* packed, std::span<const std::int32_t> list, QueryTile& tile) const;

  // The values of a packed block, f32 layouts only: [rows, padded_size].
  const float* Values(const float* packed) const { return packed + layout_.key_floats(); }

 private:
  // K transposed [padded D, padded], then V [padded, padded D]: the first `keys` of them count.
  void AttendKeys(const float* packed, std::int64_t keys, std::int64_t padded, const float* bias,
                  std::int64_t last_counts, QueryTile& tile) const;
  // Lays blocks side by side.
  void Gather(const float* packed, std::span<const std::int32_t> list, float* strip) const;

  const simd::Kernels& kernels_;
  TileLayout layout_;
  float scale_;
};

}  // namespace slalom
