// The sparse branch's gradients on Hopper: TMA brings blocks of the other side, wgmma multiplies.
//
// d_q: a warpgroup owns 64 queries and has them and their d_out, where it can, in registers as left
// operands; scores, slopes and the sum are three products per block of keys.
// d_k, d_v: a block of threads owns 64 keys. Scores are transposed (rows are keys), so that P^T and
// dS^T are left in registers as the next products' left operands. Two warpgroups take the listed
// blocks of queries in turn, and add their sums up at the end.
// In both, the last product of a block is waited for behind the first products of the next one.
#include <cuda.h>

#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/attention/sparse_gradient.cuh"
#include "kernels/cuda/hopper/mbarrier.cuh"
#include "kernels/cuda/hopper/ring.h"
#include "kernels/cuda/hopper/tensor_map.h"
#include "kernels/cuda/hopper/tma.cuh"
#include "kernels/cuda/hopper/wgmma.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

using namespace hopper;

constexpr int kWarpgroup = 128;
constexpr int kPanel = 64;  // bf16 columns in a swizzled panel: 128 bytes
constexpr int kTile = kKeyBlock;
constexpr int kScores = kTile / 2;  // registers of a 64 x 64 product
constexpr int kProducerRegisters = 24;
constexpr int kConsumersBarrier = 1;

template <int kD>
using Panels = bf16[kD / kPanel][kTile][kPanel];

struct TensorMaps {
  CUtensorMap q, k, v, d_out;
};

using Parameters = SparseGradientParameters;

template <int kD>
__device__ void CopyTile(const CUtensorMap* map, std::uint64_t* full, Panels<kD>& to, int row,
                         int head, int sample) {
#pragma unroll
  for (int panel = 0; panel < kD / kPanel; ++panel) {
    CopyBox(map, full, to[panel], panel * kPanel, head, row, sample);
  }
}

// 64 rows from shared memory as A fragments of a warpgroup.
template <int kD>
__device__ void LoadFragments(std::uint32_t (&a)[kD / 16][4], const Panels<kD>& tile) {
  const int lane = threadIdx.x % 32;
  const int row = static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16 + lane % 16;
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    LoadMatrices(a[step], SharedAddress(tile[step / 4]) +
                              SwizzledOffset<kPanel / 8>(row, step % 4 * 2 + lane / 16));
  }
}

// The descriptor of 16 channels of a tile, its rows along the product's m or n.
template <int kD>
__device__ inline std::uint64_t ChannelStep(const Panels<kD>& tile, int step) {
  return SwizzledTile(SharedAddress(tile[step / 4]) + step % 4 * 32, 0);
}
// The descriptor of 16 rows of a tile, which run along the product's k.
template <int kD>
__device__ inline std::uint64_t RowStep(const Panels<kD>& tile, int step) {
  return SwizzledTile(SharedAddress(tile[0][step * 16]), kTile * kPanel * 2);
}

// scores = a tile^T; committed, not waited for.
template <int kD>
__device__ void StartScores(float (&scores)[kScores], const std::uint32_t (&a)[kD / 16][4],
                            const Panels<kD>& tile) {
  HoldRegisters(scores);
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    Wgmma64x64<false>(scores, a[step], ChannelStep<kD>(tile, step), step > 0);
  }
  WgmmaCommit();
}
template <int kD>
__device__ void StartScores(float (&scores)[kScores], const Panels<kD>& a, const Panels<kD>& tile) {
  HoldRegisters(scores);
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    Wgmma64x64<false>(scores, ChannelStep<kD>(a, step), ChannelStep<kD>(tile, step), step > 0);
  }
  WgmmaCommit();
}

// sums += weights tile; committed, not waited for.
template <int kD>
__device__ void StartSums(float (&sums)[kD / 2], const std::uint32_t (&weights)[kTile / 16][4],
                          const Panels<kD>& tile) {
  HoldRegisters(sums);
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < kTile / 16; ++step) {
    if constexpr (kD == 128) {
      Wgmma64x128<true>(sums, weights[step], RowStep<kD>(tile, step), true);
    } else {
      Wgmma64x64<true>(sums, weights[step], RowStep<kD>(tile, step), true);
    }
  }
  WgmmaCommit();
}

