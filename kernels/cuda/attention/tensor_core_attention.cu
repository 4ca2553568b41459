// Softmax attention for sm_80 and newer, with mma.sync (after FlashAttention-2, arXiv 2307.08691).
// A warp owns groups of 16 query rows and keeps their scores and output in registers; the block's
// queries and one tile of keys and of values lie in shared memory. Every fragment of keys or values
// that a warp reads serves all of its groups: with one group shared memory, which every warp reads
// whole, would be the bottleneck. While a tile's scores are computed its values come (cp.async),
// while its values are weighed the next tile's keys. Lists of blocks of 16 or 32 are walked along
// in units of 16 keys, by blocks of one warp: each has a list of its own.
#include "kernels/cuda/attention/key_blocks.cuh"
#include "kernels/cuda/attention/mma_tiles.cuh"
#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/attention/problem.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/fragments.cuh"

namespace slalom::cuda {
namespace {

struct Parameters {
  BlockList list;
  const bf16* q;
  const bf16* k;
  const bf16* v;
  bf16* out;
  float* lse;
  const float* relative_bias;
  int heads;
  int q_length;
  int k_length;
  float scale;
};

// How a block of threads cuts its work: kWarps warps of kGroups x 16 rows, tiles of kKeys keys.
template <int kWarps, int kGroupCount, int kKeyCount>
struct TilingOf {
  static constexpr int kGroups = kGroupCount;
  static constexpr int kKeys = kKeyCount;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kWarpRows = kGroups * 16;
  static constexpr int kRows = kWarps * kWarpRows;
  // Eight warps on a multiprocessor leave each thread the 255 registers that two groups can use.
  static constexpr int kBlocksPerMultiprocessor = (kGroups == 2 ? 8 : 12) / kWarps;
};
template <int kD>
using DenseTiling = TilingOf<4, 2, 8192 / kD>;  // as many keys as fill 16 KiB
using WideTiling = TilingOf<4, 2, kKeyBlock>;
using NarrowTiling = TilingOf<2, 2, kKeyBlock>;
using SmallTiling = TilingOf<1, 1, kSmallKeyBlock>;

// What a kernel knows when it is compiled, so that it carries no more.
enum class Keys { kAll, kListed, kBiased };  // kBiased: all or listed, with a relative bias

template <int kD, class Tiling>
struct alignas(2 * kD) SharedTiles {
  bf16 q[Tiling::kRows][kD];
  bf16 k[Tiling::kKeys][kD];
  bf16 v[Tiling::kKeys][kD];
};

// The i-th kPart of a thread's values: 4 are its share of a fragment 16 x 8, 8 of a step of 16
// keys.
template <int kPart, int kCount>
__device__ inline float (&Part(float (&values)[kCount], int i))[kPart] {
  return *reinterpret_cast<float(*)[kPart]>(&values[i * kPart]);
}

// Scores of a warp's groups of 16 rows, which begin at `row`, with all keys of a tile: a thread has
// kKeys / 2 of each group.
template <int kD, int kRows, int kKeys, int kGroups>
__device__ void ComputeScores(float (&scores)[kGroups][kKeys / 2], const bf16 (&q)[kRows][kD],
                              int row, const bf16 (&k)[kKeys][kD]) {
  const FragmentReader<Operand::kLeft, kD> queries(q, row);
  const FragmentReader<Operand::kRightTransposed, kD> keys(k);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) scores[g][i] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    std::uint32_t a[kGroups][4];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) queries.Load(a[g], g * 16, step * 16);
#pragma unroll
    for (int pair = 0; pair < kKeys / 16; ++pair) {
      std::uint32_t b[4];
      keys.Load(b, pair * 16, step * 16);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        Mma16x16x16(Part<4>(scores[g], 2 * pair), Part<4>(scores[g], 2 * pair + 1), a[g], b);
      }
    }
  }
}

