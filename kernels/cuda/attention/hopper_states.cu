// Sums of feature(k)^T v on Hopper: TMA brings tiles of keys and values, two warpgroups turn keys
// into features where they lie, and wgmma multiplies them from there while the next tile is mapped.
#include <cuda.h>

#include <algorithm>

#include "kernels/cuda/attention/linear_states.cuh"
#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/check.h"
#include "kernels/cuda/hopper/mbarrier.cuh"
#include "kernels/cuda/hopper/ring.h"
#include "kernels/cuda/hopper/tensor_map.h"
#include "kernels/cuda/hopper/tma.cuh"
#include "kernels/cuda/hopper/wgmma.cuh"

namespace slalom::cuda {
namespace {

using namespace hopper;

constexpr int kTile = 64;    // keys
constexpr int kPanel = 64;   // channels in a swizzled panel: 128 bytes
constexpr int kStages = 4;   // being multiplied, mapped, arriving
constexpr int kChunk = 8;    // channels in 16 bytes
constexpr int kMapped = 32;  // channels of a key that one thread maps
constexpr int kTotals = 16;  // parts of a sum over keys, see Totals
constexpr int kConsumerBarrier = 1;

template <int kD>
struct Tiling {
  static constexpr int kPanels = kD / kPanel;  // as many warpgroups: each has a panel of features
  static constexpr int kConsumers = kPanels * 128;
  static constexpr int kThreads = kConsumers + 32;
  static constexpr int kBlocksPerSm = 128 / kD;
  static constexpr int kLanes = kD / kMapped;  // that share a key; all of a tile are mapped at once
  static constexpr int kSlots = 8 / kLanes;    // accesses that cover a panel's row
};

template <int kD>
struct alignas(1024) SharedStorage {
  bf16 k[kStages][kD / kPanel][kTile][kPanel];
  bf16 v[kStages][kD / kPanel][kTile][kPanel];
  bf16 ones[8][kPanel];
  float totals[kTotals][kD];  // of features before they are rotated
  std::uint64_t full[kStages], empty[kStages];
};

struct Parameters {
  FeatureParameters features;
  int length;
  int heads;
  int first_head;
  int tiles_per_state;
  int tiles_per_block;  // of threads; whole states
  int states_per_head;
};

// Where a thread's kMapped channels of one key lie. Its accesses to a panel's row are rotated by
// the row, so that those of neighbouring rows meet different banks.
template <int kD>
struct Place {
  using T = Tiling<kD>;
  int row = static_cast<int>(threadIdx.x) / T::kLanes;
  int lane = static_cast<int>(threadIdx.x) % T::kLanes;

  __device__ int Panel(int j) const { return j / T::kSlots; }
  // Of 16 bytes in a panel's row, as the tensor has them.
  __device__ int Piece(int j) const { return (j + row) % T::kSlots * T::kLanes + lane; }
  __device__ int Channel(int j) const { return Panel(j) * kPanel + Piece(j) * kChunk; }
  // In shared memory, where TMA has swizzled it.
  __device__ int Column(int j) const { return (Piece(j) ^ row % 8) * kChunk; }
};

// What rotates a thread's channels: of the next tile's key, under way while this one is mapped.
template <int kD>
struct Angles {
  float cos[kMapped / kChunk][kChunk / 2];
  float sin[kMapped / kChunk][kChunk / 2];

  __device__ void Load(const FeatureParameters& p, int token, int length) {
    const Place<kD> place;
    const int own = min(token + place.row, length - 1);
#pragma unroll
    for (int j = 0; j < kMapped / kChunk; ++j) {
      const std::int64_t at = std::int64_t{own} * (kD / 2) + place.Channel(j) / 2;
      LoadConstants<kChunk / 2>(p.cos + at, cos[j]);
      LoadConstants<kChunk / 2>(p.sin + at, sin[j]);
    }
  }
};

// Sums over keys of what a thread maps: the normaliser, where features are rotated after it.
template <int kD>
struct Totals {
  float values[kMapped] = {};

