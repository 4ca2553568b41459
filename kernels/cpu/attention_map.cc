// Block maps: pooled scores or sliding windows, and what is counted from them.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/block_map.h"
#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_backend.h"

namespace slalom {
namespace {

std::int64_t Blocks(std::int64_t length, std::int64_t block) {
  return (length + block - 1) / block;
}

// Mean of one block's rows: x [L, width] of one batch element -> mean [width].
template <typename T>
void PoolBlock(const simd::Kernels& kernels, const T* x, std::int64_t length, std::int64_t width,
               std::int64_t block, std::int64_t index, float* mean) {
  const std::int64_t begin = index * block;
  const std::int64_t end = std::min(length, begin + block);
  std::fill_n(mean, width, 0.0f);
  for (std::int64_t r = begin; r < end; ++r) simd::Rows<T>(kernels).add(x + r * width, width, mean);
  const auto rows = static_cast<float>(end - begin);
  for (std::int64_t c = 0; c < width; ++c) mean[c] /= rows;
}

// An integer for a score, larger for a larger score, equal for an equal one. NaN is last.
std::int32_t OrderKey(float score) {
  const float value = std::isnan(score) ? -std::numeric_limits<float>::infinity() : score + 0.0f;
  const auto bits = std::bit_cast<std::int32_t>(value);
  return bits >= 0 ? bits : bits ^ std::numeric_limits<std::int32_t>::max();
}

// The first `rank` of a row: whose key is above the threshold, and some whose key equals it.
struct Cut {
  std::int32_t threshold = 0;
  std::int64_t ties = 0;