// Turns the scores into probabilities and adds the values they weigh, 16 keys after the other, so
// that exponentials and products overlap.
template <int kD, int kKeys, int kGroups>
__device__ void AddOutput(float (&output)[kGroups][kD / 2], float (&scores)[kGroups][kKeys / 2],
                          OnlineSoftmax (&softmax)[kGroups], const bf16 (&v)[kKeys][kD]) {
  const FragmentReader<Operand::kRight, kD> values(v);
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    std::uint32_t a[kGroups][1][4];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      softmax[g].Exponentiate(Part<8>(scores[g], step));
      PackProbabilities(Part<8>(scores[g], step), a[g]);
    }
#pragma unroll
    for (int pair = 0; pair < kD / 16; ++pair) {
      std::uint32_t b[4];
      values.Load(b, step * 16, pair * 16);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        Mma16x16x16(Part<4>(output[g], 2 * pair), Part<4>(output[g], 2 * pair + 1), a[g][0], b);
      }
    }
  }
}

// Scales the scores and adds the bias of their distances; the softmax then takes them as they are.
template <int kScores>
__device__ inline void AddBias(float (&scores)[kScores], const Parameters& parameters, int head,
                               int row, int first_key) {
  const int column = 2 * (threadIdx.x % 4);
  const int distances = parameters.q_length + parameters.k_length - 1;
  const float* bias = parameters.relative_bias + static_cast<std::int64_t>(head) * distances;
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const int key = first_key + i / 4 * 8 + column + i % 2;
    const int query = row + i % 4 / 2 * 8;
    const int distance = key - query + parameters.q_length - 1;
    // Rows and keys beyond the end read an entry that is there; they are masked or not stored.
    const int entry = min(max(distance, 0), distances - 1);
    scores[i] = scores[i] * parameters.scale + bias[entry];
  }
}

template <int kScores>
__device__ inline void MaskKeys(float (&scores)[kScores], int keys) {
  const int column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    if (i / 4 * 8 + column + i % 2 >= keys) scores[i] = -INFINITY;
  }
}

template <int kD>
__device__ void StoreTile(const Parameters& parameters, const OnlineSoftmax& softmax,
                          float (&output)[kD / 2], bool any_keys, int row, int head, int sample) {
  const float factor[2] = {any_keys ? 1.0f / softmax.sum[0] : 0.0f,
                           any_keys ? 1.0f / softmax.sum[1] : 0.0f};
  ScaleRows(output, factor);
  bf16* rows[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = row + 8 * r;
    const bool valid = at < parameters.q_length;
    const std::int64_t token = static_cast<std::int64_t>(sample) * parameters.q_length + at;
    rows[r] = valid ? parameters.out + (token * parameters.heads + head) * kD : nullptr;
    if (valid && parameters.lse != nullptr && threadIdx.x % 4 == 0) {
      const std::int64_t head_index = static_cast<std::int64_t>(sample) * parameters.heads + head;
      parameters.lse[head_index * parameters.q_length + at] =
          any_keys ? softmax.LogSumExp(r) : -INFINITY;
    }
  }
  StoreRows(output, rows[0], rows[1]);
}

