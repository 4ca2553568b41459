// The share of the softmax mass that the critical blocks hold, estimated from a sample of rows.
#include <algorithm>

#include "kernels/cuda/attention/block_map.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/fragments.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/shared_address.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

constexpr auto kCriticalByte = static_cast<std::uint8_t>(BlockClass::kCritical);

std::int64_t Blocks(std::int64_t length, std::int64_t block) {
  return (length + block - 1) / block;
}

struct MassParameters {
  TokenGrid grid;
  bool reordered;  // the second half of the heads orders its tokens (y, x, t)
  std::int64_t length;
  int heads;
  int head_size;
  int query_blocks;
  int key_blocks;
  int block_q;
  int block_k;
  int tiles_per_block;  // of keys, per key block
  int samples;          // rows per head
  float scale;

  // Of a sampled row in its head's order.
  __device__ std::int64_t Position(std::int64_t sampled) const {
    return (2 * sampled + 1) * length / (2 * samples);
  }
};

// The token at position n of the order (y, x, t).
__device__ inline std::int64_t TokenAt(const TokenGrid& grid, std::int64_t n) {
  const std::int64_t frame = n % grid.frames;
  const std::int64_t place = n / grid.frames;  // y * width + x
  return frame * grid.height * grid.width + place;
}

constexpr int kMassTile = 64;      // sampled rows, and keys, of one block of threads
constexpr int kMassThreads = 128;  // of the tensor cores' kernel
constexpr int kMassRun = 8;        // its tiles of keys, one after the other
constexpr int kMassDepth = 32;     // channels in shared memory at once

// A tile of rows as columns of shared memory: channels [first, first + kMassDepth).
template <typename T, typename RowOf>
__device__ inline void LoadMassTile(const T* x, const RowOf& row_of, int rows, int first,
                                    int head_size, float (&to)[kMassDepth][kMassTile + 1]) {
  for (int i = threadIdx.x; i < kMassTile * kMassDepth; i += blockDim.x) {
    const int row = i / kMassDepth, channel = i % kMassDepth;
    const bool there = row < rows && first + channel < head_size;
    to[channel][row] = there ? ToFloat(x[row_of(row) + first + channel]) : 0.0f;
  }
}

// partial [B, H, samples, tiles]: the largest score of a sampled row in a tile of keys, and the sum
// of exp(score - largest). Grid (tiles of keys, groups of samples, B * H). Tiles do not straddle
// key blocks: a block has p.tiles_per_block.
template <typename T>
__global__ void __launch_bounds__(256)
    MassKernel(const MassParameters p, const T* q, const T* k, float2* partial) {
  __shared__ float queries[kMassDepth][kMassTile + 1];
  __shared__ float keys[kMassDepth][kMassTile + 1];
  const int column = threadIdx.x % 16, row = threadIdx.x / 16;
  const std::int64_t head = blockIdx.z % p.heads, sample = blockIdx.z / p.heads;
  const bool moved = p.reordered && head >= p.heads / 2;
  const auto row_of = [&](std::int64_t n) {
    const std::int64_t token = moved ? TokenAt(p.grid, n) : n;
    return ((sample * p.length + token) * p.heads + head) * p.head_size;
  };
  const int first_sample = blockIdx.y * kMassTile;
  const int block = blockIdx.x / p.tiles_per_block, piece = blockIdx.x % p.tiles_per_block;
  const std::int64_t first_key = static_cast<std::int64_t>(block) * p.block_k + piece * kMassTile;
  const std::int64_t end =
      min(min(first_key + kMassTile, (block + std::int64_t{1}) * p.block_k), p.length);
  const int key_count = static_cast<int>(max(end - first_key, std::int64_t{0}));
  float scores[4][4] = {};
  for (int first = 0; first < p.head_size; first += kMassDepth) {
    LoadMassTile(
        q, [&](int i) { return row_of(p.Position(first_sample + i)); }, p.samples - first_sample,
        first, p.head_size, queries);
    LoadMassTile(
        k, [&](int i) { return row_of(first_key + i); }, key_count, first, p.head_size, keys);
    __syncthreads();
#pragma unroll 8
    for (int c = 0; c < kMassDepth; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          scores[i][j] += queries[c][row + 16 * i] * keys[c][column + 16 * j];
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float largest = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      scores[i][j] = column + 16 * j < key_count ? scores[i][j] * p.scale : -INFINITY;
      largest = fmaxf(largest, scores[i][j]);
    }
    largest = GroupMax<16>(largest);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (column + 16 * j < key_count) sum += expf(scores[i][j] - largest);
    }
    sum = GroupSum<16>(sum);
    const int sampled = first_sample + row + 16 * i;
    if (column == 0 && sampled < p.samples) {
      partial[(static_cast<std::int64_t>(blockIdx.z) * p.samples + sampled) * gridDim.x +
              blockIdx.x] = make_float2(largest, sum);
    }
  }
}

