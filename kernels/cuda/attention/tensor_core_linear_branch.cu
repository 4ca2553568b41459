// The linear branch with mma.sync, for bf16 and heads of 64 or 128 channels. Three steps, each for
// all heads at once: sums of feature(K)^T V per chunk of keys; their sums over the scope, by a
// plain addition or, where it differs between query blocks, as a product with the scope's mask; and
// feature(Q) times those, normalised, projected and added to the output in one pass.
#include <algorithm>

#include "kernels/cuda/attention/linear_branch.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

constexpr int kTile = 64;   // tokens in shared memory at once
constexpr int kStages = 3;  // of tiles of keys: being multiplied, mapped, arriving
constexpr int kStateThreads = 256;
constexpr int kApplyThreads = 128;  // a warp owns 16 queries
constexpr float kEpsilon = 1e-5f;
constexpr std::int64_t kScratchBytes = std::int64_t{512} << 20;  // for the heads taken at once

std::int64_t Blocks(std::int64_t length, std::int64_t block) {
  return (length + block - 1) / block;
}

__device__ inline std::uint32_t SharedAddress(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

struct FeatureParameters {
  Feature feature;
  const float* cos;  // [L, D / 2] or null
  const float* sin;
};

// Features of kCount channels of one token; the token's others are with the kLanes lanes around.
template <int kLanes, int kCount>
__device__ inline void MapFeatures(Feature feature, float (&x)[kCount]) {
  if (feature == Feature::kSoftmax) {
    float max = x[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) max = fmaxf(max, x[i]);
    max = GroupMax<kLanes>(max);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += x[i] = __expf(x[i] - max);
    const float inverse = 1.0f / GroupSum<kLanes>(sum);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] *= inverse;
  } else if (feature == Feature::kElu) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = x[i] > 0.0f ? x[i] + 1.0f : __expf(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = fmaxf(x[i], 0.0f);
  }
}

__device__ inline void RotatePair(float c, float s, float& even, float& odd) {
  const float turned = even * c - odd * s;
  odd = even * s + odd * c;
  even = turned;
}

// Brings `rows` rows of kD channels into a swizzled tile of kTile rows; the others become zeros.
template <int kD, int kThreads, int kRows>
__device__ inline void CopyTile(bf16 (&to)[kRows][kD], const bf16* from, std::int64_t row_stride,
                                int rows) {
  constexpr int kChunks = kD / 8;
  const std::uint32_t base = SharedAddress(&to);
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const bool there = row < rows;
    CopyAsync16(base + SwizzledOffset<kChunks>(row, chunk),
                from + (there ? row * row_stride + chunk * 8 : 0), there);
  }
}

struct StateParameters {
  FeatureParameters features;
  const bf16* k;
  const bf16* v;
  std::int64_t length;
  int heads;
  int first_head;  // of all samples' heads
  int chunk;       // keys per state
};

template <int kD>
struct alignas(128) StateTiles {
  bf16 k[kStages][kTile][kD];
  bf16 v[kStages][kTile][kD];
};

// The keys of a tile become their features. Every kD / 8 lanes have a row, 8 channels each.
template <int kD>
__device__ inline void MapKeys(const FeatureParameters& p, bf16 (&tile)[kTile][kD],
                               std::int64_t first, int rows, float (&total)[8]) {
  constexpr int kLanes = kD / 8;
  const int chunk = threadIdx.x % kLanes;
  auto* base = reinterpret_cast<std::byte*>(&tile);
#pragma unroll 2
  for (int row = threadIdx.x / kLanes; row < kTile; row += kStateThreads / kLanes) {
    auto* at = reinterpret_cast<bf16*>(base + SwizzledOffset<kLanes>(row, chunk));
    float x[8];
    LoadFloats<8>(at, x);
    MapFeatures<kLanes>(p.feature, x);
    const bool there = row < rows;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!there) x[i] = 0.0f;
      total[i] += x[i];
    }
    if (p.feature == Feature::kRotatedRelu && there) {
      float c[4], s[4];
      const std::int64_t angle = (first + row) * (kD / 2) + chunk * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] = p.cos[angle + i], s[i] = p.sin[angle + i];
