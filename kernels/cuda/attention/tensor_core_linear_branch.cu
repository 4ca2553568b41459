// The linear branch with mma.sync, for bf16 and heads of 64 or 128 channels: feature(Q) times the
// sums over the scope, normalised, projected and added to the output in one pass.
#include <algorithm>

#include "kernels/cuda/attention/features.cuh"
#include "kernels/cuda/attention/linear_tiles.cuh"
#include "kernels/cuda/check.h"

namespace slalom::cuda {
namespace {

using namespace linear_tiles;

constexpr int kApplyThreads = 128;  // a warp owns 16 queries
constexpr int kBlocksPerSm = 2;

struct ApplyParameters {
  FeatureParameters features;
  const bf16* q;
  bf16* out;
  std::int64_t length;
  int heads;
  int first_head;
  const bf16* states;  // [heads, states_per_head, kD + 1, kD]
  int states_per_head;
  int block_q;         // queries that share a state; all of them when states_per_head is 1
  int tile_rows;       // queries of a tile: TileRows(block_q)
  int tiles;           // of queries for one block of threads; 1 with a weight
  const bf16* weight;  // [kD, kD], transposed, or null
  const float* bias;   // [kD] or null
  bool accumulate;
};

template <int kD>
struct alignas(2 * kD) QueryTile {
  bf16 q[kTile][kD];
  bf16 out[kTile][kD];
};

// With a weight there is one tile of queries, else the next one arrives while one is worked on.
template <int kD>
struct alignas(2 * kD) ApplyTiles {
  bf16 state[kD][kD];
  QueryTile<kD> first;
  union {
    QueryTile<kD> second;
    bf16 weight[kD][kD];
  };
  float normaliser[kD];
};

// The features of a warp's 16 queries as operands of mma, and what their results are divided by.
template <int kD>
struct QueryFeatures {
  std::uint32_t a[kD / 16][4];
  float inverse[2];  // of rows lane / 4 and lane / 4 + 8

  __device__ QueryFeatures(const FeatureParameters& p, const bf16 (&tile)[kTile][kD],
                           const float* normaliser, int row, std::int64_t token,
                           std::int64_t last_token) {
    const int lane = threadIdx.x % 32;
    LoadFragments<kD>(a, tile, row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t own = token + lane / 4 + half * 8;
      Map(p, normaliser, half, own < last_token ? own : last_token);
    }
  }

 private:
  __device__ void Map(const FeatureParameters& p, const float* normaliser, int half,
                      std::int64_t token) {
    const int quad = threadIdx.x % 4;
    float x[kD / 4];
    UnpackHalf<kD>(a, half, x);
    MapFeatures<4>(p.feature, x);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kD / 8; ++i) {
      const float2 z = *reinterpret_cast<const float2*>(normaliser + i * 8 + quad * 2);
      sum += x[2 * i] * z.x + x[2 * i + 1] * z.y;
    }
    inverse[half] = 1.0f / (GroupSum<4>(sum) + kNormaliserEpsilon);
    RotateAndPackHalf<kD>(p, token, x, half, a);
  }
};

// Adds bias and what the tile holds (each only if there), and leaves the result in the tile.
template <int kD>
__device__ inline void FinishTile(const ApplyParameters& p, bf16 (&tile)[kTile][kD], int row,
                                  const float (&sums)[kD / 8][4]) {
  const int lane = threadIdx.x % 32;
  auto* base = reinterpret_cast<std::byte*>(&tile);
#pragma unroll
  for (int j = 0; j < kD / 8; ++j) {
    const int channel = j * 8 + 2 * (lane % 4);
    const float2 bias = p.bias != nullptr ? *reinterpret_cast<const float2*>(p.bias + channel)
                                          : make_float2(0.0f, 0.0f);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      auto* at = reinterpret_cast<std::uint32_t*>(
          base + SwizzledOffset<kD / 8>(row + half * 8 + lane / 4, j) + lane % 4 * 4);
      float2 y = make_float2(sums[j][2 * half] + bias.x, sums[j][2 * half + 1] + bias.y);
      if (p.accumulate) {
        const float2 before = UnpackBf16(*at);
        y.x += before.x;
        y.y += before.y;
      }
      *at = PackBf16(y.x, y.y);
    }
  }
}

// feature(q) times the state, normalised, times the weight: what FinishTile adds to.
template <int kD>
__device__ inline void MultiplyTile(const ApplyParameters& p, const ApplyTiles<kD>& tiles,
                                    const bf16 (&q)[kTile][kD], int row, std::int64_t token,
                                    float (&sums)[kD / 8][4]) {
  {
    QueryFeatures<kD> query(p.features, q, tiles.normaliser, row, token, p.length - 1);
    Multiply<kD, false>(query.a, tiles.state, sums);
#pragma unroll
    for (int i = 0; i < kD / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] *= query.inverse[j / 2];
    }
  }
  if (p.weight == nullptr) return;
  std::uint32_t linear[kD / 16][4];
#pragma unroll
  for (int i = 0; i < kD / 8; ++i) {
    linear[i / 2][i % 2 * 2] = PackBf16(sums[i][0], sums[i][1]);
    linear[i / 2][i % 2 * 2 + 1] = PackBf16(sums[i][2], sums[i][3]);
  }
  Multiply<kD, false>(linear, tiles.weight, sums);
}

