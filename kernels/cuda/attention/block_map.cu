// Block maps: pooled scores or windows, classes, lists of critical blocks, and what is counted.
#include <algorithm>

#include "kernels/cuda/attention/block_map.h"
#include "kernels/cuda/attention/ranking.cuh"
#include "kernels/cuda/check.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

constexpr int kWarps = 4;

std::int64_t Blocks(std::int64_t length, std::int64_t block) {
  return (length + block - 1) / block;
}

// What is to be pooled; `x` undefined: nothing.
struct Pooling {
  Tensor x;
  int block = 0;
  Tensor means;
};

constexpr int kPoolLanes = 32;  // that share a row
constexpr int kPoolRows = 8;    // that are read at once
constexpr int kPoolThreads = kPoolLanes * kPoolRows;
constexpr int kPoolAtOnce = 8;  // loads of a thread that are under way together

// One tensor's part of a launch.
template <typename T>
struct PoolJob {
  const T* x;  // [B, L, width]
  int block;
  int blocks;    // of rows
  float* means;  // [B, blocks, width]
};

// Adds `rows` rows, in order, to `sum`.
template <typename T, int kWidth>
__device__ inline void AddRows(const T* from, int rows, std::int64_t stride, float (&sum)[kWidth]) {
  if constexpr (kWidth == 8) {
    for (int done = 0; done < rows; done += kPoolAtOnce) {
      Packed8<T> packed[kPoolAtOnce];
#pragma unroll
      for (int i = 0; i < kPoolAtOnce; ++i) {
        if (done + i < rows) packed[i].Load(from + (done + i) * stride);
      }
#pragma unroll
      for (int i = 0; i < kPoolAtOnce; ++i) {
        if (done + i >= rows) break;
        float v[kWidth];
        packed[i].Unpack(v);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum[j] += v[j];
      }
    }
  } else {
    static_assert(kWidth == 1);
#pragma unroll 4
    for (int i = 0; i < rows; ++i) sum[0] += ToFloat(from[i * stride]);
  }
}

// One block of threads per block of rows and kPoolLanes * kWidth columns; those of one block of
// rows are neighbours. Grid (pieces of the width times both jobs' blocks, B).
template <typename T, int kWidth>
__global__ void __launch_bounds__(kPoolThreads)
    PoolKernel(PoolJob<T> job, const PoolJob<T> second, std::int64_t length, int width) {
  constexpr int kColumns = kPoolLanes * kWidth;
  __shared__ __align__(16) float sums[kPoolRows][kColumns];
  const int pieces = (width + kColumns - 1) / kColumns;
  int index = static_cast<int>(blockIdx.x) / pieces;
  const int first_column = static_cast<int>(blockIdx.x) % pieces * kColumns;
  if (index >= job.blocks) {
    index -= job.blocks;
    job = second;
  }
  const std::int64_t first = std::int64_t{index} * job.block;
  const std::int64_t end = min(first + job.block, length);
  const std::int64_t sample = blockIdx.y;
  const int lane = threadIdx.x % kPoolLanes;
  const int own = threadIdx.x / kPoolLanes;
  const int column = first_column + lane * kWidth;
  float sum[kWidth] = {};
  if (column < width) {
    const int rows = static_cast<int>(end - first - own + kPoolRows - 1) / kPoolRows;
    AddRows(job.x + (sample * length + first + own) * width + column, rows,
            std::int64_t{kPoolRows} * width, sum);
  }
  StoreFloats<kWidth>(&sums[own][lane * kWidth], sum);
  __syncthreads();
  const int target = first_column + threadIdx.x;
  if (threadIdx.x >= kColumns || target >= width) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kPoolRows; ++i) total += sums[i][threadIdx.x];
  job.means[(sample * job.blocks + index) * width + target] =
      total / static_cast<float>(end - first);
}