#pragma unroll
      for (int i = 0; i < 4; ++i) RotatePair(c[i], s[i], x[2 * i], x[2 * i + 1]);
    }
    StoreFloats<8>(at, x);
  }
}

// sums += features^T values: warps in a grid of 4 (feature channels) x 2 (value channels).
template <int kD>
struct StateSums {
  static constexpr int kFragments = kD / 64;
  static constexpr int kPairs = kD / 32;
  float sums[kFragments][2 * kPairs][4] = {};

  __device__ static int Row() { return static_cast<int>(threadIdx.x) / 32 % 4 * (kD / 4); }
  __device__ static int Column() { return static_cast<int>(threadIdx.x) / 128 * (kD / 2); }

  __device__ void Add(const bf16 (&features)[kTile][kD], const bf16 (&values)[kTile][kD]) {
    constexpr int kChunks = kD / 8;
    const std::uint32_t feature_base = SharedAddress(&features);
    const std::uint32_t value_base = SharedAddress(&values);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
      std::uint32_t a[kFragments][4];
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        LoadMatricesTransposed(
            a[i], feature_base + SwizzledOffset<kChunks>(step * 16 + lane / 16 * 8 + lane % 8,
                                                         Row() / 8 + i * 2 + lane / 8 % 2));
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        std::uint32_t b[4];
        LoadMatricesTransposed(
            b, value_base + SwizzledOffset<kChunks>(step * 16 + lane % 16,
                                                    Column() / 8 + pair * 2 + lane / 16));
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
          Mma16x8x16(sums[i][2 * pair], a[i], b[0], b[1]);
          Mma16x8x16(sums[i][2 * pair + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  __device__ static void StorePair(float* to, float a, float b) {
    *reinterpret_cast<float2*>(to) = make_float2(a, b);
  }
  __device__ static void StorePair(bf16* to, float a, float b) {
    *reinterpret_cast<std::uint32_t*>(to) = PackBf16(a, b);
  }
  template <typename Out>
  __device__ void Store(Out* state) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Row() + i * 16 + half * 8 + lane / 4;
#pragma unroll
        for (int j = 0; j < 2 * kPairs; ++j) {
          StorePair(state + row * kD + Column() + j * 8 + 2 * (lane % 4), sums[i][j][2 * half],
                    sums[i][j][2 * half + 1]);
        }
      }
    }
  }
};

// states [heads, chunks, kD + 1, kD]: rows 0 .. kD - 1 are the chunk's sum of feature(k)^T v, row
// kD is the sum of the normalisers. Grid (chunks, heads).
template <int kD, typename Out>
__global__ void __launch_bounds__(kStateThreads, 2)
    StateKernel(const StateParameters p, Out* states) {
  extern __shared__ std::byte dynamic_shared[];
  auto& tiles = *reinterpret_cast<StateTiles<kD>*>(dynamic_shared);
  const int head_index = p.first_head + blockIdx.y;
  const std::int64_t row_stride = std::int64_t{p.heads} * kD;
  const std::int64_t start =
      head_index / p.heads * p.length * row_stride + head_index % p.heads * kD;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * p.chunk;
  const int keys = static_cast<int>(min(std::int64_t{p.chunk}, p.length - first));
  const int count = (keys + kTile - 1) / kTile;
  const auto load = [&](int i) {
    if (i < count) {
      const std::int64_t from = start + (first + i * kTile) * row_stride;
      const int rows = keys - i * kTile, stage = i % kStages;
      CopyTile<kD, kStateThreads>(tiles.k[stage], p.k + from, row_stride, rows);
      CopyTile<kD, kStateThreads>(tiles.v[stage], p.v + from, row_stride, rows);
    }
    CopyAsyncCommit();
  };
  StateSums<kD> sums;
  float total[8] = {};
  const auto map = [&](int i) {
    if (i >= count) return;
    MapKeys<kD>(p.features, tiles.k[i % kStages], first + i * kTile, keys - i * kTile, total);
  };
  load(0);
  load(1);
  CopyAsyncWait<1>();
  __syncthreads();
  map(0);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    CopyAsyncWait<0>();
    __syncthreads();  // tile i is mapped, the next one is there, the one before is free
    load(i + 2);
    map(i + 1);
    sums.Add(tiles.k[i % kStages], tiles.v[i % kStages]);
  }
  __syncthreads();  // the tiles' memory is free
  Out* state =
      states + (static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * ((kD + 1) * kD);
  sums.Store(state);
  constexpr int kLanes = kD / 8;
  auto* totals = reinterpret_cast<float*>(dynamic_shared);  // [kStateThreads / kLanes][kD]
  StoreFloats<8>(totals + threadIdx.x / kLanes * kD + threadIdx.x % kLanes * 8, total);
  __syncthreads();
  if (threadIdx.x < kD) {
    float sum = 0.0f;
    for (int i = 0; i < kStateThreads / kLanes; ++i) sum += totals[i * kD + threadIdx.x];
    state[kD * kD + threadIdx.x] = FromFloat<Out>(sum);
  }
}

