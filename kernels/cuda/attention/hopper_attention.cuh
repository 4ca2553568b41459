// Softmax attention for Hopper: one producer warp brings tiles by TMA, warpgroups of consumers
// multiply them with wgmma. Two ways of hiding the softmax behind the products, both after
// FlashAttention-3 (arXiv 2407.08608): inside a warpgroup the scores of the next tile are computed
// while the probabilities of the last one are multiplied with V; and two warpgroups take turns at
// the tensor cores ("ping-pong"). SLA's linear branch may join at the end, where the queries are in
// registers already: their features times the sums over the keys in scope are one more product that
// is added to the output.
#pragma once

#include <cuda.h>

#include <algorithm>

#include "kernels/cuda/attention/features.cuh"
#include "kernels/cuda/attention/key_blocks.cuh"
#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/attention/problem.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/hopper/mbarrier.cuh"
#include "kernels/cuda/hopper/ring.h"
#include "kernels/cuda/hopper/tensor_map.h"
#include "kernels/cuda/hopper/tma.cuh"
#include "kernels/cuda/hopper/wgmma.cuh"
#include "kernels/cuda/mma.cuh"

namespace slalom::cuda::hopper_attention {

using namespace hopper;

inline constexpr int kWarpgroup = 128;
inline constexpr int kPanel = 64;         // bf16 columns in a swizzled panel: 128 bytes
inline constexpr int kRowsPerGroup = 64;  // query rows of a consumer warpgroup
inline constexpr int kTurnBarrier = 1;  // named barriers kTurnBarrier + warpgroup: whose turn it is

// How the linear branch joins.
enum class Mixing {
  kNone,
  kFolded,     // sums that the projection is folded into
  kProjected,  // sums, and the projection as a second product
};

// Consumers = query rows / 64. Two consumers share a block's tiles and take turns; one consumer
// leaves room for a second block on the multiprocessor, which does the same for it.
template <int kD, int kConsumers, Mixing kMix = Mixing::kNone>
struct Tiling {
  static constexpr Mixing kMixing = kMix;
  static constexpr int kHeadSize = kD;
  static constexpr int kGroups = kConsumers;
  static constexpr int kRows = kConsumers * kRowsPerGroup;
  static constexpr int kUnits = kConsumers == 1 ? 1 : 2;  // key blocks of 64 per tile
  static constexpr int kKeys = kUnits * kKeyBlock;
  static constexpr int kStages = kConsumers == 1 ? 3 : 2;  // as many as fit
  static constexpr int kPanels = kD / kPanel;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kBlocksPerSm = kConsumers == 1 ? 2 : 1;
  // Sums to what the launch bounds leave: 65536 / threads / blocks, rounded down to 8.
  static constexpr int kConsumerRegisters = kConsumers == 1 ? 232 : 240;
  static constexpr int kProducerRegisters = 24;
  static constexpr std::uint32_t kTileBytes = kKeys * kD * 2;
  // The linear branch's [kD, kD] matrices pass through the stages of V, in parts of as many rows as
  // fit.
  static constexpr int kPartRows = kKeys < kD ? kKeys : kD;
  static constexpr int kParts = kD / kPartRows;
  static_assert(kParts <= kStages, "all parts of a matrix are multiplied at once");
};

// Which queries a block of threads works on, from its producer to its consumers.
struct QueryTile {
  int first_row, head, sample;
  int state;      // of the linear branch
  int units;      // of kKeyBlock keys
  int last_keys;  // of the last unit
};

template <class Tile>
struct alignas(1024) SharedStorage {
  bf16 q[Tile::kGroups][Tile::kPanels][kRowsPerGroup][kPanel];
  bf16 k[Tile::kStages][Tile::kPanels][Tile::kKeys][kPanel];
  bf16 v[Tile::kStages][Tile::kPanels][Tile::kKeys][kPanel];
  QueryTile tile;  // comes and goes with q
  std::uint64_t q_full, q_empty;
  std::uint64_t k_full[Tile::kStages], k_empty[Tile::kStages];
  std::uint64_t v_full[Tile::kStages], v_empty[Tile::kStages];
};

// What the linear branch brings: states [heads of this launch, states_per_head, D + 1, D], rows of
// sums and the normaliser below them.
struct LinearParameters {
  Feature feature = Feature::kSoftmax;
  const bf16* states = nullptr;
  int states_per_head = 1;
  int block_q = 0;  // queries that share a state, unless all of a head do
  const float* bias = nullptr;
};

// Of Q, K, V; of the states' sums; and of the projection, transposed.
struct TensorMaps {
  CUtensorMap q, k, v, state, weight;
};

struct Parameters {
  BlockList list;
  bf16* out;
  float* lse;
  int heads;
  int q_length;
  int k_length;
  float scale;
  int first_head;  // of all samples' heads, where this launch begins
  LinearParameters linear;
  int tiles_per_head = 0;  // of queries
  int tiles = 0;           // of all heads
};

// Tiles are taken from the last to the first, so that the only tile with missing keys comes first
// and the loop over the others has no mask.
template <class Tile>
__device__ int TileCount(int units) {
  return (units + Tile::kUnits - 1) / Tile::kUnits;
}

template <class Tile>
__device__ void CopyTile(const CUtensorMap* map, std::uint64_t* full,
                         bf16 (&to)[Tile::kPanels][Tile::kKeys][kPanel],
                         const int (&starts)[Tile::kUnits], int head, int sample) {
  BarrierExpect(full, Tile::kTileBytes);
#pragma unroll
  for (int unit = 0; unit < Tile::kUnits; ++unit) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      CopyBox(map, full, to[panel][unit * kKeyBlock], panel * kPanel, head, starts[unit], sample);
    }
  }
}

