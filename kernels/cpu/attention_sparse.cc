// SLA: softmax over the critical blocks, plus the projected linear attention over the scope.
//
// For each head: pack the keys block by block and, in the same pass, sum phi(K_j)^T V_j. From those
// sums follow the linear states of the query blocks; with scope kAll they share one. Then each
// query block attends to its critical blocks and multiplies with its state.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/block_map.h"
#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/linear_branch.h"
#include "kernels/cpu/scope_states.h"

namespace slalom {
namespace {

struct SlaShape {
  std::int64_t batch, length, heads, head_size;
};

// Asks for memory that will be read soon.
void Prefetch(const float* x, std::int64_t floats) {
  for (std::int64_t i = 0; i < floats; i += 16) __builtin_prefetch(x + i, 0, 2);
}

SlaShape CheckSla(const SlaArgs& args) {
  const Check check("SlaAttention");
  check.Rank(args.q, 4, "q");
  check.Compute(args.q, "q");
  const SlaShape s{args.q.dim(0), args.q.dim(1), args.q.dim(2), args.q.dim(3)};
  check.Is(args.k, args.q.shape(), args.q.dtype(), "k");
  check.Is(args.v, args.q.shape(), args.q.dtype(), "v");
  check.Is(args.out, args.q.shape(), args.q.dtype(), "out");
  if (args.lse.defined()) {
    check.Is(args.lse, Shape{s.batch, s.heads, s.length}, DType::kF32, "lse");
  }
  CheckMap(check, args.map, s.batch, s.heads, s.length);
  if (args.proj_weight.defined()) {
    check.Is(args.proj_weight, Shape{s.head_size, s.head_size}, DType::kF32, "proj_weight");
    check.Is(args.proj_bias, Shape{s.head_size}, DType::kF32, "proj_bias");
  }
  return s;
}

// One call, its working memory and its steps. Heads are handled in groups that fit the memory.
template <typename T>
class SlaRun {
 public:
  SlaRun(CpuBackend& backend, const simd::Kernels& kernels, const Parallel& parallel,
         const SlaArgs& args, const SlaShape& shape, bool pairs);

  void Run();

 private:
  // Blocks whose sums are kept apart: one by one, unless every block is in scope anyway.
  static constexpr std::int64_t kBlocksPerSumWhenAll = 8;

  bool all() const { return args_.scope == LinearScope::kAll; }
  void PackAndSum(std::int64_t first, std::int64_t heads);
  void States(std::int64_t first, std::int64_t heads);
  // Scope kAll: W folds into the one state, by way of the head's first sum.
  void ProjectStates(std::int64_t heads);
  void QueryBlock(std::int64_t first, std::int64_t slot, std::int64_t block, float* scratch);
  // The linear branch of `rows` queries: extra [rows, padded D]. `linear` is working memory.
  void Linear(const HeadRows<const T>& q, std::int64_t begin, std::int64_t rows, const float* state,
              float* features, float* linear, float* extra) const;
  void Phi(const HeadRows<const T>& x, std::int64_t begin, std::int64_t rows, float* out) const;
  float* Sums(std::int64_t slot, std::int64_t piece) const {
    return sums_.data<float>() + (slot * pieces_ + piece) * branch_.state_floats();
  }
  float* State(std::int64_t slot, std::int64_t index) const {
    return states_.data<float>() + (slot * states_per_head_ + index) * branch_.state_floats();
  }

