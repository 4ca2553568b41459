// Sums of feature(k)^T v with mma.sync, for sm_80 and newer and for every feature.
#include "kernels/cuda/attention/linear_states.cuh"
#include "kernels/cuda/attention/linear_tiles.cuh"
#include "kernels/cuda/check.h"
#include "kernels/cuda/fragments.cuh"

namespace slalom::cuda {
namespace {

using namespace linear_tiles;

constexpr int kStages = 3;  // of tiles of keys: being multiplied, mapped, arriving
constexpr int kStateThreads = 256;
constexpr int kBlocksPerSm = 2;

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
struct alignas(2 * kD) StateTiles {
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
      LoadConstants<4>(p.cos + angle, c);
      LoadConstants<4>(p.sin + angle, s);
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
    const FragmentReader<Operand::kLeftTransposed, kD> left(features, 0, Row());
    const FragmentReader<Operand::kRight, kD> right(values, 0, Column());
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
      std::uint32_t a[kFragments][4];
#pragma unroll
      for (int i = 0; i < kFragments; ++i) left.Load(a[i], step * 16, i * 16);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        std::uint32_t b[4];
        right.Load(b, step * 16, pair * 16);
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
          Mma16x16x16(sums[i][2 * pair], sums[i][2 * pair + 1], a[i], b);
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
__global__ void __launch_bounds__(kStateThreads, kBlocksPerSm)
    StateKernel(const StateParameters p, Out* states) {
  extern __shared__ __align__(2 * kD) std::byte dynamic_shared[];
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

template <int kD, typename Out>
void Launch(const Context& context, const StateProblem& problem) {
  constexpr std::size_t kBytes = sizeof(StateTiles<kD>);
  Check(cudaFuncSetAttribute(StateKernel<kD, Out>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kBytes)),
        "LinearBranch: shared memory");
  const StateParameters parameters{
      problem.features,   problem.k,    problem.v, problem.length, static_cast<int>(problem.heads),
      problem.first_head, problem.chunk};
  const dim3 grid(static_cast<unsigned>(problem.states.dim(1)),
                  static_cast<unsigned>(problem.states.dim(0)));
  StateKernel<kD, Out>
      <<<grid, kStateThreads, kBytes, context.stream>>>(parameters, problem.states.data<Out>());
  CheckLaunch("LinearBranch: states");
}

}  // namespace

std::int64_t TensorCoreStateBlocks(const Context& context) {
  return std::int64_t{context.sm_count} * kBlocksPerSm;
}

void TensorCoreStates(const Context& context, const StateProblem& problem) {
  const bool exact = problem.states.dtype() == DType::kF32;
  if (problem.head_size == 128) {
    exact ? Launch<128, float>(context, problem) : Launch<128, bf16>(context, problem);
  } else {
    exact ? Launch<64, float>(context, problem) : Launch<64, bf16>(context, problem);
  }
}

}  // namespace slalom::cuda