// Adds what two rows of memory hold to a thread's part of 16 rows.
template <int kCount>
__device__ void AddRows(float (&values)[kCount], const bf16* row, const bf16* second) {
  const int column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bf16* from = r == 0 ? row : second;
    if (from == nullptr) continue;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      const float2 pair =
          UnpackBf16(*reinterpret_cast<const std::uint32_t*>(from + 8 * j + column));
      values[4 * j + 2 * r] += pair.x;
      values[4 * j + 2 * r + 1] += pair.y;
    }
  }
}

// A warpgroup's 64 rows, of which `first_row` is the first, times `factor`.
template <int kD>
__device__ void StoreTile(float (&sums)[kD / 2], float factor, const Parameters& p, bf16* to,
                          int first_row, int head, int sample) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int row = first_row + thread / 32 * 16 + thread % 32 / 4;
  bf16* rows[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const std::int64_t token = std::int64_t{sample} * p.length + row + 8 * r;
    rows[r] = row + 8 * r < p.length ? to + (token * p.heads + head) * kD : nullptr;
  }
  const float factors[2] = {factor, factor};
  ScaleRows(sums, factors);
  if (p.accumulate) AddRows(sums, rows[0], rows[1]);
  StoreRows(sums, rows[0], rows[1]);
}

// --- d_q ---

template <int kD, int kConsumers>
struct QueryTiling {
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kStages = kConsumers == 2 || kD == 64 ? 4 : 2;  // as many as fit
  static constexpr int kBlocksPerSm = kConsumers == 1 ? 2 : 1;
  static constexpr int kConsumerRegisters = kConsumers == 1 ? 232 : 240;
};

template <int kD, int kConsumers>
struct alignas(1024) QueryStorage {
  using Tiling = QueryTiling<kD, kConsumers>;
  Panels<kD> q[kConsumers], d_out[kConsumers];
  Panels<kD> k[Tiling::kStages], v[Tiling::kStages];
  std::uint64_t own_full;
  std::uint64_t full[Tiling::kStages], empty[Tiling::kStages];
};

template <int kD, int kConsumers>
__device__ void ProduceKeys(const TensorMaps& maps, QueryStorage<kD, kConsumers>& shared,
                            const KeyBlocks& keys, int first_row, int head, int sample) {
  constexpr int kTileBytes = kTile * kD * 2;
  BarrierExpect(&shared.own_full, 2 * kConsumers * kTileBytes);
  for (int group = 0; group < kConsumers; ++group) {
    const int row = first_row + group * kTile;
    CopyTile<kD>(&maps.q, &shared.own_full, shared.q[group], row, head, sample);
    CopyTile<kD>(&maps.d_out, &shared.own_full, shared.d_out[group], row, head, sample);
  }
  Ring<QueryTiling<kD, kConsumers>::kStages> ring;
  for (int i = keys.count - 1; i >= 0; --i, ring.Next()) {
    BarrierWait(&shared.empty[ring.stage], ring.parity ^ 1);
    std::uint64_t* full = &shared.full[ring.stage];
    BarrierExpect(full, 2 * kTileBytes);
    CopyTile<kD>(&maps.k, full, shared.k[ring.stage], keys.Start(i), head, sample);
    CopyTile<kD>(&maps.v, full, shared.v[ring.stage], keys.Start(i), head, sample);
  }
}

// scores become dS, given slopes = d_out V^T.
struct RowSlopes {
  float scale_log2;
  float lse[2], delta[2];