  // Asked for every key in ascending order of index.
  bool Holds(std::int32_t key) { return key > threshold || (key == threshold && ties-- > 0); }
};

// Bit by bit, the largest threshold that `rank` keys reach, or one that just as many do.
Cut CutAt(const simd::Kernels& kernels, const std::vector<std::int32_t>& keys, std::int64_t rank) {
  constexpr std::uint32_t kSign = 0x80000000u;
  const auto reach = [&](std::int32_t threshold) {
    return kernels.count_from(keys.data(), std::ssize(keys), threshold);
  };
  std::uint32_t found = 0;
  for (std::uint32_t bit = kSign; bit != 0; bit >>= 1) {
    const auto threshold = static_cast<std::int32_t>((found | bit) ^ kSign);
    const std::int64_t reached = reach(threshold);
    if (reached == rank) return {threshold, rank};
    if (reached > rank) found |= bit;
  }
  const auto threshold = static_cast<std::int32_t>(found ^ kSign);
  return {threshold, rank - reach(threshold + 1)};
}

// Classes of one query block from its scores: best first, ties to the lower index, NaN last.
void ClassifyRow(const simd::Kernels& kernels, const std::vector<float>& scores,
                 std::int64_t critical, std::int64_t negligible, std::uint8_t* classes) {
  std::vector<std::int32_t> keys(scores.size());
  std::transform(scores.begin(), scores.end(), keys.begin(), OrderKey);
  Cut first = CutAt(kernels, keys, critical);
  Cut kept = CutAt(kernels, keys, std::ssize(keys) - negligible);
  for (std::size_t j = 0; j < keys.size(); ++j) {
    const bool is_kept = kept.Holds(keys[j]);
    const BlockClass c = first.Holds(keys[j]) ? BlockClass::kCritical
                         : is_kept            ? BlockClass::kMarginal
                                              : BlockClass::kNegligible;
    classes[j] = static_cast<std::uint8_t>(c);
  }
}

// The window of one query block: `critical` neighbouring key blocks around the one that holds the
// block's middle token, moved inwards at the ends. The rest is marginal.
void WindowRow(std::int64_t query_block, std::int64_t length, const BlockMapOptions& options,
               std::int64_t key_blocks, std::int64_t critical, std::uint8_t* classes) {
  const std::int64_t begin = query_block * options.block_q;
  const std::int64_t end = std::min<std::int64_t>(length, begin + options.block_q);
  const std::int64_t centre = (begin + (end - begin - 1) / 2) / options.block_k;
  const std::int64_t first =
      std::clamp<std::int64_t>(centre - (critical - 1) / 2, 0, key_blocks - critical);
  for (std::int64_t j = 0; j < key_blocks; ++j) {
    const bool inside = j >= first && j < first + critical;
    classes[j] = static_cast<std::uint8_t>(inside ? BlockClass::kCritical : BlockClass::kMarginal);
  }
}

// Fills critical lists and counts from the classes. Allocates them with the smallest M that holds
// every list.
void FillLists(CpuBackend& backend, BlockMap& map) {
  const Shape& shape = map.classes.shape();
  const std::int64_t rows = shape[0] * shape[1] * shape[2];
  const std::int64_t blocks = shape[3];
  const std::uint8_t* classes = map.classes.data<std::uint8_t>();
  const auto critical = static_cast<std::uint8_t>(BlockClass::kCritical);
  map.counts = backend.Allocate(Shape{shape[0], shape[1], shape[2]}, DType::kI32);
  std::int32_t* counts = map.counts.data<std::int32_t>();
  std::int32_t most = 1;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::uint8_t* row = classes + r * blocks;
    counts[r] = static_cast<std::int32_t>(std::count(row, row + blocks, critical));
    most = std::max(most, counts[r]);
  }
  map.critical = backend.Allocate(Shape{shape[0], shape[1], shape[2], most}, DType::kI32);
  for (std::int64_t r = 0; r < rows; ++r) {
    std::int32_t* list = map.critical.data<std::int32_t>() + r * most;
    std::fill(list, list + most, 0);
    for (std::int64_t j = 0; j < blocks; ++j) {
      if (classes[r * blocks + j] == critical) *list++ = static_cast<std::int32_t>(j);
    }
  }
}

// The share of one query's softmax mass that its critical blocks hold.
double MassOfRow(const float* scores, std::int64_t length, std::int64_t block,
                 const std::uint8_t* classes) {
  const float largest = *std::max_element(scores, scores + length);
  double sum = 0;
  double kept = 0;
  for (std::int64_t j = 0; j < length; ++j) {
    const double mass = std::exp(scores[j] - largest);
    sum += mass;
    if (classes[j / block] == static_cast<std::uint8_t>(BlockClass::kCritical)) kept += mass;
  }
  return kept / sum;
}

}  // namespace

void CheckMap(const Check& check, const BlockMap* map, std::int64_t batch, std::int64_t heads,
              std::int64_t length) {
  check.That(map != nullptr, "map", "is missing");
  check.That(map->block_q > 0 && map->block_k > 0, "map", "has an empty block");
  const Shape rows{batch, heads, Blocks(length, map->block_q)};
  const Shape classes{batch, heads, rows[2], Blocks(length, map->block_k)};
  check.Is(map->classes, classes, DType::kU8, "map.classes");
  check.Is(map->counts, rows, DType::kI32, "map.counts");
  check.Rank(map->critical, 4, "map.critical");
  check.Is(map->critical, Shape{batch, heads, rows[2], map->critical.dim(3)}, DType::kI32,
           "map.critical");
}

void PoolBlocks(const simd::Kernels& kernels, const Parallel& parallel, const Tensor& x,
                std::int64_t width, std::int64_t block, const Tensor& means) {
  const std::int64_t length = x.dim(1);
  const std::int64_t blocks = means.dim(1);
  VisitCompute(x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    parallel.Tasks(x.dim(0) * blocks, [&](std::int64_t i, int /*thread*/) {
      PoolBlock(kernels, x.data<T>() + i / blocks * length * width, length, width, block,
                i % blocks, means.data<float>() + i * width);
    });
  });
}