  const simd::Kernels& kernels_;
  const Parallel& parallel_;
  const SlaArgs& args_;
  const SlaShape s_;
  const BlockMap& map_;
  const TileLayout layout_;
  const TileEngine engine_;
  const LinearBranch branch_;
  const bool linear_;
  const std::int64_t blocks_per_sum_;
  const std::int64_t pieces_;           // sums per head
  const std::int64_t states_per_head_;  // one, or one per query block
  const ScopeStates scope_;
  std::int64_t group_ = 1;
  std::int64_t scratch_floats_ = 0;
  Tensor packed_;                          // [group, blocks, block_floats]
  Tensor sums_;                            // [group, pieces, state_floats]
  Tensor states_;                          // [group, states_per_head, state_floats]
  Tensor scratch_;                         // [threads, scratch_floats]
  Tensor weight_;                          // [D, padded D]: proj_weight transposed
  std::vector<std::uint64_t> scope_bits_;  // [group, states_per_head, words]
  std::vector<ScopeStates::Plan> plans_;   // [group, states_per_head]
  std::vector<std::int32_t> lists_;        // [group, states_per_head, pieces]
};

template <typename T>
SlaRun<T>::SlaRun(CpuBackend& backend, const simd::Kernels& kernels, const Parallel& parallel,
                  const SlaArgs& args, const SlaShape& shape, bool pairs)
    : kernels_(kernels),
      parallel_(parallel),
      args_(args),
      s_(shape),
      map_(*args.map),
      layout_{
          .length = s_.length, .head_size = s_.head_size, .block = map_.block_k, .pairs = pairs},
      engine_(kernels, layout_, 1.0f / std::sqrt(static_cast<float>(s_.head_size))),
      branch_(kernels, layout_),
      linear_(args.proj_weight.defined()),
      blocks_per_sum_(all() ? kBlocksPerSumWhenAll : 1),
      pieces_((layout_.blocks() + blocks_per_sum_ - 1) / blocks_per_sum_),
      states_per_head_(all() ? 1 : map_.classes.dim(2)),
      scope_(kernels, pieces_, states_per_head_, branch_.state_floats()) {
  const std::int64_t width = layout_.padded_size();
  const std::int64_t state = branch_.state_floats();
  const std::int64_t head_floats = layout_.blocks() * layout_.block_floats() +
                                   (linear_ ? (pieces_ + states_per_head_) * state : 0);
  constexpr std::int64_t kCachedFloats = std::int64_t{1} << 23;  // 32 MiB: a third-level cache
  group_ = HeadsAtOnce(s_.batch * s_.heads, head_floats, kCachedFloats);
  packed_ = backend.Allocate(Shape{group_, layout_.blocks(), layout_.block_floats()}, DType::kF32);
  const std::int64_t rows = std::max(layout_.padded_block(), kTileRows);
  scratch_floats_ = TileScratchFloats(layout_) + 2 * RoundUp(rows * width, 16);
  if (linear_) {
    scratch_floats_ = std::max(scratch_floats_, scope_.scratch_floats());
    sums_ = backend.Allocate(Shape{group_, pieces_, state}, DType::kF32);
    states_ = backend.Allocate(Shape{group_, states_per_head_, state}, DType::kF32);
    plans_.resize(static_cast<std::size_t>(group_ * states_per_head_));
    scope_bits_.resize(plans_.size() * static_cast<std::size_t>(scope_.words()));
    lists_.resize(plans_.size() * static_cast<std::size_t>(pieces_));
    weight_ = backend.Allocate(Shape{s_.head_size, width}, DType::kF32);
    backend.Zero(weight_);
    kernels.transpose(args.proj_weight.template data<float>(), s_.head_size, s_.head_size,
                      s_.head_size, weight_.template data<float>(), width);
  }
  scratch_ = backend.Allocate(Shape{parallel.threads(), scratch_floats_}, DType::kF32);
}

template <typename T>
void SlaRun<T>::Run() {
  const std::int64_t all_heads = s_.batch * s_.heads;
  const std::int64_t query_blocks = map_.classes.dim(2);
  for (std::int64_t first = 0; first < all_heads; first += group_) {
    const std::int64_t heads = std::min(group_, all_heads - first);
    PackAndSum(first, heads);
    if (linear_) States(first, heads);
    if (linear_ && all()) ProjectStates(heads);
    parallel_.Tasks(heads * query_blocks, [&](std::int64_t i, int thread) {
      QueryBlock(first, i / query_blocks, i % query_blocks,
                 scratch_.data<float>() + thread * scratch_floats_);
    });
  }
}

template <typename T>
void SlaRun<T>::Phi(const HeadRows<const T>& x, std::int64_t begin, std::int64_t rows,
                    float* out) const {
  const std::int64_t width = layout_.padded_size();
  for (std::int64_t r = 0; r < rows; ++r) {
    float* row = out + r * width;
    simd::Rows<T>(kernels_).widen(x.row(begin + r), 1.0f, s_.head_size, row);
    kernels_.feature_map(args_.feature_map, row, s_.head_size, row);
  }
}

template <typename T>
void SlaRun<T>::PackAndSum(std::int64_t first, std::int64_t heads) {
  const std::int64_t width = layout_.padded_size();
  parallel_.Tasks(heads * pieces_, [&](std::int64_t task, int thread) {
    const std::int64_t slot = task / pieces_;
    const std::int64_t piece = task % pieces_;
    const std::int64_t head = first + slot;
    const auto k = RowsOfHead<const T>(args_.k, head / s_.heads, head % s_.heads);
    const auto v = RowsOfHead<const T>(args_.v, head / s_.heads, head % s_.heads);
    Cutter cutter(scratch_.data<float>() + thread * scratch_floats_);
    float* features = cutter.Take(layout_.padded_block() * width);
    float* values = cutter.Take(layout_.padded_block() * width);
    const std::int64_t end = std::min((piece + 1) * blocks_per_sum_, layout_.blocks());
    for (std::int64_t j = piece * blocks_per_sum_; j < end; ++j) {
      float* packed =
          packed_.data<float>() + (slot * layout_.blocks() + j) * layout_.block_floats();
      engine_.Pack(k, v, j, packed, features);
      if (!linear_) continue;
      const std::int64_t begin = j * layout_.block;
      Phi(k, begin, layout_.rows(j), features);
      const float* block_values = engine_.Values(packed);
      if (layout_.pairs) {
        std::fill_n(values, layout_.rows(j) * width, 0.0f);
        for (std::int64_t r = 0; r < layout_.rows(j); ++r) {
          simd::Rows<T>(kernels_).widen(v.row(begin + r), 1.0f, s_.head_size, values + r * width);
        }
        block_values = values;
      }
      branch_.AddKeys(features, features, block_values, layout_.rows(j),
                      j == piece * blocks_per_sum_, Sums(slot, piece));
    }
  });
}

template <typename T>
void SlaRun<T>::States(std::int64_t first, std::int64_t heads) {
  const std::int64_t blocks = layout_.blocks();
  const std::int64_t words = scope_.words();
  parallel_.Tasks(heads * states_per_head_, [&](std::int64_t i, int /*thread*/) {
    scope_.Mark(args_.scope,
                map_.classes.data<std::uint8_t>() + (first * states_per_head_ + i) * blocks,
                scope_bits_.data() + i * words);
  });
  parallel_.Tasks(heads * states_per_head_, [&](std::int64_t i, int /*thread*/) {
    const std::int64_t slot = i / states_per_head_;
    plans_[static_cast<std::size_t>(i)] =
        scope_.MakePlan(scope_bits_.data() + slot * states_per_head_ * words, i % states_per_head_,
                        lists_.data() + i * pieces_);
  });
  parallel_.Tasks(heads * scope_.pieces(), [&](std::int64_t task, int thread) {
    const std::int64_t slot = task / scope_.pieces();
    const std::int64_t row = slot * states_per_head_;
    scope_.Sum(task % scope_.pieces(), Sums(slot, 0), plans_.data() + row,
               lists_.data() + row * pieces_, scratch_.data<float>() + thread * scratch_floats_,
               State(slot, 0));
  });
}

template <typename T>
void SlaRun<T>::ProjectStates(std::int64_t heads) {
  const std::int64_t width = layout_.padded_size();
  const std::int64_t products = s_.head_size * width;
  parallel_.Tasks(heads, [&](std::int64_t slot, int /*thread*/) {
    std::copy_n(State(slot, 0), products, Sums(slot, 0));
    kernels_.gemm({.m = s_.head_size,
                   .n = width,
                   .k = s_.head_size,
                   .a = Sums(slot, 0),
                   .a_row = width,
                   .b = weight_.data<float>(),
                   .ldb = width,
                   .c = State(slot, 0),
                   .ldc = width});
  });
}

template <typename T>
void SlaRun<T>::Linear(const HeadRows<const T>& q, std::int64_t begin, std::int64_t rows,
                       const float* state, float* features, float* linear, float* extra) const {
  Phi(q, begin, rows, features);
  branch_.Query(features, features, state, rows, all() ? extra : linear);
  if (all()) return;
  const std::int64_t width = layout_.padded_size();
  kernels_.gemm({.m = rows,
                 .n = width,
                 .k = s_.head_size,
                 .a = linear,
                 .a_row = width,
                 .b = weight_.data<float>(),
                 .ldb = width,
                 .c = extra,
                 .ldc = width});
}

template <typename T>
void SlaRun<T>::QueryBlock(std::int64_t first, std::int64_t slot, std::int64_t block,
                           float* scratch) {
  const std::int64_t head = first + slot;
  const std::int64_t width = layout_.padded_size();
  const std::int64_t row_index = head * map_.classes.dim(2) + block;
  const std::span<const std::int32_t> list = CriticalList(map_, row_index);
  const auto q = RowsOfHead<const T>(args_.q, head / s_.heads, head % s_.heads);
  const auto out = RowsOfHead<T>(args_.out, head / s_.heads, head % s_.heads);

  Cutter cutter(scratch);
  QueryTile tile(layout_, cutter);
  float* features = cutter.Take(kTileRows * width);
  float* extra = cutter.Take(kTileRows * width);
  const float* state = nullptr;
  if (linear_ && all()) state = State(slot, 0);
  if (linear_ && !all() &&
      plans_[static_cast<std::size_t>(slot * states_per_head_ + block)].in_scope > 0) {
    state = State(slot, block);
    Prefetch(state, branch_.state_floats());
  }
  const std::int64_t end = std::min<std::int64_t>(s_.length, (block + 1) * map_.block_q);
  for (std::int64_t begin = block * map_.block_q; begin < end; begin += kTileRows) {
    const std::int64_t rows = std::min(kTileRows, end - begin);
    engine_.Load(q, begin, rows, tile);
    engine_.AttendList(packed_.data<float>() + slot * layout_.blocks() * layout_.block_floats(),
                       list, tile);
    // The tile's queries are done with: their memory serves the linear branch.
    if (state != nullptr) Linear(q, begin, rows, state, features, tile.q, extra);
    if (args_.lse.defined()) {
      tile.StoreLse(args_.lse.template data<float>() + head * s_.length + begin);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      float* row = extra + r * width;
      if (linear_) {
        if (state == nullptr) std::fill_n(row, s_.head_size, 0.0f);
        kernels_.f32.add(args_.proj_bias.template data<float>(), s_.head_size, row);
      }
      simd::Rows<T>(kernels_).finish(tile.out + r * width, tile.InverseSum(r),
                                     linear_ ? row : nullptr, s_.head_size, out.row(begin + r));
    }
  }
}

}  // namespace

void CpuBackend::SlaAttention(const SlaArgs& args) {
  const SlaShape shape = CheckSla(args);
  if (args.q.NumElements() == 0) return;
  VisitCompute(args.q.dtype(), [&](auto tag) {
    using T = decltype(tag);
    SlaRun<T>(*this, kernels_, parallel_, args, shape, UsePairs(args.q.dtype())).Run();
  });
}

}  // namespace slalom