  // Adds all threads up in a fixed order and begins anew. For all consumers at once.
  template <typename Out>
  __device__ void Store(float (&parts)[kTotals][kD], Out* normaliser) {
    static_assert(Tiling<kD>::kConsumers / 32 * Tiling<kD>::kSlots == kTotals);
    const Place<kD> place;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    float(&part)[kD] =
        parts[threadIdx.x / 32 * Tiling<kD>::kSlots + place.row % Tiling<kD>::kSlots];
#pragma unroll
    for (int j = 0; j < kMapped / kChunk; ++j) {
      float sums[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {  // lanes 8 and 16 apart have the same channels
        float& own = values[j * kChunk + i];
        own += __shfl_xor_sync(kFullWarp, own, 8);
        sums[i] = own + __shfl_xor_sync(kFullWarp, own, 16);
        own = 0.0f;
      }
      if (lane < 8) StoreFloats<kChunk>(&part[place.Channel(j)], sums);
    }
    NamedBarrierSync(kConsumerBarrier, Tiling<kD>::kConsumers);
    if (threadIdx.x < kD) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kTotals; ++i) sum += parts[i][threadIdx.x];
      normaliser[threadIdx.x] = FromFloat<Out>(sum);
    }
    NamedBarrierSync(kConsumerBarrier, Tiling<kD>::kConsumers);  // the parts are free
  }
};

// Keys become features, in place. A thread has kMapped channels of one key. With kRotates they are
// added to the totals and then rotated.
template <int kD, bool kRotates>
__device__ inline void MapKeys(Feature feature, bf16 (&tile)[kD / kPanel][kTile][kPanel], int rows,
                               const Angles<kD>& angles, Totals<kD>& totals) {
  const Place<kD> place;
  float x[kMapped];
#pragma unroll
  for (int j = 0; j < kMapped / kChunk; ++j) {
    float values[kChunk];
    LoadFloats<kChunk>(&tile[place.Panel(j)][place.row][place.Column(j)], values);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[j * kChunk + i] = values[i];
  }
  MapFeatures<Tiling<kD>::kLanes>(kRotates ? Feature::kRotatedRelu : feature, x);
  const float there = place.row < rows ? 1.0f : 0.0f;
#pragma unroll
  for (int j = 0; j < kMapped / kChunk; ++j) {
    float values[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      values[i] = x[j * kChunk + i] * there;
      if constexpr (kRotates) totals.values[j * kChunk + i] += values[i];
    }
    if constexpr (kRotates) {
#pragma unroll
      for (int i = 0; i < kChunk / 2; ++i) {
        RotatePair(angles.cos[j][i], angles.sin[j][i], values[2 * i], values[2 * i + 1]);
      }
    }
    StoreFloats<kChunk>(&tile[place.Panel(j)][place.row][place.Column(j)], values);
  }
}

// One warpgroup's kPanel rows of a state: features of its panel times all values, and times one.
template <int kD>
struct Sums {
  float values[kD / 2];
  float normaliser[4];

  // Adds a tile, or starts with it; committed, not waited for.
  __device__ void Start(const bf16 (&features)[kTile][kPanel],
                        const bf16 (&v)[kD / kPanel][kTile][kPanel], const bf16 (&ones)[8][kPanel],
                        bool add) {
    constexpr std::uint32_t kPanelBytes = kTile * kPanel * 2;
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
      const std::uint64_t a = SwizzledTile(SharedAddress(features[step * 16]), kPanelBytes);
      const std::uint64_t b = SwizzledTile(SharedAddress(v[0][step * 16]), kPanelBytes);
      if constexpr (kD == 128) {
        Wgmma64x128<true, true>(values, a, b, add || step > 0);
      } else {
        Wgmma64x64<true, true>(values, a, b, add || step > 0);
      }
      Wgmma64x8<false, true>(normaliser, a, SwizzledTile(SharedAddress(ones), 0), add || step > 0);
    }
    WgmmaCommit();
  }