template <int kD>
__global__ void __launch_bounds__(kStateThreads) TransposeKernel(const float* from, float* to) {
  const int i = blockIdx.x * kStateThreads + threadIdx.x;
  to[i] = from[i % kD * kD + i / kD];
}

// sums [heads, kD + 1, kD] = the sum of states [heads, chunks, kD + 1, kD], the first kD rows times
// `weight`, which is transposed, where there is one. Grid (groups of rows, heads); a thread per
// element.
template <int kD>
__global__ void __launch_bounds__(kStateThreads)
    SumStatesKernel(const float* states, int chunks, const float* weight, bf16* sums) {
  constexpr int kRows = kStateThreads / kD;
  constexpr int kElements = (kD + 1) * kD;
  __shared__ __align__(16) float rows[kRows][kD];
  const int own = threadIdx.x / kD, column = threadIdx.x % kD;
  const int row = blockIdx.x * kRows + own;
  states += static_cast<std::int64_t>(blockIdx.y) * chunks * kElements + row * kD + column;
  float sum = 0.0f;
  if (row <= kD) {
#pragma unroll 8
    for (int c = 0; c < chunks; ++c) sum += states[static_cast<std::int64_t>(c) * kElements];
  }
  if (weight != nullptr) {
    rows[own][column] = sum;
    __syncthreads();
    if (row < kD) {
      sum = 0.0f;
#pragma unroll 16
      for (int c = 0; c < kD; ++c) sum += weight[c * kD + column] * rows[own][c];
    }
  }
  if (row <= kD) {
    sums[static_cast<std::int64_t>(blockIdx.y) * kElements + row * kD + column] =
        FromFloat<bf16>(sum);
  }
}

// mask [rows, stride]: 1 where a key block is in scope; columns from key_blocks on are 0.
__global__ void __launch_bounds__(kStateThreads)
    MaskKernel(const std::uint8_t* classes, std::int64_t rows, int key_blocks, int stride,
               bool only_marginal, bf16* mask) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kStateThreads + threadIdx.x;
  if (i >= rows * stride) return;
  const int column = static_cast<int>(i % stride);
  bool inside = false;
  if (column < key_blocks) {
    const auto block = static_cast<BlockClass>(classes[i / stride * key_blocks + column]);
    inside = only_marginal ? block == BlockClass::kMarginal : block != BlockClass::kCritical;
  }
  mask[i] = FromFloat<bf16>(inside ? 1.0f : 0.0f);
}

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
  int tiles;           // of queries for one block of threads; 1 with a weight
  const bf16* weight;  // [kD, kD] or null
  const float* bias;   // [kD] or null
  bool accumulate;
};

template <int kD>
struct alignas(128) QueryTile {
  bf16 q[kTile][kD];
  bf16 out[kTile][kD];
};