// Where the tensor cores' kernel keeps queries and keys.
template <int kD>
struct alignas(2 * kD) MassTiles {
  bf16 queries[kMassTile][kD];
  bf16 keys[2][kMassTile][kD];  // one arrives while the other is multiplied
};

// Brings rows of kD channels into a swizzled tile; those that are not there become zeros.
template <int kD, typename RowOf>
__device__ inline void GatherRows(bf16 (&to)[kMassTile][kD], const bf16* x, const RowOf& row_of,
                                  int rows) {
  constexpr int kChunks = kD / 8;
  const auto base = SharedAddress(&to);
  for (int i = threadIdx.x; i < kMassTile * kChunks; i += kMassThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool there = row < rows;
    CopyAsync16(base + SwizzledOffset<kChunks>(row, chunk),
                x + (there ? row_of(row) + chunk * 8 : 0), there);
  }
}

// The same as MassKernel with mma.sync, for block_k in multiples of kMassTile. A warp has 16
// sampled rows. Grid (groups of kMassRun tiles of keys, groups of samples, B * H).
template <int kD>
__global__ void __launch_bounds__(kMassThreads)
    MassTensorCoreKernel(const MassParameters p, const bf16* q, const bf16* k, float2* partial) {
  extern __shared__ __align__(2 * kD) std::byte dynamic_shared[];
  auto& tiles = *reinterpret_cast<MassTiles<kD>*>(dynamic_shared);
  const std::int64_t head = blockIdx.z % p.heads, sample = blockIdx.z / p.heads;
  const bool moved = p.reordered && head >= p.heads / 2;
  const auto row_of = [&](std::int64_t n) {
    const std::int64_t token = moved ? TokenAt(p.grid, n) : n;
    return ((sample * p.length + token) * p.heads + head) * kD;
  };
  const int all_tiles = p.key_blocks * p.tiles_per_block;
  const int first_sample = blockIdx.y * kMassTile, first_tile = blockIdx.x * kMassRun;
  const int end_tile = min(first_tile + kMassRun, all_tiles);
  // A ragged last block may lack whole tiles: then this is not positive.
  const auto key_count = [&](int tile) {
    return static_cast<int>(max(
        min(std::int64_t{kMassTile}, p.length - std::int64_t{tile} * kMassTile), std::int64_t{0}));
  };
  const auto load = [&](int tile) {
    if (tile < end_tile) {
      GatherRows<kD>(
          tiles.keys[tile % 2], k,
          [&](int i) { return row_of(std::int64_t{tile} * kMassTile + i); }, key_count(tile));
    }
    CopyAsyncCommit();
  };
  GatherRows<kD>(
      tiles.queries, q, [&](int i) { return row_of(p.Position(first_sample + i)); },
      p.samples - first_sample);
  load(first_tile);
  const int lane = threadIdx.x % 32, row = static_cast<int>(threadIdx.x) / 32 * 16;
#pragma unroll 1
  for (int tile = first_tile; tile < end_tile; ++tile) {
    load(tile + 1);
    CopyAsyncWait<1>();
    __syncthreads();
    float scores[kMassTile / 8][4] = {};
    const FragmentReader<Operand::kLeft, kD> queries(tiles.queries, row);
    const FragmentReader<Operand::kRightTransposed, kD> keys(tiles.keys[tile % 2]);
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      std::uint32_t a[4];
      queries.Load(a, 0, step * 16);
#pragma unroll
      for (int pair = 0; pair < kMassTile / 16; ++pair) {
        std::uint32_t b[4];
        keys.Load(b, pair * 16, step * 16);
        Mma16x16x16(scores[2 * pair], scores[2 * pair + 1], a, b);
      }
    }
    const int count = key_count(tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = -INFINITY, sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kMassTile / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[j][2 * half + i];
          score = j * 8 + lane % 4 * 2 + i < count ? score * p.scale : -INFINITY;
          largest = fmaxf(largest, score);
        }
      }
      largest = GroupMax<4>(largest);