// A [D, D] matrix of the linear branch through the V ring.
template <class Tile>
__device__ void CopyMatrix(const CUtensorMap* map, SharedStorage<Tile>& shared,
                           Ring<Tile::kStages>& ring, int index) {
  for (int part = 0; part < Tile::kParts; ++part, ring.Next()) {
    std::uint64_t* full = &shared.v_full[ring.stage];
    BarrierWait(&shared.v_empty[ring.stage], ring.parity ^ 1);
    BarrierExpect(full, Tile::kPartRows * Tile::kHeadSize * 2);
    for (int row = 0; row < Tile::kPartRows; row += kKeyBlock) {
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        CopyBox(map, full, shared.v[ring.stage][panel][row], panel * kPanel, 0,
                part * Tile::kPartRows + row, index);
      }
    }
  }
}

// Brings the tiles of queries, keys and values, and the linear branch's matrices, as far ahead of
// the consumers as there are stages: those of the next query tile while they finish this one.
template <class Tile>
struct Producer {
  const TensorMaps& maps;
  const Parameters& parameters;
  SharedStorage<Tile>& shared;
  Ring<1> q_ring = {};
  Ring<Tile::kStages> k_ring = {}, v_ring = {};

  // Everything for query tile `index` of this launch.
  __device__ void Bring(int index) {
    const Parameters& p = parameters;
    const int launched_head = index / p.tiles_per_head;
    const int head_index = p.first_head + launched_head;
    const int first_row = index % p.tiles_per_head * Tile::kRows;
    const int states = p.linear.states_per_head;
    const KeyBlocks keys = KeyBlocksOfTile(p.list, p.k_length, head_index, first_row);
    const QueryTile tile{first_row,
                         head_index % p.heads,
                         head_index / p.heads,
                         launched_head * states + (states == 1 ? 0 : first_row / p.linear.block_q),
                         keys.count,
                         keys.count > 0 ? keys.Keys(keys.count - 1) : 0};
    BringQueries(tile);
    for (int i = TileCount<Tile>(keys.count) - 1; i >= 0; --i) BringKeys(tile, keys, i);
    if constexpr (Tile::kMixing != Mixing::kNone) {
      CopyMatrix<Tile>(&maps.state, shared, v_ring, tile.state);
    }
    if constexpr (Tile::kMixing == Mixing::kProjected) {
      CopyMatrix<Tile>(&maps.weight, shared, v_ring, 0);
    }
  }