// With a weight there is one tile of queries, else the next one arrives while one is worked on.
template <int kD>
struct alignas(128) ApplyTiles {
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
    const std::uint32_t base = SharedAddress(&tile);
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      LoadMatrices(a[step], base + SwizzledOffset<kD / 8>(row + lane % 16, step * 2 + lane / 16));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t own = token + lane / 4 + half * 8;
      Map(p, normaliser, half, own < last_token ? own : last_token);
    }
  }

 private:
  // Channels of a register: step * 16 + 2 * (lane % 4), the next, and 8 further for the second.
  __device__ void Map(const FeatureParameters& p, const float* normaliser, int half,
                      std::int64_t token) {
    const int quad = threadIdx.x % 4;
    float x[kD / 4];
#pragma unroll
    for (int i = 0; i < kD / 8; ++i) {
      const float2 pair = UnpackBf16(a[i / 2][i % 2 * 2 + half]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
    MapFeatures<4>(p.feature, x);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kD / 8; ++i) {
      const float2 z = *reinterpret_cast<const float2*>(normaliser + i * 8 + quad * 2);
      sum += x[2 * i] * z.x + x[2 * i + 1] * z.y;
    }
    inverse[half] = 1.0f / (GroupSum<4>(sum) + kEpsilon);
    if (p.feature == Feature::kRotatedRelu) {
      const std::int64_t angle = token * (kD / 2) + quad;
#pragma unroll
      for (int i = 0; i < kD / 8; ++i) {
        RotatePair(p.cos[angle + i * 4], p.sin[angle + i * 4], x[2 * i], x[2 * i + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < kD / 8; ++i) {
      a[i / 2][i % 2 * 2 + half] = PackBf16(x[2 * i], x[2 * i + 1]);
    }
  }
};

// sums = a m for m [kD (k), kD (n)], or a m^T with kTransposed.
template <int kD, bool kTransposed>
__device__ inline void Multiply(const std::uint32_t (&a)[kD / 16][4], const bf16 (&m)[kD][kD],
                                float (&sums)[kD / 8][4]) {
  const std::uint32_t base = SharedAddress(&m);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kD / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i][j] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
#pragma unroll
    for (int pair = 0; pair < kD / 16; ++pair) {
      std::uint32_t b[4];
      if constexpr (kTransposed) {
        LoadMatrices(b, base + SwizzledOffset<kD / 8>(pair * 16 + lane / 16 * 8 + lane % 8,
                                                      step * 2 + lane / 8 % 2));
      } else {
        LoadMatricesTransposed(
            b, base + SwizzledOffset<kD / 8>(step * 16 + lane % 16, pair * 2 + lane / 16));
      }
      Mma16x8x16(sums[2 * pair], a[step], b[0], b[1]);
      Mma16x8x16(sums[2 * pair + 1], a[step], b[2], b[3]);
    }
  }
}

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
  Multiply<kD, true>(linear, tiles.weight, sums);
}

// A warp's 16 rows from shared memory, those below `rows`.
template <int kD>
__device__ inline void StoreRows(const bf16 (&tile)[kTile][kD], int row, int rows, bf16* out,
                                 std::int64_t row_stride) {
  constexpr int kChunks = kD / 8;
  const auto* base = reinterpret_cast<const std::byte*>(&tile);
#pragma unroll
  for (int i = threadIdx.x % 32; i < 16 * kChunks; i += 32) {
    const int r = row + i / kChunks;
    if (r >= rows) break;
    *reinterpret_cast<uint4*>(out + r * row_stride + i % kChunks * 8) =
        *reinterpret_cast<const uint4*>(base + SwizzledOffset<kChunks>(r, i % kChunks));
  }
}

// Grid (groups of p.tiles tiles of queries, heads).
template <int kD>
__global__ void __launch_bounds__(kApplyThreads) ApplyKernel(const ApplyParameters p) {
  extern __shared__ std::byte dynamic_shared[];
  auto& tiles = *reinterpret_cast<ApplyTiles<kD>*>(dynamic_shared);
  const int head_index = p.first_head + blockIdx.y;
  const std::int64_t row_stride = std::int64_t{p.heads} * kD;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * p.tiles * kTile;
  const std::int64_t start =
      (head_index / p.heads * p.length + first) * row_stride + head_index % p.heads * kD;
  const std::int64_t rest = p.length - first;  // queries
  const int count = static_cast<int>(min(std::int64_t{p.tiles}, (rest + kTile - 1) / kTile));
  const std::int64_t own = p.states_per_head == 1 ? 0 : first / p.block_q;
  const bf16* state =
      p.states + (std::int64_t{blockIdx.y} * p.states_per_head + own) * ((kD + 1) * kD);
  const auto rows_of = [&](int i) {
    return static_cast<int>(min(std::int64_t{kTile}, rest - i * kTile));
  };
  const auto tile_of = [&](int i) -> QueryTile<kD>& {
    return i % 2 == 0 ? tiles.first : tiles.second;
  };
  const auto load = [&](int i) {
    QueryTile<kD>& to = tile_of(i);
    const std::int64_t at = start + i * kTile * row_stride;
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
  const int row = static_cast<int>(threadIdx.x) / 32 * 16;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    if (i + 1 < count) load(i + 1);
    CopyAsyncCommit();
    CopyAsyncWait<1>();
    __syncthreads();
    QueryTile<kD>& tile = tile_of(i);
    float sums[kD / 8][4];
    MultiplyTile<kD>(p, tiles, tile.q, row, first + i * kTile + row, sums);
    FinishTile<kD>(p, tile.out, row, sums);
    __syncwarp();
    StoreRows<kD>(tile.out, row, rows_of(i), p.out + start + i * kTile * row_stride, row_stride);
    __syncthreads();  // the tile is free
  }
}