  __device__ RowSlopes(const Parameters& p, std::int64_t head_index, int row)
      : scale_log2(p.scale * kLog2E) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool there = row + 8 * r < p.length;
      const std::int64_t at = head_index * p.length + row + 8 * r;
      lse[r] = there ? kLog2E * p.lse[at] : INFINITY;
      delta[r] = there ? p.delta[at] : 0.0f;
    }
  }
  __device__ void Exponentiate(float (&scores)[kScores]) const {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      scores[i] = Exp2(fmaf(scores[i], scale_log2, -lse[i % 4 / 2]));
    }
  }
  __device__ void Multiply(const float (&slopes)[kScores], float (&scores)[kScores]) const {
#pragma unroll
    for (int i = 0; i < kScores; ++i) scores[i] *= slopes[i] - delta[i % 4 / 2];
  }
};

__device__ inline void MaskKeys(float (&scores)[kScores], int keys) {
  const int column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    if (i / 4 * 8 + column + i % 2 >= keys) scores[i] = 0.0f;
  }
}

template <int kD, int kConsumers>
__device__ void ConsumeKeys(const Parameters& p, QueryStorage<kD, kConsumers>& shared,
                            const KeyBlocks& keys, int group, int first_row, int head, int sample) {
  constexpr int kStages = QueryTiling<kD, kConsumers>::kStages;
  float sums[kD / 2] = {};
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int own_row = first_row + group * kTile;
  const RowSlopes rows(p, std::int64_t{sample} * p.heads + head,
                       own_row + thread / 32 * 16 + thread % 32 / 4);
  if (keys.count > 0) {
    // With 64 channels queries stay in shared memory: ptxas 13.0 would give their fragments and
    // `weights` the same registers. So does d_out where two blocks share a multiprocessor's
    // registers.
    constexpr bool kHoldQueries = kD == 128, kHoldSlopes = kHoldQueries && kConsumers == 2;
    std::uint32_t q[kHoldQueries ? kD / 16 : 1][4], d_out[kHoldSlopes ? kD / 16 : 1][4];
    std::uint32_t weights[kTile / 16][4];
    float scores[kScores], slopes[kScores];
    BarrierWait(&shared.own_full, 0);
    if constexpr (kHoldQueries) LoadFragments<kD>(q, shared.q[group]);
    if constexpr (kHoldSlopes) LoadFragments<kD>(d_out, shared.d_out[group]);
    Ring<kStages> ring;
    int last = -1;  // the stage that the sum still reads
    const auto release = [&] {
      if (last >= 0 && threadIdx.x % 32 == 0) BarrierArrive(&shared.empty[last]);
    };
#pragma unroll 1
    for (int i = keys.count - 1; i >= 0; --i) {
      BarrierWait(&shared.full[ring.stage], ring.parity);
      if constexpr (kHoldQueries) {
        StartScores<kD>(scores, q, shared.k[ring.stage]);
      } else {
        StartScores<kD>(scores, shared.q[group], shared.k[ring.stage]);
      }
      if constexpr (kHoldSlopes) {
        StartScores<kD>(slopes, d_out, shared.v[ring.stage]);
      } else {
        StartScores<kD>(slopes, shared.d_out[group], shared.v[ring.stage]);
      }
      WgmmaWait<2>();
      HoldRegisters(sums);
      release();
      last = ring.stage;
      WgmmaWait<1>();
      HoldRegisters(scores);
      rows.Exponentiate(scores);
      WgmmaWait<0>();
      HoldRegisters(slopes);
      rows.Multiply(slopes, scores);
      if (i == keys.count - 1) MaskKeys(scores, keys.Keys(i));
      PackProbabilities(scores, weights);
      StartSums<kD>(sums, weights, shared.k[ring.stage]);
      ring.Next();
    }
    WgmmaWait<0>();
    HoldRegisters(sums);
  }
  StoreTile<kD>(sums, p.scale, p, p.d_q, own_row, head, sample);
}