  __device__ void BringQueries(const QueryTile& tile) {
    BarrierWait(&shared.q_empty, q_ring.parity ^ 1);
    q_ring.Next();
    shared.tile = tile;
    BarrierExpect(&shared.q_full, Tile::kRows * Tile::kHeadSize * 2);
    for (int group = 0; group < Tile::kGroups; ++group) {
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        CopyBox(&maps.q, &shared.q_full, shared.q[group][panel], panel * kPanel, tile.head,
                tile.first_row + group * kRowsPerGroup, tile.sample);
      }
    }
  }

  __device__ void BringKeys(const QueryTile& tile, const KeyBlocks& keys, int index) {
    int starts[Tile::kUnits];
#pragma unroll
    for (int unit = 0; unit < Tile::kUnits; ++unit) {
      // A unit that is not there is filled with one that is: its probabilities are zero, and zero
      // times whatever shared memory held before need not be zero.
      const int i = index * Tile::kUnits + unit;
      starts[unit] = keys.Start(i < keys.count ? i : keys.count - 1);
    }
    BarrierWait(&shared.k_empty[k_ring.stage], k_ring.parity ^ 1);
    CopyTile<Tile>(&maps.k, &shared.k_full[k_ring.stage], shared.k[k_ring.stage], starts, tile.head,
                   tile.sample);
    k_ring.Next();
    BarrierWait(&shared.v_empty[v_ring.stage], v_ring.parity ^ 1);
    CopyTile<Tile>(&maps.v, &shared.v_full[v_ring.stage], shared.v[v_ring.stage], starts, tile.head,
                   tile.sample);
    v_ring.Next();
  }
};

// One consumer warpgroup at work on its 64 query rows.
template <class Tile>
struct Consumer {
  static constexpr int kScores = Tile::kKeys / 2;  // registers per thread
  static constexpr int kOutputs = Tile::kHeadSize / 2;

  SharedStorage<Tile>& shared;
  int group;
  Ring<1> q_ring;
  Ring<Tile::kStages> k_ring, v_ring;
  std::uint32_t query[Tile::kHeadSize / 16][4];

  // Waits for the next query tile. Q moves to registers, as A fragments: products then read half as
  // much of shared memory, which is free for the tile after.
  __device__ QueryTile LoadQuery() {
    BarrierWait(&shared.q_full, q_ring.parity);
    q_ring.Next();
    const QueryTile tile = shared.tile;
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane % 16;
#pragma unroll
    for (int step = 0; step < Tile::kHeadSize / 16; ++step) {
      LoadMatrices(query[step], SharedAddress(shared.q[group][step / 4]) +
                                    SwizzledOffset<kPanel / 8>(row, step % 4 * 2 + lane / 16));
    }
    BarrierArrive(&shared.q_empty);  // every lane: it has read the tile
    return tile;
  }