// One warp per row of scores: classes, and the list of the critical ones.
template <int kPerLane>
__global__ void __launch_bounds__(kWarps * 32)
    ClassifyKernel(const float* scores, std::int64_t rows, int count, int critical, int negligible,
                   std::uint8_t* classes, std::int32_t* lists, std::int32_t* counts) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= rows) return;
  ClassifyRow<kPerLane>(scores + index * count, count, critical, negligible,
                        classes + index * count, lists + index * critical);
  if (threadIdx.x % 32 == 0) counts[index] = critical;
}

__global__ void __launch_bounds__(256)
    WindowKernel(std::int64_t elements, std::int64_t length, int query_blocks, int key_blocks,
                 int block_q, int block_k, int critical, std::uint8_t* classes) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= elements) return;
  const int j = static_cast<int>(i % key_blocks);
  const std::int64_t begin = i / key_blocks % query_blocks * block_q;
  const std::int64_t end = min(begin + block_q, length);
  const int centre = static_cast<int>((begin + (end - begin - 1) / 2) / block_k);
  const int first = min(max(centre - (critical - 1) / 2, 0), key_blocks - critical);
  classes[i] = j >= first && j < first + critical ? kCriticalByte : kMarginalByte;
}

// One warp per query block.
__global__ void __launch_bounds__(kWarps * 32)
    ListKernel(const std::uint8_t* classes, std::int64_t rows, int count, int capacity,
               std::int32_t* lists, std::int32_t* counts) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  classes += row * count;
  lists += row * capacity;
  int found = 0;
  for (int first = 0; first < count; first += 32) {
    const int j = first + lane;
    const bool critical = j < count && classes[j] == kCriticalByte;
    const unsigned mask = __ballot_sync(kFullWarp, critical);
    if (critical) lists[found + __popc(mask & ((1u << lane) - 1))] = j;
    found += __popc(mask);
  }
  for (int j = found + lane; j < capacity; j += 32) lists[j] = 0;
  if (lane == 0) counts[row] = found;
}

__global__ void __launch_bounds__(256) CountKernel(const std::int32_t* counts, std::int64_t rows,
                                                   std::int64_t pairs, std::int64_t* counter) {
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  unsigned long long sum = 0;
  for (std::int64_t i = threadIdx.x; i < rows; i += blockDim.x) {
    sum += static_cast<unsigned long long>(counts[i]);
  }
  atomicAdd(&total, sum);
  __syncthreads();
  if (threadIdx.x == 0) {
    counter[0] += static_cast<std::int64_t>(total);
    counter[1] += pairs;
  }
}

// One or two tensors of the same shape.
template <typename T>
void RunPool(const Context& context, const Pooling& first, const Pooling& second) {
  const auto job = [](const Pooling& pooling) {
    if (!pooling.x.defined()) return PoolJob<T>{};
    return PoolJob<T>{pooling.x.data<T>(), pooling.block, static_cast<int>(pooling.means.dim(1)),
                      pooling.means.data<float>()};
  };
  const auto aligned = [](const Pooling& pooling) {
    return !pooling.x.defined() || reinterpret_cast<std::uintptr_t>(pooling.x.raw()) % 16 == 0;
  };
  const PoolJob<T> jobs[] = {job(first), job(second)};
  const auto length = first.x.dim(1);
  const int width = static_cast<int>(first.means.dim(2));
  const bool vectors = width % 8 == 0 && aligned(first) && aligned(second);
  const std::int64_t pieces = Blocks(width, kPoolLanes * (vectors ? 8 : 1));
  const dim3 grid(static_cast<unsigned>(pieces * (jobs[0].blocks + jobs[1].blocks)),
                  static_cast<unsigned>(first.x.dim(0)));
  const auto kernel = vectors ? PoolKernel<T, 8> : PoolKernel<T, 1>;
  kernel<<<grid, kPoolThreads, 0, context.stream>>>(jobs[0], jobs[1], length, width);
  CheckLaunch("MakeBlockMap: pooling");
}

void Pool(const Context& context, const Pooling& first, const Pooling& second) {
  first.x.dtype() == DType::kBF16 ? RunPool<bf16>(context, first, second)
                                  : RunPool<float>(context, first, second);
}