template <int kD, typename Out>
void RunStates(const Context& context, const StateParameters& p, std::int64_t chunks,
               std::int64_t heads, const Tensor& states) {
  constexpr std::size_t kBytes = sizeof(StateTiles<kD>);
  Check(cudaFuncSetAttribute(StateKernel<kD, Out>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kBytes)),
        "LinearBranch: shared memory");
  const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(heads));
  StateKernel<kD, Out><<<grid, kStateThreads, kBytes, context.stream>>>(p, states.data<Out>());
  CheckLaunch("LinearBranch: states");
}

// sums [heads, query blocks, elements] = mask [heads, query blocks, key blocks] times states.
void SumScope(const Context& context, const LinearBranchArgs& args, std::int64_t first_head,
              const Tensor& states, const Tensor& sums) {
  const std::int64_t nq = args.map->classes.dim(2), nk = args.map->classes.dim(3);
  const std::int64_t heads = states.dim(0), elements = states.dim(2);
  const std::int64_t stride = Blocks(nk, 8) * 8;  // rows stay aligned
  const Tensor mask = context.Allocate({heads, nq, stride}, DType::kBF16);
  MaskKernel<<<static_cast<unsigned>(Blocks(mask.NumElements(), kStateThreads)), kStateThreads, 0,
               context.stream>>>(args.map->classes.data<std::uint8_t>() + first_head * nq * nk,
                                 heads * nq, static_cast<int>(nk), static_cast<int>(stride),
                                 args.scope == LinearScope::kMarginal, mask.data<bf16>());
  CheckLaunch("LinearBranch: scope");
  GemmArgs product;
  product.m = nq;
  product.n = elements;
  product.k = nk;
  product.a = mask.raw();
  product.lda = stride;
  product.a_stride = nq * stride;
  product.b = states.raw();
  product.ldb = elements;
  product.b_stride = nk * elements;
  product.b_is_kn = true;
  product.out = sums.raw();
  product.ldo = elements;
  product.out_stride = nq * elements;
  product.batch = heads;
  context.gemm->Run(product);
}