  // scores = Q K^T of the tile that is next in the K ring; committed, not waited for.
  __device__ void StartScores(float (&scores)[kScores]) {
    BarrierWait(&shared.k_full[k_ring.stage], k_ring.parity);
    HoldRegisters(scores);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < Tile::kHeadSize / 16; ++step) {
      const int panel = step / 4;
      const std::uint32_t column_bytes = step % 4 * 32;
      const std::uint64_t k =
          SwizzledTile(SharedAddress(shared.k[k_ring.stage][panel]) + column_bytes, 0);
      if constexpr (Tile::kKeys == 128) {
        Wgmma64x128<false>(scores, query[step], k, step > 0);
      } else {
        Wgmma64x64<false>(scores, query[step], k, step > 0);
      }
    }
    WgmmaCommit();
  }

  // output += P V of the tile that is next in the V ring; committed, not waited for.
  __device__ void StartOutput(const std::uint32_t (&probabilities)[kScores / 8][4],
                              float (&output)[kOutputs]) {
    constexpr std::uint32_t kPanelBytes = Tile::kKeys * kPanel * 2;
    BarrierWait(&shared.v_full[v_ring.stage], v_ring.parity);
    HoldRegisters(output);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < Tile::kKeys / 16; ++step) {
      const std::uint64_t v =
          SwizzledTile(SharedAddress(shared.v[v_ring.stage][0][step * 16]), kPanelBytes);
      if constexpr (Tile::kHeadSize == 128) {
        Wgmma64x128<true>(output, probabilities[step], v, true);
      } else {
        Wgmma64x64<true>(output, probabilities[step], v, true);
      }
    }
    WgmmaCommit();
  }

  // sums (+)= a M for the [D, D] matrix that is next in the V ring; committed, not waited for.
  __device__ void StartMatrix(const std::uint32_t (&a)[Tile::kHeadSize / 16][4],
                              float (&sums)[kOutputs], bool accumulate) {
    constexpr std::uint32_t kPanelBytes = Tile::kKeys * kPanel * 2;
    constexpr int kSteps = Tile::kPartRows / 16;
    Ring<Tile::kStages> ring = v_ring;
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part, ring.Next()) {
      BarrierWait(&shared.v_full[ring.stage], ring.parity);
    }
    ring = v_ring;
    HoldRegisters(sums);
    WgmmaFence();
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part, ring.Next()) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const std::uint64_t m =
            SwizzledTile(SharedAddress(shared.v[ring.stage][0][step * 16]), kPanelBytes);
        const bool add = accumulate || part + step > 0;
        if constexpr (Tile::kHeadSize == 128) {
          Wgmma64x128<true>(sums, a[part * kSteps + step], m, add);
        } else {
          Wgmma64x64<true>(sums, a[part * kSteps + step], m, add);
        }
      }
    }
    WgmmaCommit();
  }
  __device__ void FinishMatrix(float (&sums)[kOutputs]) {
    WgmmaWait<0>();
    HoldRegisters(sums);
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) ReleaseV();
  }

  // The queries, whose scores are all there, become their features, divided by their normaliser.
  __device__ void MapQuery(Feature feature, const bf16* normaliser) {
    const int quad = threadIdx.x % 4;
    std::uint32_t z[Tile::kHeadSize / 8];
#pragma unroll
    for (int i = 0; i < Tile::kHeadSize / 8; ++i) {
      z[i] = *reinterpret_cast<const std::uint32_t*>(normaliser + i * 8 + quad * 2);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of rows lane / 4 and lane / 4 + 8
      float x[Tile::kHeadSize / 4];
#pragma unroll
      for (int i = 0; i < Tile::kHeadSize / 8; ++i) {
        const float2 pair = UnpackBf16(query[i / 2][i % 2 * 2 + half]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
      }
      MapFeatures<4>(feature, x);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < Tile::kHeadSize / 8; ++i) {
        const float2 pair = UnpackBf16(z[i]);
        sum += x[2 * i] * pair.x + x[2 * i + 1] * pair.y;
      }
      const float inverse = 1.0f / (GroupSum<4>(sum) + kNormaliserEpsilon);
#pragma unroll
      for (int i = 0; i < Tile::kHeadSize / 8; ++i) {
        query[i / 2][i % 2 * 2 + half] = PackBf16(x[2 * i] * inverse, x[2 * i + 1] * inverse);
      }
    }
  }

  // Adds the linear branch, for which MapQuery was called, to the normalised output.
  __device__ void AddLinear(float (&output)[kOutputs]) {
    if constexpr (Tile::kMixing == Mixing::kFolded) {
      StartMatrix(query, output, true);
      FinishMatrix(output);
    } else {
      float linear[kOutputs];
      StartMatrix(query, linear, false);
      FinishMatrix(linear);
      PackProbabilities(linear, query);
      StartMatrix(query, output, true);
      FinishMatrix(output);
    }
  }

  // Every warp says for itself that it has read a stage.
  __device__ void ReleaseK() {
    if (threadIdx.x % 32 == 0) BarrierArrive(&shared.k_empty[k_ring.stage]);
    k_ring.Next();
  }
  __device__ void ReleaseV() {
    if (threadIdx.x % 32 == 0) BarrierArrive(&shared.v_empty[v_ring.stage]);
    v_ring.Next();
  }

  // Ping-pong: a warpgroup starts its products when the other has started its own.
  __device__ void AwaitTurn() const {
    if constexpr (Tile::kGroups == 2) NamedBarrierSync(kTurnBarrier + group, 2 * kWarpgroup);
  }
  __device__ void PassTurn() const {
    if constexpr (Tile::kGroups == 2) NamedBarrierArrive(kTurnBarrier + 1 - group, 2 * kWarpgroup);
  }

  // For the tile that holds the last unit of keys, and maybe one beyond it.
  __device__ static void MaskTile(float (&scores)[kScores], const QueryTile& query) {
    const int column = 2 * (threadIdx.x % 4);
    const int first = (TileCount<Tile>(query.units) - 1) * Tile::kUnits;
#pragma unroll
    for (int unit = 0; unit < Tile::kUnits; ++unit) {
      const int beyond = first + unit - (query.units - 1);  // the last unit
      const int valid = beyond < 0 ? kKeyBlock : beyond == 0 ? query.last_keys : 0;
      if (valid == kKeyBlock) continue;
#pragma unroll
      for (int j = 0; j < kKeyBlock / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (8 * j + column + i % 2 >= valid) {
            scores[unit * (kKeyBlock / 2) + 4 * j + i] = -INFINITY;
          }
        }
      }
    }
  }

  // Ends the product that StartOutput began, if one is `pending`, and brings the sums so far to the
  // new maxima.
  __device__ void FinishOutput(bool pending, float (&output)[kOutputs],
                               const float (&correction)[2]) {
    WgmmaWait<0>();
    HoldRegisters(output);
    if (pending) ReleaseV();
    CorrectRows(output, correction);
  }

  // `last` is what to do once the scores are all there, while the last product with V runs.
  template <class Last>
  __device__ void Run(const QueryTile& query, OnlineSoftmax& softmax, float (&output)[kOutputs],
                      const Last& last) {
    const int tiles = TileCount<Tile>(query.units);
    float scores[kScores];
    std::uint32_t probabilities[kScores / 8][4];
    float correction[2];
    AwaitTurn();
    StartScores(scores);
    PassTurn();
    WgmmaWait<0>();
    HoldRegisters(scores);
    ReleaseK();
    MaskTile(scores, query);
    softmax.Update(scores, correction);
    // The product with V ends at the head of the next round, not at the end of its own: within one
    // round the assembler would move the wait in front of the softmax, which is to hide behind it.
#pragma unroll 1
    for (int tile = tiles - 2; tile >= 0; --tile) {
      FinishOutput(tile < tiles - 2, output, correction);
      PackProbabilities(scores, probabilities);
      AwaitTurn();
      StartScores(scores);
      StartOutput(probabilities, output);
      PassTurn();
      WgmmaWait<1>();
      HoldRegisters(scores);
      ReleaseK();
      softmax.Update(scores, correction);
    }
    FinishOutput(tiles > 1, output, correction);
    PackProbabilities(scores, probabilities);
    AwaitTurn();
    StartOutput(probabilities, output);
    PassTurn();
    last();
    WgmmaWait<0>();
    HoldRegisters(output);
    ReleaseV();
    softmax.Finish();
  }
};