// The given `means` of x's blocks, or memory for them.
Pooling MakePooling(const Context& context, const Tensor& x, int block, const Tensor& means) {
  const Shape shape{x.dim(0), Blocks(x.dim(1), block), x.dim(2) * x.dim(3)};
  if (!means.defined()) return {x, block, context.Allocate(shape, DType::kF32)};
  RequireTensor(means, shape, DType::kF32, "MakeBlockMap: means");
  return {Tensor(), block, means};
}

struct Means {
  Tensor q, k;
};

// The means that are not given, in one launch.
Means PoolQueriesAndKeys(const Context& context, const BlockMapArgs& args) {
  const Pooling q = MakePooling(context, args.q, args.options.block_q, args.q_means);
  const Pooling k = MakePooling(context, args.k, args.options.block_k, args.k_means);
  if (q.x.defined()) {
    Pool(context, q, k);
  } else if (k.x.defined()) {
    Pool(context, k, {});
  }
  return {q.means, k.means};
}

// [B, H, Nq, Nk] f32: scores of pooled queries and keys.
Tensor PooledScores(const Context& context, const Tensor& q, const Tensor& k, std::int64_t heads) {
  const std::int64_t batch = q.dim(0), nq = q.dim(1), nk = k.dim(1), width = q.dim(2);
  const std::int64_t head_size = width / heads;
  const Tensor scores = context.Allocate({batch, heads, nq, nk}, DType::kF32);
  for (std::int64_t sample = 0; sample < batch; ++sample) {
    GemmArgs product;
    product.m = nq;
    product.n = nk;
    product.k = head_size;
    product.in_type = DType::kF32;
    product.out_type = DType::kF32;
    product.a = q.data<float>() + sample * nq * width;
    product.lda = width;
    product.a_stride = head_size;
    product.b = k.data<float>() + sample * nk * width;
    product.ldb = width;
    product.b_stride = head_size;
    product.out = scores.data<float>() + sample * heads * nq * nk;
    product.ldo = nk;
    product.out_stride = nq * nk;
    product.batch = heads;
    context.gemm->Run(product);
  }
  return scores;
}

void AllocateLists(const Context& context, BlockMap& map, std::int64_t capacity) {
  const Shape& shape = map.classes.shape();
  map.critical = context.Allocate({shape[0], shape[1], shape[2], capacity}, DType::kI32);
  map.counts = context.Allocate({shape[0], shape[1], shape[2]}, DType::kI32);
}

// The lists from the classes.
void FillLists(const Context& context, const BlockMap& map) {
  const std::int64_t rows = map.counts.NumElements();
  if (rows == 0) return;
  ListKernel<<<static_cast<unsigned>(Blocks(rows, kWarps)), kWarps * 32, 0, context.stream>>>(
      map.classes.data<std::uint8_t>(), rows, static_cast<int>(map.classes.dim(3)),
      static_cast<int>(map.critical.dim(3)), map.critical.data<std::int32_t>(),
      map.counts.data<std::int32_t>());
  CheckLaunch("MakeBlockMap: lists");
}

// Classes and lists from the scores [B, H, Nq, Nk].
void Classify(const Context& context, const Tensor& scores, std::int64_t negligible,
              const BlockMap& map) {
  const std::int64_t rows = map.counts.NumElements();
  const auto count = static_cast<int>(scores.dim(3));
  const auto kernel = count <= 128    ? ClassifyKernel<4>
                      : count <= 512  ? ClassifyKernel<16>
                      : count <= 1280 ? ClassifyKernel<40>
                                      : ClassifyKernel<0>;
  kernel<<<static_cast<unsigned>(Blocks(rows, kWarps)), kWarps * 32, 0, context.stream>>>(
      scores.data<float>(), rows, count, static_cast<int>(map.critical.dim(3)),
      static_cast<int>(negligible), map.classes.data<std::uint8_t>(),
      map.critical.data<std::int32_t>(), map.counts.data<std::int32_t>());
  CheckLaunch("MakeBlockMap: classes");
}

}  // namespace

void PoolBlocks(const Context& context, const Tensor& x, int block, const Tensor& means) {
  Pool(context, {x, block, means}, {});
}