// Grid (tiles of kConsumers * 64 queries, heads, samples).
template <int kD, int kConsumers>
__global__ void __launch_bounds__(QueryTiling<kD, kConsumers>::kThreads,
                                  QueryTiling<kD, kConsumers>::kBlocksPerSm)
    QueryGradientKernel(const __grid_constant__ TensorMaps maps, const Parameters p) {
  extern __shared__ __align__(1024) std::byte dynamic_shared[];
  auto& shared = *reinterpret_cast<QueryStorage<kD, kConsumers>*>(dynamic_shared);
  using Tiling = QueryTiling<kD, kConsumers>;
  const int first_row = blockIdx.x * kConsumers * kTile;
  const int head = blockIdx.y, sample = blockIdx.z;
  const KeyBlocks keys =
      KeyBlocksOfTile(p.list, p.length, std::int64_t{sample} * p.heads + head, first_row);
  if (threadIdx.x == 0) {
    BarrierInit(&shared.own_full, 1);
    for (int stage = 0; stage < Tiling::kStages; ++stage) {
      BarrierInit(&shared.full[stage], 1);
      BarrierInit(&shared.empty[stage], kConsumers * kWarpgroup / 32);
    }
    BarrierInitFence();
  }
  __syncthreads();
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (warpgroup == 0) {
    LowerRegisters<kProducerRegisters>();
    if (threadIdx.x == 0 && keys.count > 0) {
      ProduceKeys<kD, kConsumers>(maps, shared, keys, first_row, head, sample);
    }
  } else {
    RaiseRegisters<Tiling::kConsumerRegisters>();
    ConsumeKeys<kD, kConsumers>(p, shared, keys, warpgroup - 1, first_row, head, sample);
  }
}

// --- d_k and d_v ---

constexpr int kKeyGroups = 2;
constexpr int kKeyThreads = (kKeyGroups + 1) * kWarpgroup;
constexpr int kKeyConsumerRegisters = 240;
// A multiple of kKeyGroups: a stage is always the same warpgroup's.
constexpr int kKeyStages = 4;

template <int kD>
struct alignas(1024) KeyStorage {
  Panels<kD> k, v;
  union {
    struct {
      Panels<kD> q[kKeyStages], d_out[kKeyStages];
    };
    float exchange[kKeyGroups][kD / 2][kWarpgroup];  // once all stages are done with
  };
  float lse[kKeyStages][kTile];  // times log2(e)
  float delta[kKeyStages][kTile];
  std::uint64_t own_full;
  std::uint64_t full[kKeyStages], empty[kKeyStages];
};

// One thread: the tiles.
template <int kD>
__device__ void ProduceQueries(const TensorMaps& maps, KeyStorage<kD>& shared,
                               const KeyBlocks& queries, int first_row, int head, int sample) {
  constexpr int kTileBytes = kTile * kD * 2;
  BarrierExpect(&shared.own_full, 2 * kTileBytes);
  CopyTile<kD>(&maps.k, &shared.own_full, shared.k, first_row, head, sample);
  CopyTile<kD>(&maps.v, &shared.own_full, shared.v, first_row, head, sample);
  Ring<kKeyStages> ring;
  for (int i = 0; i < queries.count; ++i, ring.Next()) {
    BarrierWait(&shared.empty[ring.stage], ring.parity ^ 1);
    std::uint64_t* full = &shared.full[ring.stage];
    BarrierExpect(full, 2 * kTileBytes);
    CopyTile<kD>(&maps.q, full, shared.q[ring.stage], queries.Start(i), head, sample);
    CopyTile<kD>(&maps.d_out, full, shared.d_out[ring.stage], queries.Start(i), head, sample);
  }
}

// One warp: what belongs to the rows. Rows that are not there get a lse that makes their
// probabilities zero.
template <int kD>
__device__ void ProduceRows(const Parameters& p, KeyStorage<kD>& shared, const KeyBlocks& queries,
                            std::int64_t head_index) {
  const int lane = threadIdx.x % 32;
  Ring<kKeyStages> ring;
#pragma unroll 1
  for (int i = 0; i < queries.count; ++i, ring.Next()) {
    const int start = queries.Start(i);
    float lse[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = start + lane + 32 * r;
      const std::int64_t at = head_index * p.length + row;
      lse[r] = row < p.length ? kLog2E * p.lse[at] : INFINITY;
      delta[r] = row < p.length ? p.delta[at] : 0.0f;
    }
    BarrierWait(&shared.empty[ring.stage], ring.parity ^ 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      shared.lse[ring.stage][lane + 32 * r] = lse[r];
      shared.delta[ring.stage][lane + 32 * r] = delta[r];
    }
    BarrierArrive(&shared.full[ring.stage]);
  }
}