  __device__ void Store(float* state, int channel) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* row = state + (channel + 8 * r) * kD + threadIdx.x % 4 * 2;
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) {
        *reinterpret_cast<float2*>(row + 8 * j) =
            make_float2(values[4 * j + 2 * r], values[4 * j + 2 * r + 1]);
      }
    }
  }
  __device__ void Store(bf16* state, int channel) const {
    StoreRows(values, state + channel * kD, state + (channel + 8) * kD);
  }
  template <bool kNormaliser, typename Out>
  __device__ void StoreAll(Out* state) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int channel = thread / 32 * 16 + thread % 32 / 4;
    Store(state, channel);
    if (kNormaliser && thread % 4 == 0) {
      state[kD * kD + channel] = FromFloat<Out>(normaliser[0]);
      state[kD * kD + channel + 8] = FromFloat<Out>(normaliser[2]);
    }
  }
};

template <int kD>
__device__ void Produce(const CUtensorMap* k_map, const CUtensorMap* v_map,
                        SharedStorage<kD>& shared, int first, int count, int head, int sample) {
  Ring<kStages> ring;
  for (int i = 0; i < count; ++i, ring.Next()) {
    std::uint64_t* full = &shared.full[ring.stage];
    BarrierWait(&shared.empty[ring.stage], ring.parity ^ 1);
    BarrierExpect(full, 2 * kTile * kD * 2);
    for (int panel = 0; panel < kD / kPanel; ++panel) {
      const int row = (first + i) * kTile;
      CopyBox(k_map, full, shared.k[ring.stage][panel], panel * kPanel, head, row, sample);
      CopyBox(v_map, full, shared.v[ring.stage][panel], panel * kPanel, head, row, sample);
    }
  }
}

// `states` is the head's.
template <int kD, bool kRotates, typename Out>
__device__ void Consume(const Parameters& p, SharedStorage<kD>& shared, int first, int count,
                        Out* states) {
  const int panel = static_cast<int>(threadIdx.x) / 128;
  Ring<kStages> ring;
  Sums<kD> sums;
  Angles<kD> angles;
  Totals<kD> totals;
  if constexpr (kRotates) angles.Load(p.features, first * kTile, p.length);
  const auto map = [&](int tile) {
    BarrierWait(&shared.full[ring.stage], ring.parity);
    MapKeys<kD, kRotates>(p.features.feature, shared.k[ring.stage], p.length - tile * kTile, angles,
                          totals);
    if constexpr (kRotates) angles.Load(p.features, (tile + 1) * kTile, p.length);
    AsyncProxyFence();
    NamedBarrierSync(kConsumerBarrier, Tiling<kD>::kConsumers);  // the whole tile is mapped
  };
  const auto start = [&](bool add) {
    sums.Start(shared.k[ring.stage][panel], shared.v[ring.stage], shared.ones, add);
  };
  const auto release = [&](int stage) {
    if (threadIdx.x % 32 == 0) BarrierArrive(&shared.empty[stage]);
  };
#pragma unroll 1
  for (int done = 0; done < count; done += p.tiles_per_state) {
    const int tile = first + done;
    const int last = min(p.tiles_per_state, count - done) - 1;
    map(tile);
    start(false);
#pragma unroll 1
    for (int i = 1; i <= last; ++i) {
      const int multiplied = ring.stage;
      ring.Next();
      map(tile + i);
      start(true);
      WgmmaWait<1>();
      release(multiplied);
    }
    WgmmaWait<0>();
    HoldRegisters(sums.values);
    HoldRegisters(sums.normaliser);
    release(ring.stage);
    ring.Next();
    Out* state = states + std::int64_t{tile / p.tiles_per_state} * ((kD + 1) * kD);
    sums.template StoreAll<!kRotates>(state);
    if constexpr (kRotates) totals.Store(shared.totals, state + kD * kD);
  }
}