// Divides by the softmax's sums; rows without a key are zero.
template <int kCount>
__device__ void Normalise(const OnlineSoftmax& softmax, bool any_keys, float (&output)[kCount]) {
  const float factor[2] = {any_keys ? 1.0f / softmax.sum[0] : 0.0f,
                           any_keys ? 1.0f / softmax.sum[1] : 0.0f};
  ScaleRows(output, factor);
}

template <int kCount>
__device__ void AddBias(const float* bias, float (&output)[kCount]) {
  const float* own = bias + threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    const float2 pair = *reinterpret_cast<const float2*>(own + 8 * j);
    output[4 * j] += pair.x;
    output[4 * j + 1] += pair.y;
    output[4 * j + 2] += pair.x;
    output[4 * j + 3] += pair.y;
  }
}

template <class Tile>
__device__ void StoreOutput(const Parameters& parameters, const OnlineSoftmax& softmax,
                            const float (&output)[Tile::kHeadSize / 2], bool any_keys, int row,
                            int head, int sample) {
  bf16* rows[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = row + 8 * r;
    const bool valid = at < parameters.q_length;
    const std::int64_t token = static_cast<std::int64_t>(sample) * parameters.q_length + at;
    rows[r] =
        valid ? parameters.out + (token * parameters.heads + head) * Tile::kHeadSize : nullptr;
    if (valid && parameters.lse != nullptr && threadIdx.x % 4 == 0) {
      const std::int64_t head_index = static_cast<std::int64_t>(sample) * parameters.heads + head;
      parameters.lse[head_index * parameters.q_length + at] =
          any_keys ? softmax.LogSumExp(r) : -INFINITY;
    }
  }
  StoreRows(output, rows[0], rows[1]);
}