// Grid (groups of p.tiles tiles of queries, heads).
template <int kD>
__global__ void __launch_bounds__(kApplyThreads) ApplyKernel(const ApplyParameters p) {
  extern __shared__ __align__(2 * kD) std::byte dynamic_shared[];
  auto& tiles = *reinterpret_cast<ApplyTiles<kD>*>(dynamic_shared);
  const int head_index = p.first_head + blockIdx.y;
  const std::int64_t row_stride = std::int64_t{p.heads} * kD;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * p.tiles * p.tile_rows;
  const std::int64_t start =
      (head_index / p.heads * p.length + first) * row_stride + head_index % p.heads * kD;
  const std::int64_t rest = p.length - first;  // queries
  const int count =
      static_cast<int>(min(std::int64_t{p.tiles}, (rest + p.tile_rows - 1) / p.tile_rows));
  const std::int64_t own = p.states_per_head == 1 ? 0 : first / p.block_q;
  const bf16* state =
      p.states + (std::int64_t{blockIdx.y} * p.states_per_head + own) * ((kD + 1) * kD);
  const auto rows_of = [&](int i) {
    return static_cast<int>(min(std::int64_t{p.tile_rows}, rest - i * p.tile_rows));
  };
  const auto tile_of = [&](int i) -> QueryTile<kD>& {
    return i % 2 == 0 ? tiles.first : tiles.second;
  };
  const auto load = [&](int i) {
    QueryTile<kD>& to = tile_of(i);
    const std::int64_t at = start + i * p.tile_rows * row_stride;
    CopyTile<kD, kApplyThreads>(to.q, p.q + at, row_stride, rows_of(i));
    if (p.accumulate) CopyTile<kD, kApplyThreads>(to.out, p.out + at, row_stride, rows_of(i));
  };
  load(0);
  CopyTile<kD, kApplyThreads>(tiles.state, state, kD, kD);
  if (p.weight != nullptr) CopyTile<kD, kApplyThreads>(tiles.weight, p.weight, kD, kD);
  CopyAsyncCommit();
  for (int c = threadIdx.x; c < kD; c += kApplyThreads) {
    tiles.normaliser[c] = ToFloat(state[kD * kD + c]);
  }
  const int row = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    if (i + 1 < count) load(i + 1);
    CopyAsyncCommit();
    CopyAsyncWait<1>();
    __syncthreads();
    QueryTile<kD>& tile = tile_of(i);
    if (row < rows_of(i)) {
      float sums[kD / 8][4];
      MultiplyTile<kD>(p, tiles, tile.q, row, first + i * p.tile_rows + row, sums);
      FinishTile<kD>(p, tile.out, row, sums);
      __syncwarp();
      StoreTileRows<kD>(tile.out, row, rows_of(i), p.out + start + i * p.tile_rows * row_stride,
                        row_stride);
    }
    __syncthreads();  // the tile is free
  }
}

template <int kD>
void Apply(const Context& context, const LinearBranchArgs& args, const LinearStates& states) {
  const std::int64_t length = args.q.dim(1), heads = args.q.dim(2);
  const bool whole = args.scope == LinearScope::kAll;
  const bool rotated = args.feature == Feature::kRotatedRelu;
  // One wave of blocks for one sample's heads where they may take any number of tiles.
  const std::int64_t blocks = std::max<std::int64_t>(kBlocksPerSm * context.sm_count / heads, 1);
  const int tile_rows = whole ? kTile : TileRows(args.map->block_q);
  const std::int64_t tiles = (length + kTile - 1) / kTile;
  const ApplyParameters apply{{args.feature, rotated ? args.cos.data<float>() : nullptr,
                               rotated ? args.sin.data<float>() : nullptr},
                              args.q.data<bf16>(),
                              args.out.data<bf16>(),
                              length,
                              static_cast<int>(heads),
                              states.first_head,
                              states.sums.data<bf16>(),
                              states.states_per_head,
                              whole ? 1 : args.map->block_q,
                              tile_rows,
                              whole ? static_cast<int>((tiles + blocks - 1) / blocks) : 1,
                              states.weight.defined() ? states.weight.data<bf16>() : nullptr,
                              args.proj_weight.defined() ? args.proj_bias.data<float>() : nullptr,
                              args.accumulate};
  constexpr std::size_t kBytes = sizeof(ApplyTiles<kD>);
  Check(cudaFuncSetAttribute(ApplyKernel<kD>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kBytes)),
        "LinearBranch: shared memory");
  const std::int64_t rows = std::int64_t{apply.tiles} * tile_rows;
  const dim3 grid(static_cast<unsigned>((length + rows - 1) / rows),
                  static_cast<unsigned>(states.heads));
  ApplyKernel<kD><<<grid, kApplyThreads, kBytes, context.stream>>>(apply);
  CheckLaunch("LinearBranch: apply");
}

}  // namespace

bool TensorCoreLinearBranchFits(const LinearBranchArgs& args) {
  const auto aligned = [](const Tensor& x) {
    return reinterpret_cast<std::uintptr_t>(x.raw()) % 16 == 0;
  };
  const bool blocks_fit = args.scope == LinearScope::kAll || (args.map->block_q % kWarpRows == 0 &&
                                                              args.map->block_k % kWarpRows == 0);
  return args.q.dtype() == DType::kBF16 && (args.q.dim(3) == 64 || args.q.dim(3) == 128) &&
         blocks_fit && aligned(args.q) && aligned(args.k) && aligned(args.v) && aligned(args.out) &&
         aligned(args.proj_weight) && aligned(args.proj_bias) && aligned(args.cos) &&
         aligned(args.sin);
}

void TensorCoreLinearBranch(const Context& context, const LinearBranchArgs& args,
                            StateKernelKind kernel) {
  if (args.q.NumElements() == 0) return;
  VisitLinearStates(context, args, kernel, [&](const LinearStates& states) {
    args.q.dim(3) == 64 ? Apply<64>(context, args, states) : Apply<128>(context, args, states);
  });
}

}  // namespace slalom::cuda