// Grid (runs of tiles, heads).
template <int kD, bool kRotates, typename Out>
__global__ void __launch_bounds__(Tiling<kD>::kThreads, Tiling<kD>::kBlocksPerSm)
    StatesKernel(const __grid_constant__ CUtensorMap k_map,
                 const __grid_constant__ CUtensorMap v_map, const Parameters p, Out* states) {
  using T = Tiling<kD>;
  extern __shared__ __align__(1024) std::byte dynamic_shared[];
  auto& shared = *reinterpret_cast<SharedStorage<kD>*>(dynamic_shared);
  const int head_index = p.first_head + blockIdx.y;
  const int first = blockIdx.x * p.tiles_per_block;
  const int count = min(p.tiles_per_block, (p.length + kTile - 1) / kTile - first);
  for (int i = threadIdx.x; i < 8 * kPanel; i += T::kThreads) {
    shared.ones[i / kPanel][i % kPanel] = FromFloat<bf16>(1.0f);
  }
  AsyncProxyFence();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      BarrierInit(&shared.full[stage], 1);
      BarrierInit(&shared.empty[stage], T::kConsumers / 32);
    }
    BarrierInitFence();
  }
  __syncthreads();
  if (threadIdx.x < T::kConsumers) {
    Consume<kD, kRotates>(p, shared, first, count,
                          states + std::int64_t{blockIdx.y} * p.states_per_head * ((kD + 1) * kD));
  } else if (threadIdx.x == T::kConsumers) {
    Produce<kD>(&k_map, &v_map, shared, first, count, head_index % p.heads, head_index / p.heads);
  }
}

template <int kD, typename Out>
void Launch(const Context& context, const StateProblem& problem) {
  constexpr std::size_t kSharedBytes = sizeof(SharedStorage<kD>);
  static_assert(Tiling<kD>::kBlocksPerSm * (kSharedBytes + 1024) <= 228 * 1024);
  const auto kernel = problem.features.feature == Feature::kRotatedRelu
                          ? StatesKernel<kD, true, Out>
                          : StatesKernel<kD, false, Out>;
  Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "LinearBranch: shared memory");
  const int tiles = static_cast<int>((problem.length + kTile - 1) / kTile);
  const auto blocks = static_cast<int>(HopperStateBlocks(context, kD) / problem.heads);
  const int per_state = problem.chunk / kTile;
  const int states = static_cast<int>(problem.states.dim(1));
  const int states_per_block = (states + std::max(blocks, 1) - 1) / std::max(blocks, 1);
  const Parameters parameters{problem.features,
                              static_cast<int>(problem.length),
                              static_cast<int>(problem.heads),
                              problem.first_head,
                              per_state,
                              states_per_block * per_state,
                              states};
  const auto rows = [&](const bf16* data) {
    return MakeRowsMap(data, problem.batch, problem.length, problem.heads, kD);
  };
  const dim3 grid(
      static_cast<unsigned>((tiles + parameters.tiles_per_block - 1) / parameters.tiles_per_block),
      static_cast<unsigned>(problem.states.dim(0)));
  kernel<<<grid, Tiling<kD>::kThreads, kSharedBytes, context.stream>>>(
      rows(problem.k), rows(problem.v), parameters, problem.states.data<Out>());
  CheckLaunch("LinearBranch: states");
}

}  // namespace

std::int64_t HopperStateBlocks(const Context& context, int head_size) {
  return std::int64_t{context.sm_count} * (128 / head_size);
}

void HopperStates(const Context& context, const StateProblem& problem) {
  const bool exact = problem.states.dtype() == DType::kF32;
  if (problem.head_size == 128) {
    exact ? Launch<128, float>(context, problem) : Launch<128, bf16>(context, problem);
  } else {
    exact ? Launch<64, float>(context, problem) : Launch<64, bf16>(context, problem);
  }
}

}  // namespace slalom::cuda