template <int kD>
void RunHeads(const Context& context, const LinearBranchArgs& args, const Tensor& weight,
              std::int64_t first_head, std::int64_t count) {
  const std::int64_t length = args.q.dim(1), heads = args.q.dim(2);
  const std::int64_t elements = std::int64_t{kD + 1} * kD;
  const bool whole = args.scope == LinearScope::kAll;
  // One wave of blocks for one sample's heads. It must not depend on how many samples there are.
  const std::int64_t blocks_per_head = std::max<std::int64_t>(2 * context.sm_count / heads, 1);
  const auto tiles_per_block = static_cast<int>(Blocks(Blocks(length, kTile), blocks_per_head));
  const int chunk = whole ? tiles_per_block * kTile : args.map->block_k;
  const std::int64_t chunks = Blocks(length, chunk);
  const bool rotated = args.feature == Feature::kRotatedRelu;
  const FeatureParameters features{args.feature, rotated ? args.cos.data<float>() : nullptr,
                                   rotated ? args.sin.data<float>() : nullptr};
  const StateParameters keys{features, args.k.data<bf16>(),     args.v.data<bf16>(),
                             length,   static_cast<int>(heads), static_cast<int>(first_head),
                             chunk};
  const std::int64_t states_per_head = whole ? 1 : args.map->classes.dim(2);
  const Tensor sums = context.Allocate({count, states_per_head, elements}, DType::kBF16);
  const Tensor states =
      context.Allocate({count, chunks, elements}, whole ? DType::kF32 : DType::kBF16);
  if (whole) {
    RunStates<kD, float>(context, keys, chunks, count, states);
    const dim3 grid(static_cast<unsigned>(Blocks(kD + 1, kStateThreads / kD)),
                    static_cast<unsigned>(count));
    SumStatesKernel<kD><<<grid, kStateThreads, 0, context.stream>>>(
        states.data<float>(), static_cast<int>(chunks),
        weight.defined() ? weight.data<float>() : nullptr, sums.data<bf16>());
    CheckLaunch("LinearBranch: sum");
  } else {
    RunStates<kD, bf16>(context, keys, chunks, count, states);
    SumScope(context, args, first_head, states, sums);
  }
  const ApplyParameters apply{features,
                              args.q.data<bf16>(),
                              args.out.data<bf16>(),
                              length,
                              static_cast<int>(heads),
                              static_cast<int>(first_head),
                              sums.data<bf16>(),
                              static_cast<int>(states_per_head),
                              whole ? 1 : args.map->block_q,
                              whole ? tiles_per_block : 1,
                              weight.defined() && !whole ? weight.data<bf16>() : nullptr,
                              args.proj_weight.defined() ? args.proj_bias.data<float>() : nullptr,
                              args.accumulate};
  constexpr std::size_t kBytes = sizeof(ApplyTiles<kD>);
  Check(cudaFuncSetAttribute(ApplyKernel<kD>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kBytes)),
        "LinearBranch: shared memory");
  const dim3 grid(static_cast<unsigned>(Blocks(length, std::int64_t{apply.tiles} * kTile)),
                  static_cast<unsigned>(count));
  ApplyKernel<kD><<<grid, kApplyThreads, kBytes, context.stream>>>(apply);
  CheckLaunch("LinearBranch: apply");
}

template <int kD>
void Run(const Context& context, const LinearBranchArgs& args) {
  const std::int64_t heads = args.q.dim(0) * args.q.dim(2);
  Tensor weight;  // bf16; or f32 and transposed, where it is folded into the sums
  if (args.proj_weight.defined() && args.scope == LinearScope::kAll) {
    weight = context.Allocate({kD, kD}, DType::kF32);
    TransposeKernel<kD><<<kD * kD / kStateThreads, kStateThreads, 0, context.stream>>>(
        args.proj_weight.data<float>(), weight.data<float>());
    CheckLaunch("LinearBranch: weight");
  } else if (args.proj_weight.defined()) {
    weight = context.Allocate({kD, kD}, DType::kBF16);
    Convert(context, args.proj_weight, weight);
  }
  std::int64_t at_once = heads;
  if (args.scope != LinearScope::kAll) {
    const std::int64_t states = args.map->classes.dim(2) + args.map->classes.dim(3);
    const std::int64_t bytes = states * (kD + 1) * kD * 2;
    at_once = std::clamp<std::int64_t>(kScratchBytes / bytes, 1, heads);
  }
  for (std::int64_t first = 0; first < heads; first += at_once) {
    RunHeads<kD>(context, args, weight, first, std::min(at_once, heads - first));
  }
}

}  // namespace

bool TensorCoreLinearBranchFits(const LinearBranchArgs& args) {
  const auto aligned = [](const Tensor& x) {
    return reinterpret_cast<std::uintptr_t>(x.raw()) % 16 == 0;
  };
  const bool blocks_fit = args.scope == LinearScope::kAll ||
                          (args.map->block_q % kTile == 0 && args.map->block_k % kTile == 0);
  return args.q.dtype() == DType::kBF16 && (args.q.dim(3) == 64 || args.q.dim(3) == 128) &&
         blocks_fit && aligned(args.q) && aligned(args.k) && aligned(args.v) && aligned(args.out) &&
         aligned(args.proj_weight) && aligned(args.proj_bias);
}

void TensorCoreLinearBranch(const Context& context, const LinearBranchArgs& args) {
  if (args.q.NumElements() == 0) return;
  args.q.dim(3) == 64 ? Run<64>(context, args) : Run<128>(context, args);
}

}  // namespace slalom::cuda