#pragma unroll
      for (int j = 0; j < kMassTile / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (j * 8 + lane % 4 * 2 + i < count) sum += __expf(scores[j][2 * half + i] - largest);
        }
      }
      sum = GroupSum<4>(sum);
      const int sampled = first_sample + row + half * 8 + lane / 4;
      if (lane % 4 == 0 && sampled < p.samples) {
        partial[(static_cast<std::int64_t>(blockIdx.z) * p.samples + sampled) * all_tiles + tile] =
            make_float2(largest, sum);
      }
    }
    __syncthreads();  // the keys' memory is free
  }
}

// kept [B, H, samples]: the share of the softmax on critical blocks. One block of threads per row.
__global__ void __launch_bounds__(128) KeptKernel(const MassParameters p, const float2* partial,
                                                  const std::uint8_t* classes, float* kept) {
  __shared__ float shared[32];
  const std::int64_t head_index = blockIdx.x / p.samples;
  const std::int64_t position = p.Position(blockIdx.x % p.samples);
  const int tiles = p.key_blocks * p.tiles_per_block;
  partial += static_cast<std::int64_t>(blockIdx.x) * tiles;
  classes += (head_index * p.query_blocks + position / p.block_q) * p.key_blocks;
  float largest = -INFINITY, sum = 0.0f, critical = 0.0f;
  for (int i = threadIdx.x; i < tiles; i += blockDim.x) largest = fmaxf(largest, partial[i].x);
  largest = BlockMax(largest, shared);
  for (int i = threadIdx.x; i < tiles; i += blockDim.x) {
    const float share = partial[i].y * expf(partial[i].x - largest);
    sum += share;
    if (classes[i / p.tiles_per_block] == kCriticalByte) critical += share;
  }
  sum = BlockSum(sum, shared);
  critical = BlockSum(critical, shared);
  if (threadIdx.x == 0) kept[blockIdx.x] = critical / sum;
}

__global__ void __launch_bounds__(256) MeanKernel(const float* x, int count, float* mean) {
  __shared__ float shared[32];
  float sum = 0.0f;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += x[i];
  sum = BlockSum(sum, shared);
  if (threadIdx.x == 0) *mean = sum / static_cast<float>(count);
}

// `grid` is MassKernel's.
template <int kD>
void RunTensorCores(const Context& context, const MassParameters& parameters, const Tensor& q,
                    const Tensor& k, dim3 grid, float2* partials) {
  constexpr std::size_t kBytes = sizeof(MassTiles<kD>);
  Check(cudaFuncSetAttribute(MassTensorCoreKernel<kD>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kBytes)),
        "AttentionMassKept: shared memory");
  grid.x = (grid.x + kMassRun - 1) / kMassRun;
  MassTensorCoreKernel<kD><<<grid, kMassThreads, kBytes, context.stream>>>(
      parameters, q.data<bf16>(), k.data<bf16>(), partials);
}

}  // namespace