std::vector<std::int32_t> WindowOrder(const TokenGrid& grid) {
  std::vector<std::int32_t> order;
  order.reserve(static_cast<std::size_t>(grid.size()));
  for (std::int64_t pixel = 0; pixel < grid.height * grid.width; ++pixel) {
    for (std::int64_t t = 0; t < grid.frames; ++t) {
      order.push_back(static_cast<std::int32_t>(t * grid.height * grid.width + pixel));
    }
  }
  return order;
}

BlockMap CpuBackend::MakeBlockMap(const BlockMapArgs& args) {
  const Check check("MakeBlockMap");
  check.Rank(args.q, 4, "q");
  check.Compute(args.q, "q");
  const std::int64_t batch = args.q.dim(0);
  const std::int64_t length = args.q.dim(1);
  const std::int64_t heads = args.q.dim(2);
  const std::int64_t head_size = args.q.dim(3);
  check.Is(args.k, args.q.shape(), args.q.dtype(), "k");
  const BlockMapOptions& options = args.options;
  check.That(options.block_q > 0 && options.block_k > 0, "options", "has an empty block");
  check.That(options.topk > 0 && options.topk <= 1, "options", "has topk outside (0, 1]");
  check.That(options.negligible >= 0 && options.negligible < 1, "options",
             "has negligible outside [0, 1)");
  check.That(length > 0, "q", "has no tokens");
  const bool window = options.kind == BlockMapKind::kWindow;
  check.That(!window || args.grid.size() == length, "grid", "does not hold q's tokens");

  const std::int64_t nq = Blocks(length, options.block_q);
  const std::int64_t nk = Blocks(length, options.block_k);
  const std::int64_t critical = CriticalBlocks(options.topk, nk);
  const std::int64_t negligible = NegligibleBlocks(options.negligible, nk, critical);
  BlockMap map;
  map.block_q = options.block_q;
  map.block_k = options.block_k;
  map.classes = Allocate(Shape{batch, heads, nq, nk}, DType::kU8);
  std::uint8_t* classes = map.classes.data<std::uint8_t>();
  if (window) {
    map.grid = args.grid;
    for (std::int64_t r = 0; r < batch * heads * nq; ++r) {
      WindowRow(r % nq, length, options, nk, critical, classes + r * nk);
    }
    FillLists(*this, map);
    return map;
  }

  const std::int64_t width = heads * head_size;
  const auto pool = [&](const Tensor& x, std::int64_t block, std::int64_t blocks,
                        const Tensor& known) {
    if (known.defined()) {
      check.Is(known, Shape{batch, blocks, width}, DType::kF32, "means");
      return known;
    }
    Tensor means = Allocate(Shape{batch, blocks, width}, DType::kF32);
    PoolBlocks(kernels_, parallel_, x, width, block, means);
    return means;
  };
  const Tensor pooled_q = pool(args.q, options.block_q, nq, args.q_means);
  const Tensor pooled_k = pool(args.k, options.block_k, nk, args.k_means);

  parallel_.Tasks(batch * heads * nq, [&](std::int64_t r, int /*thread*/) {
    const std::int64_t i = r % nq;
    const std::int64_t h = r / nq % heads;
    const std::int64_t b = r / nq / heads;
    const float* q = pooled_q.data<float>() + (b * nq + i) * width + h * head_size;
    const float* k = pooled_k.data<float>() + b * nk * width + h * head_size;
    std::vector<float> scores(static_cast<std::size_t>(nk));
    for (std::int64_t j = 0; j < nk; ++j) {
      scores[static_cast<std::size_t>(j)] = kernels_.dot(q, k + j * width, head_size);
    }
    ClassifyRow(kernels_, scores, critical, negligible, classes + r * nk);
  });
  FillLists(*this, map);
  return map;
}