// scores [keys, queries] become probabilities.
__device__ inline void ExponentiateColumns(float (&scores)[kScores], const float* lse,
                                           float scale_log2) {
  const float* own = lse + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < kScores / 4; ++j) {
    const float2 pair = *reinterpret_cast<const float2*>(own + 8 * j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[4 * j + i] = Exp2(fmaf(scores[4 * j + i], scale_log2, i % 2 == 0 ? -pair.x : -pair.y));
    }
  }
}
// slopes = V d_out^T become dS. The probabilities come as they were packed: registers are short.
__device__ inline void MultiplyColumns(const std::uint32_t (&probabilities)[kTile / 16][4],
                                       const float* delta, float (&slopes)[kScores]) {
  const float* own = delta + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < kScores / 4; ++j) {
    const float2 pair = *reinterpret_cast<const float2*>(own + 8 * j);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 probability = UnpackBf16(probabilities[j / 2][j % 2 * 2 + r]);
      slopes[4 * j + 2 * r] = probability.x * (slopes[4 * j + 2 * r] - pair.x);
      slopes[4 * j + 2 * r + 1] = probability.y * (slopes[4 * j + 2 * r + 1] - pair.y);
    }
  }
}

template <int kD>
__device__ void ConsumeQueries(const Parameters& p, KeyStorage<kD>& shared, int count, int group,
                               float (&d_k)[kD / 2], float (&d_v)[kD / 2]) {
  std::uint32_t probabilities[kTile / 16][4], weights[kTile / 16][4];
  float scores[kScores], slopes[kScores];
  const float scale_log2 = p.scale * kLog2E;
  BarrierWait(&shared.own_full, 0);
  Ring<kKeyStages> ring;
  if (group == 1) ring.Next();
  int last = -1;  // the stage that the sums still read
  const auto release = [&] {
    if (last >= 0) BarrierArrive(&shared.empty[last]);  // every lane: it has read lse and delta
  };
#pragma unroll 1
  for (int i = group; i < count; i += kKeyGroups) {
    BarrierWait(&shared.full[ring.stage], ring.parity);
    StartScores<kD>(scores, shared.k, shared.q[ring.stage]);
    WgmmaWait<1>();
    HoldRegisters(d_k);
    HoldRegisters(d_v);
    release();
    last = ring.stage;
    WgmmaWait<0>();
    HoldRegisters(scores);
    ExponentiateColumns(scores, shared.lse[ring.stage], scale_log2);
    PackProbabilities(scores, probabilities);
    // Not earlier: both sums and two products at once are more than the registers hold. The other
    // warpgroup has the tensor cores meanwhile.
    StartScores<kD>(slopes, shared.v, shared.d_out[ring.stage]);
    StartSums<kD>(d_v, probabilities, shared.d_out[ring.stage]);
    WgmmaWait<1>();
    HoldRegisters(slopes);
    MultiplyColumns(probabilities, shared.delta[ring.stage], slopes);
    PackProbabilities(slopes, weights);
    StartSums<kD>(d_k, weights, shared.q[ring.stage]);
    ring.Next();
    ring.Next();
  }
  WgmmaWait<0>();
  HoldRegisters(d_k);
  HoldRegisters(d_v);
}

// The first warpgroup hands its sum for d_v to the second, and gets that one's for d_k.
template <int kD>
__device__ void Exchange(KeyStorage<kD>& shared, int group, float (&d_k)[kD / 2],
                         float (&d_v)[kD / 2]) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  NamedBarrierSync(kConsumersBarrier, kKeyGroups * kWarpgroup);  // the stages are done with
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) {
    shared.exchange[group][i][thread] = group == 0 ? d_v[i] : d_k[i];
  }
  NamedBarrierSync(kConsumersBarrier, kKeyGroups * kWarpgroup);
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) {
    (group == 0 ? d_k[i] : d_v[i]) += shared.exchange[1 - group][i][thread];
  }
}