MassWay ChooseMassWay(DType type, std::int64_t head_size, int block_k, bool aligned) {
  const bool fits = type == DType::kBF16 && (head_size == 64 || head_size == 128) &&
                    block_k % kMassTile == 0 && aligned;
  return fits ? MassWay::kTensorCore : MassWay::kPlain;
}

void AttentionMassKept(const Context& context, const Tensor& q, const Tensor& k, float scale,
                       const BlockMap& map, int rows, const Tensor& out) {
  Require(q.defined() && q.shape().rank() == 4 && k.defined(),
          "AttentionMassKept: q is not [B, L, H, D], or k is missing");
  const auto aligned = [](const Tensor& x) {
    return reinterpret_cast<std::uintptr_t>(x.raw()) % 16 == 0;
  };
  AttentionMassKept(context, q, k, scale, map, rows, out,
                    ChooseMassWay(q.dtype(), q.dim(3), map.block_k, aligned(q) && aligned(k)));
}

void AttentionMassKept(const Context& context, const Tensor& q, const Tensor& k, float scale,
                       const BlockMap& map, int rows, const Tensor& out, MassWay way) {
  Require(q.defined() && q.shape().rank() == 4 && IsComputeType(q.dtype()) && q.dim(1) > 0,
          "AttentionMassKept: q is not [B, L, H, D] of f32 or bf16 with L > 0");
  RequireTensor(k, q.shape(), q.dtype(), "AttentionMassKept: k");
  RequireTensor(out, {1}, DType::kF32, "AttentionMassKept: out");
  Require(rows > 0, "AttentionMassKept: no rows are asked for");
  const std::int64_t length = q.dim(1);
  const auto samples = static_cast<int>(std::min<std::int64_t>(rows, length));
  const MassParameters parameters{map.grid,
                                  map.grid.size() > 0,
                                  length,
                                  static_cast<int>(q.dim(2)),
                                  static_cast<int>(q.dim(3)),
                                  static_cast<int>(map.classes.dim(2)),
                                  static_cast<int>(map.classes.dim(3)),
                                  map.block_q,
                                  map.block_k,
                                  static_cast<int>(Blocks(map.block_k, kMassTile)),
                                  samples,
                                  scale};
  const std::int64_t heads = q.dim(0) * q.dim(2), count = heads * samples;
  const std::int64_t tiles = std::int64_t{parameters.key_blocks} * parameters.tiles_per_block;
  const Tensor kept = context.Allocate({count}, DType::kF32);
  const Tensor partial = context.Allocate({count, tiles, 2}, DType::kF32);
  auto* partials = reinterpret_cast<float2*>(partial.raw());
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(Blocks(samples, kMassTile)),
                  static_cast<unsigned>(heads));
  if (way == MassWay::kTensorCore) {
    parameters.head_size == 64 ? RunTensorCores<64>(context, parameters, q, k, grid, partials)
                               : RunTensorCores<128>(context, parameters, q, k, grid, partials);
  } else if (q.dtype() == DType::kBF16) {
    MassKernel<<<grid, 256, 0, context.stream>>>(parameters, q.data<bf16>(), k.data<bf16>(),
                                                 partials);
  } else {
    MassKernel<<<grid, 256, 0, context.stream>>>(parameters, q.data<float>(), k.data<float>(),
                                                 partials);
  }
  CheckLaunch("AttentionMassKept");
  KeptKernel<<<static_cast<unsigned>(count), 128, 0, context.stream>>>(
      parameters, partials, map.classes.data<std::uint8_t>(), kept.data<float>());
  CheckLaunch("AttentionMassKept: kept");
  MeanKernel<<<1, 256, 0, context.stream>>>(kept.data<float>(), static_cast<int>(count),
                                            out.data<float>());
  CheckLaunch("AttentionMassKept: mean");
}

}  // namespace slalom::cuda