BlockMap CpuBackend::BlockMapFromClasses(const Tensor& classes, int block_q, int block_k) {
  const Check check("BlockMapFromClasses");
  check.Rank(classes, 4, "classes");
  check.That(classes.dtype() == DType::kU8, "classes", "is not U8");
  check.That(block_q > 0 && block_k > 0, "block_q", "or block_k is not positive");
  BlockMap map;
  map.block_q = block_q;
  map.block_k = block_k;
  map.classes = classes;
  FillLists(*this, map);
  return map;
}

void CpuBackend::CountPairs(const BlockMap& map, const Tensor& counter) {
  const Check check("CountPairs");
  check.Present(map.counts, "map");
  check.Is(counter, Shape{2}, DType::kI64, "counter");
  const std::int32_t* counts = map.counts.data<std::int32_t>();
  std::int64_t critical = 0;
  for (std::int64_t i = 0; i < map.counts.NumElements(); ++i) critical += counts[i];
  counter.data<std::int64_t>()[0] += critical;
  counter.data<std::int64_t>()[1] += map.classes.NumElements();
}

void CpuBackend::AttentionMassKept(const Tensor& q, const Tensor& k, float scale,
                                   const BlockMap& map, int rows, const Tensor& out) {
  const Check check("AttentionMassKept");
  check.Rank(q, 4, "q");
  check.Compute(q, "q");
  check.Is(k, q.shape(), q.dtype(), "k");
  check.Is(out, Shape{1}, DType::kF32, "out");
  const std::int64_t batch = q.dim(0), length = q.dim(1), heads = q.dim(2), size = q.dim(3);
  CheckMap(check, &map, batch, heads, length);
  check.That(rows > 0 && length > 0, "rows", "is not positive");
  const std::int64_t samples = std::min<std::int64_t>(rows, length);
  const bool window = map.grid.size() > 0;
  check.That(!window || map.grid.size() == length, "map.grid", "does not hold q's tokens");
  const std::vector<std::int32_t> order = WindowOrder(map.grid);
  const std::int64_t query_blocks = map.classes.dim(2);
  const std::int64_t key_blocks = map.classes.dim(3);
  const std::int64_t floats = 2 * RoundUp(size, 16) + RoundUp(length, 16);
  const Tensor scratch = Allocate(Shape{parallel_.threads(), floats}, DType::kF32);
  std::vector<double> kept(static_cast<std::size_t>(batch * heads * samples));
  VisitCompute(q.dtype(), [&](auto tag) {
    using T = decltype(tag);
    parallel_.Tasks(batch * heads * samples, [&](std::int64_t task, int thread) {
      const std::int64_t sample = task % samples;
      const std::int64_t h = task / samples % heads;
      const std::int64_t b = task / samples / heads;
      // The middles of `samples` equal stretches.
      const std::int64_t position = (2 * sample + 1) * length / (2 * samples);
      const std::int32_t* own_order = window && h >= heads / 2 ? order.data() : nullptr;
      const auto query = RowsOfHead<const T>(q, b, h, own_order);
      const auto keys = RowsOfHead<const T>(k, b, h, own_order);
      Cutter cutter(scratch.data<float>() + thread * floats);
      float* query_row = cutter.Take(size);
      float* key_row = cutter.Take(size);
      float* scores = cutter.Take(length);
      const auto& loops = simd::Rows<T>(kernels_);
      loops.widen(query.row(position), scale, size, query_row);
      for (std::int64_t j = 0; j < length; ++j) {
        loops.widen(keys.row(j), 1.0f, size, key_row);
        scores[j] = kernels_.dot(query_row, key_row, size);
      }
      const std::int64_t row = (b * heads + h) * query_blocks + position / map.block_q;
      kept[static_cast<std::size_t>(task)] = MassOfRow(
          scores, length, map.block_k, map.classes.data<std::uint8_t>() + row * key_blocks);
    });
  });
  const double sum = std::accumulate(kept.begin(), kept.end(), 0.0);
  out.data<float>()[0] = static_cast<float>(sum / static_cast<double>(kept.size()));
}

}  // namespace slalom