// Grid (tiles of 64 keys, heads, samples).
template <int kD>
__global__ void __launch_bounds__(kKeyThreads, 1)
    KeyGradientKernel(const __grid_constant__ TensorMaps maps, const Parameters p) {
  extern __shared__ __align__(1024) std::byte dynamic_shared[];
  auto& shared = *reinterpret_cast<KeyStorage<kD>*>(dynamic_shared);
  const int first_row = blockIdx.x * kTile, head = blockIdx.y, sample = blockIdx.z;
  const std::int64_t head_index = std::int64_t{sample} * p.heads + head;
  const KeyBlocks queries = KeyBlocksOfTile(p.list, p.length, head_index, first_row);
  if (threadIdx.x == 0) {
    BarrierInit(&shared.own_full, 1);
    for (int stage = 0; stage < kKeyStages; ++stage) {
      BarrierInit(&shared.full[stage], 1 + 32);
      BarrierInit(&shared.empty[stage], kWarpgroup);
    }
    BarrierInitFence();
  }
  __syncthreads();
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (warpgroup == 0) {
    LowerRegisters<kProducerRegisters>();
    if (queries.count == 0) return;
    if (threadIdx.x == 0) {
      ProduceQueries<kD>(maps, shared, queries, first_row, head, sample);
    } else if (threadIdx.x / 32 == 1) {
      ProduceRows<kD>(p, shared, queries, head_index);
    }
    return;
  }
  RaiseRegisters<kKeyConsumerRegisters>();
  const int group = warpgroup - 1;
  float d_k[kD / 2] = {}, d_v[kD / 2] = {};
  if (queries.count > 0) {
    ConsumeQueries<kD>(p, shared, queries.count, group, d_k, d_v);
    Exchange<kD>(shared, group, d_k, d_v);
  }
  if (group == 0) {
    StoreTile<kD>(d_k, p.scale, p, p.d_k, first_row, head, sample);
  } else {
    StoreTile<kD>(d_v, 1.0f, p, p.d_v, first_row, head, sample);
  }
}

template <int kD, int kConsumers>
void RunQueries(const Context& context, const TensorMaps& maps,
                const SparseGradientProblem& problem) {
  using Tiling = QueryTiling<kD, kConsumers>;
  constexpr std::size_t kBytes = sizeof(QueryStorage<kD, kConsumers>);
  // A multiprocessor has 228 KiB, of which every block takes one for itself.
  static_assert(Tiling::kBlocksPerSm * (kBytes + 1024) <= 228 * 1024);
  LaunchSparseGradient(context, problem, QueryGradientKernel<kD, kConsumers>, Tiling::kThreads,
                       kBytes, kConsumers * kTile, maps, Parameters::Of(problem, false));
}

template <int kD>
void Run(const Context& context, const SparseGradientProblem& problem) {
  const auto rows = [&](const void* data) {
    return MakeRowsMap(data, problem.batch, problem.length, problem.heads, kD);
  };
  const TensorMaps maps{rows(problem.q), rows(problem.k), rows(problem.v), rows(problem.d_out)};
  problem.keys.block_q % (2 * kTile) == 0 ? RunQueries<kD, 2>(context, maps, problem)
                                          : RunQueries<kD, 1>(context, maps, problem);
  constexpr std::size_t kBytes = sizeof(KeyStorage<kD>);
  static_assert(kBytes + 1024 <= 228 * 1024);
  LaunchSparseGradient(context, problem, KeyGradientKernel<kD>, kKeyThreads, kBytes, kTile, maps,
                       Parameters::Of(problem, true));
}

}  // namespace

void HopperSparseGradient(const Context& context, const SparseGradientProblem& problem) {
  problem.head_size == 128 ? Run<128>(context, problem) : Run<64>(context, problem);
}

}  // namespace slalom::cuda