template <int kD, class Tiling, Keys kWhich>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::kBlocksPerMultiprocessor)
    TensorCoreAttentionKernel(const Parameters parameters) {
  constexpr int kGroups = Tiling::kGroups, kKeys = Tiling::kKeys;
  extern __shared__ __align__(2 * kD) std::byte dynamic_shared[];
  auto& shared = *reinterpret_cast<SharedTiles<kD, Tiling>*>(dynamic_shared);
  const int first_row = blockIdx.x * Tiling::kRows;
  const int head = blockIdx.y;
  const std::int64_t sample = blockIdx.z;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * Tiling::kWarpRows;
  const int row = first_row + warp_row + static_cast<int>(threadIdx.x) % 32 / 4;
  const auto keys = kWhich == Keys::kAll
                        ? KeyBlocksOf<kKeys>::Dense(parameters.k_length)
                        : KeyBlocksOfTile<kKeys>(parameters.list, parameters.k_length,
                                                 sample * parameters.heads + head, first_row);
  const int stride = parameters.heads * kD;
  const auto rows_of = [&](const bf16* tensor, int length) {
    return tensor + sample * length * stride + head * kD;
  };
  const bf16* const k = rows_of(parameters.k, parameters.k_length);
  const bf16* const v = rows_of(parameters.v, parameters.k_length);
  // A tile from row `start` on, on its way until the next wait.
  const auto copy = [&](auto& tile, const bf16* rows, int start, int length) {
    CopyTile<kD, Tiling::kThreads>(tile, rows + static_cast<std::int64_t>(start) * stride, stride,
                                   length - start);
    CopyAsyncCommit();
  };
  int next = 0;  // the first key of the tile that comes
  const auto copy_keys = [&](int block) {
    next = keys.Start(block);
    copy(shared.k, k, next, parameters.k_length);
  };

  if (keys.count > 0) {
    copy(shared.q, rows_of(parameters.q, parameters.q_length), first_row, parameters.q_length);
    copy_keys(keys.count - 1);
  }
  OnlineSoftmax softmax[kGroups];
#pragma unroll
  for (OnlineSoftmax& group : softmax) {
    group = OnlineSoftmax(kWhich == Keys::kBiased ? 1.0f : parameters.scale);
  }
  float output[kGroups][kD / 2] = {};
#pragma unroll 1
  for (int block = keys.count - 1; block >= 0; --block) {  // only the last one can be ragged
    CopyAsyncWait<0>();
    __syncthreads();
    const int start = next;
    copy(shared.v, v, start, parameters.k_length);
    float scores[kGroups][kKeys / 2];
    ComputeScores(scores, shared.q, warp_row, shared.k);
    CopyAsyncWait<0>();
    __syncthreads();
    if (block > 0) copy_keys(block - 1);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if constexpr (kWhich == Keys::kBiased) {
        AddBias(scores[g], parameters, head, row + g * 16, start);
      }
      if (block == keys.count - 1) MaskKeys(scores[g], parameters.k_length - start);
      float correction[2];
      softmax[g].Raise(scores[g], correction);
      CorrectRows(output[g], correction);
    }
    AddOutput(output, scores, softmax, shared.v);
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    softmax[g].Finish();
    StoreTile<kD>(parameters, softmax[g], output[g], keys.count > 0, row + g * 16, head,
                  static_cast<int>(sample));
  }
}

template <int kD, class Tiling, Keys kWhich>
void Launch(const Context& context, const AttentionProblem& problem) {
  constexpr std::size_t kSharedBytes = sizeof(SharedTiles<kD, Tiling>);
  const auto kernel = TensorCoreAttentionKernel<kD, Tiling, kWhich>;
  Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "TensorCoreAttention: shared memory");
  const Parameters parameters{problem.list,
                              static_cast<const bf16*>(problem.q),
                              static_cast<const bf16*>(problem.k),
                              static_cast<const bf16*>(problem.v),
                              static_cast<bf16*>(problem.out),
                              problem.lse,
                              problem.relative_bias,
                              static_cast<int>(problem.heads),
                              static_cast<int>(problem.q_length),
                              static_cast<int>(problem.k_length),
                              problem.scale};
  const dim3 grid(static_cast<unsigned>((problem.q_length + Tiling::kRows - 1) / Tiling::kRows),
                  static_cast<unsigned>(problem.heads), static_cast<unsigned>(problem.batch));
  kernel<<<grid, Tiling::kThreads, kSharedBytes, context.stream>>>(parameters);
  CheckLaunch("TensorCoreAttention");
}

template <int kD>
void LaunchForHeadSize(const Context& context, const AttentionProblem& problem) {
  const BlockList& list = problem.list;
  if (problem.relative_bias != nullptr) {
    return Launch<kD, NarrowTiling, Keys::kBiased>(context, problem);
  }
  if (list.indices == nullptr) return Launch<kD, DenseTiling<kD>, Keys::kAll>(context, problem);
  if (!list.MadeOf(kKeyBlock)) return Launch<kD, SmallTiling, Keys::kListed>(context, problem);
  list.block_q % WideTiling::kRows == 0 ? Launch<kD, WideTiling, Keys::kListed>(context, problem)
                                        : Launch<kD, NarrowTiling, Keys::kListed>(context, problem);
}

}  // namespace

void TensorCoreAttention(const Context& context, const AttentionProblem& problem) {
  problem.head_size == 128 ? LaunchForHeadSize<128>(context, problem)
                           : LaunchForHeadSize<64>(context, problem);
}

}  // namespace slalom::cuda