// A consumer warpgroup at work on its next query tile.
template <class Tile>
__device__ void Consume(const Parameters& parameters, Consumer<Tile>& consumer) {
  constexpr bool kMixes = Tile::kMixing != Mixing::kNone;
  constexpr int kStateSize = (Tile::kHeadSize + 1) * Tile::kHeadSize;
  OnlineSoftmax softmax(parameters.scale);
  float output[Tile::kHeadSize / 2] = {};
  const QueryTile tile = consumer.LoadQuery();
  const bool any_keys = tile.units > 0;
  const auto map_query = [&] {
    if constexpr (kMixes) {
      const bf16* state = parameters.linear.states + std::int64_t{tile.state} * kStateSize;
      consumer.MapQuery(parameters.linear.feature, state + Tile::kHeadSize * Tile::kHeadSize);
    }
  };
  if (any_keys) {
    consumer.Run(tile, softmax, output, map_query);
  } else {
    map_query();
  }
  Normalise(softmax, any_keys, output);
  if constexpr (kMixes) {
    consumer.AddLinear(output);
    AddBias(parameters.linear.bias, output);
  }
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int row =
      tile.first_row + consumer.group * kRowsPerGroup + thread / 32 * 16 + thread % 32 / 4;
  StoreOutput<Tile>(parameters, softmax, output, any_keys, row, tile.head, tile.sample);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    HopperAttentionKernel(const __grid_constant__ TensorMaps maps,
                          const __grid_constant__ Parameters parameters) {
  extern __shared__ __align__(1024) std::byte dynamic_shared[];
  auto& shared = *reinterpret_cast<SharedStorage<Tile>*>(dynamic_shared);
  if (threadIdx.x == 0) {
    BarrierInit(&shared.q_full, 1);
    BarrierInit(&shared.q_empty, Tile::kGroups * kWarpgroup);
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      BarrierInit(&shared.k_full[stage], 1);
      BarrierInit(&shared.v_full[stage], 1);
      BarrierInit(&shared.k_empty[stage], Tile::kGroups * kWarpgroup / 32);
      BarrierInit(&shared.v_empty[stage], Tile::kGroups * kWarpgroup / 32);
    }
    BarrierInitFence();
  }
  __syncthreads();

  // Every gridDim.x-th tile: blocks at work at the same time share heads, whose K and V then stay
  // in the L2 cache.
  const int step = static_cast<int>(gridDim.x);
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (warpgroup == 0) {
    LowerRegisters<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) {
      Producer<Tile> producer{maps, parameters, shared};
      for (int i = blockIdx.x; i < parameters.tiles; i += step) producer.Bring(i);
    }
  } else {
    RaiseRegisters<Tile::kConsumerRegisters>();
    Consumer<Tile> consumer{shared, warpgroup - 1, {}, {}, {}, {}};
    if (warpgroup == 2) consumer.PassTurn();  // the first turn is the other's
#pragma unroll 1
    for (int i = blockIdx.x; i < parameters.tiles; i += step) Consume<Tile>(parameters, consumer);
    if (warpgroup == 1) consumer.AwaitTurn();  // takes the last turn that was passed to it
  }
}

// `heads` of all samples' heads, from parameters.first_head on.
template <class Tile>
void Launch(const Context& context, const TensorMaps& maps, Parameters parameters,
            std::int64_t heads) {
  constexpr std::size_t kSharedBytes = sizeof(SharedStorage<Tile>);
  // A multiprocessor has 228 KiB, of which every block takes one for itself.
  static_assert(Tile::kBlocksPerSm * (kSharedBytes + 1024) <= 228 * 1024);
  static_assert(kRowsPerGroup == kKeyBlock, "Q, K and V are copied in boxes of one size");
  Check(cudaFuncSetAttribute(HopperAttentionKernel<Tile>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "HopperAttention: shared memory");
  parameters.tiles_per_head = (parameters.q_length + Tile::kRows - 1) / Tile::kRows;
  parameters.tiles = parameters.tiles_per_head * static_cast<int>(heads);
  const int blocks = std::min(parameters.tiles, context.sm_count * Tile::kBlocksPerSm);
  HopperAttentionKernel<Tile>
      <<<blocks, Tile::kThreads, kSharedBytes, context.stream>>>(maps, parameters);
  CheckLaunch("HopperAttention");
}

inline Parameters MakeParameters(const AttentionProblem& problem) {
  return {problem.list,
          static_cast<bf16*>(problem.out),
          problem.lse,
          static_cast<int>(problem.heads),
          static_cast<int>(problem.q_length),
          static_cast<int>(problem.k_length),
          problem.scale,
          0,
          {}};
}

inline TensorMaps MakeMaps(const AttentionProblem& problem) {
  const auto rows = [&](const void* data, std::int64_t length) {
    return MakeRowsMap(data, problem.batch, length, problem.heads, problem.head_size);
  };
  return {rows(problem.q, problem.q_length),
          rows(problem.k, problem.k_length),
          rows(problem.v, problem.k_length),
          {},
          {}};
}

// One consumer where query blocks are not pairs of its rows.
inline bool Narrow(const AttentionProblem& problem) {
  return problem.list.indices != nullptr && problem.list.block_q % 128 != 0;
}

}  // namespace slalom::cuda::hopper_attention