BlockMap MakeBlockMap(const Context& context, const BlockMapArgs& args) {
  Require(args.q.defined() && args.q.shape().rank() == 4 && args.options.block_k > 0,
          "MakeBlockMap: q is not [B, L, H, D], or a block is empty");
  return MakeBlockMap(context, args,
                      ChooseRankWay(args.q.dim(3), Blocks(args.q.dim(1), args.options.block_k),
                                    context.compute_major));
}

BlockMap MakeBlockMap(const Context& context, const BlockMapArgs& args, RankWay way) {
  Require(args.q.defined() && args.q.shape().rank() == 4 && IsComputeType(args.q.dtype()) &&
              args.q.dim(1) > 0,
          "MakeBlockMap: q is not [B, L, H, D] of f32 or bf16 with L > 0");
  RequireTensor(args.k, args.q.shape(), args.q.dtype(), "MakeBlockMap: k");
  const BlockMapOptions& options = args.options;
  Require(options.block_q > 0 && options.block_k > 0, "MakeBlockMap: options have an empty block");
  Require(
      options.topk > 0 && options.topk <= 1 && options.negligible >= 0 && options.negligible < 1,
      "MakeBlockMap: topk is not in (0, 1] or negligible not in [0, 1)");
  const std::int64_t batch = args.q.dim(0), length = args.q.dim(1), heads = args.q.dim(2);
  const std::int64_t nq = Blocks(length, options.block_q);
  const std::int64_t nk = Blocks(length, options.block_k);
  const std::int64_t critical = CriticalBlocks(options.topk, nk);
  const std::int64_t negligible = NegligibleBlocks(options.negligible, nk, critical);
  BlockMap map;
  map.block_q = options.block_q;
  map.block_k = options.block_k;
  map.classes = context.Allocate({batch, heads, nq, nk}, DType::kU8);
  AllocateLists(context, map, critical);
  if (options.kind == BlockMapKind::kWindow) {
    Require(args.grid.size() == length, "MakeBlockMap: grid does not hold q's tokens");
    map.grid = args.grid;
    const std::int64_t pairs = map.classes.NumElements();
    WindowKernel<<<static_cast<unsigned>((pairs + 255) / 256), 256, 0, context.stream>>>(
        pairs, length, static_cast<int>(nq), static_cast<int>(nk), options.block_q, options.block_k,
        static_cast<int>(critical), map.classes.data<std::uint8_t>());
    CheckLaunch("MakeBlockMap: windows");
    FillLists(context, map);
  } else {
    const Means means = PoolQueriesAndKeys(context, args);
    if (way == RankWay::kOwn) {
      ScoreAndRank(context, means.q, means.k, heads, negligible, map);
    } else {
      Classify(context, PooledScores(context, means.q, means.k, heads), negligible, map);
    }
  }
  return map;
}

BlockMap BlockMapFromClasses(const Context& context, const Tensor& classes, int block_q,
                             int block_k) {
  Require(classes.defined() && classes.shape().rank() == 4 && classes.dtype() == DType::kU8,
          "BlockMapFromClasses: classes are not [B, H, Nq, Nk] u8");
  Require(block_q > 0 && block_k > 0, "BlockMapFromClasses: a block is empty");
  BlockMap map;
  map.block_q = block_q;
  map.block_k = block_k;
  map.classes = classes;
  // Room for every block: the longest list is known on the device only.
  AllocateLists(context, map, std::max<std::int64_t>(classes.dim(3), 1));
  FillLists(context, map);
  return map;
}

void CountPairs(const Context& context, const BlockMap& map, const Tensor& counter) {
  Require(map.counts.defined(), "CountPairs: the map has no counts");
  RequireTensor(counter, {2}, DType::kI64, "CountPairs: counter");
  CountKernel<<<1, 256, 0, context.stream>>>(map.counts.data<std::int32_t>(),
                                             map.counts.NumElements(), map.classes.NumElements(),
                                             counter.data<std::int64_t>());
  CheckLaunch("CountPairs");
}

}  // namespace slalom::cuda
