// Softmax attention for sm_80 and newer, with mma.sync (after FlashAttention-2, arXiv 2307.08691):
// a warp owns 16 query rows, keeps Q, the scores and the output in registers, and walks along the
// key blocks, which cp.async brings one ahead. Lists of blocks of 16 or 32 are walked along in
// units of 16 keys, by blocks of one warp: each has a list of its own.
#include "kernels/cuda/attention/key_blocks.cuh"
#include "kernels/cuda/attention/mma_tiles.cuh"
#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/attention/problem.h"
#include "kernels/cuda/check.h"

namespace slalom::cuda {
namespace {

constexpr int kRowsPerWarp = 16;

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

template <int kD, int kKeys>
struct alignas(128) SharedTiles {
  bf16 k[2][kKeys][kD];
  bf16 v[2][kKeys][kD];
};

// A thread has kKeys / 2 scores.
template <int kD, int kKeys>
__device__ void ComputeScores(float (&scores)[kKeys / 2], const std::uint32_t (&q)[kD / 16][4],
                              const bf16 (&k)[kKeys][kD]) {
  const auto base = static_cast<std::uint32_t>(__cvta_generic_to_shared(&k));
  const int lane = threadIdx.x % 32;
  const int row = lane / 16 * 8 + lane % 8;
  const int half = lane / 8 % 2;
#pragma unroll
  for (int pair = 0; pair < kKeys / 16; ++pair) {
    float sums[2][4] = {};
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      std::uint32_t keys[4];
      LoadMatrices(keys, base + SwizzledOffset<kD / 8>(pair * 16 + row, step * 2 + half));
      Mma16x8x16(sums[0], q[step], keys[0], keys[1]);
      Mma16x8x16(sums[1], q[step], keys[2], keys[3]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[pair * 8 + i] = sums[i / 4][i % 4];
  }
}

template <int kD, int kKeys>
__device__ void AddOutput(float (&output)[kD / 2],
                          const std::uint32_t (&probabilities)[kKeys / 16][4],
                          const bf16 (&v)[kKeys][kD]) {
  const auto base = static_cast<std::uint32_t>(__cvta_generic_to_shared(&v));
  const int lane = threadIdx.x % 32;
  const int row = lane % 16;
  const int half = lane / 16;
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
#pragma unroll
    for (int pair = 0; pair < kD / 16; ++pair) {
      std::uint32_t values[4];
      LoadMatricesTransposed(values,
                             base + SwizzledOffset<kD / 8>(step * 16 + row, pair * 2 + half));
      float(&first)[4] = *reinterpret_cast<float(*)[4]>(&output[pair * 8]);
      float(&second)[4] = *reinterpret_cast<float(*)[4]>(&output[pair * 8 + 4]);
      Mma16x8x16(first, probabilities[step], values[0], values[1]);
      Mma16x8x16(second, probabilities[step], values[2], values[3]);
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

template <int kD, int kWarps, int kKeys, bool kBias>
__global__ void __launch_bounds__(kWarps * 32, kD == 64 ? 12 / kWarps : 8 / kWarps)
    TensorCoreAttentionKernel(const Parameters parameters) {
  extern __shared__ std::byte dynamic_shared[];
  auto& shared = *reinterpret_cast<SharedTiles<kD, kKeys>*>(dynamic_shared);
  constexpr int kThreads = kWarps * 32;
  const int first_row = blockIdx.x * kWarps * kRowsPerWarp;
  const int head = blockIdx.y;
  const int sample = blockIdx.z;
  const int lane = threadIdx.x % 32;
  const int row = first_row + static_cast<int>(threadIdx.x) / 32 * kRowsPerWarp + lane / 4;
  const auto keys = KeyBlocksOfTile<kKeys>(
      parameters.list, parameters.k_length,
      static_cast<std::int64_t>(sample) * parameters.heads + head, first_row);
  const std::int64_t stride = static_cast<std::int64_t>(parameters.heads) * kD;
  const std::int64_t kv_start =
      static_cast<std::int64_t>(sample) * parameters.k_length * stride + head * kD;
  const auto copy = [&](int block) {
    const int start = keys.Start(block);
    const std::int64_t offset = kv_start + start * stride;
    CopyTile<kD, kThreads>(shared.k[block % 2], parameters.k + offset, stride,
                           parameters.k_length - start);
    CopyTile<kD, kThreads>(shared.v[block % 2], parameters.v + offset, stride,
                           parameters.k_length - start);
  };

  std::uint32_t q[kD / 16][4];
  LoadRowFragments<kD>(
      q,
      parameters.q + static_cast<std::int64_t>(sample) * parameters.q_length * stride + head * kD,
      stride, row, parameters.q_length);
  OnlineSoftmax softmax(kBias ? 1.0f : parameters.scale);
  float output[kD / 2] = {};
  if (keys.count > 0) copy(keys.count - 1);
  CopyAsyncCommit();
#pragma unroll 1
  for (int block = keys.count - 1; block >= 0; --block) {
    if (block > 0) copy(block - 1);
    CopyAsyncCommit();
    CopyAsyncWait<1>();
    __syncthreads();
    float scores[kKeys / 2];
    ComputeScores<kD>(scores, q, shared.k[block % 2]);
    if constexpr (kBias) AddBias(scores, parameters, head, row, keys.Start(block));
    if (block == keys.count - 1) MaskKeys(scores, keys.Keys(block));
    float correction[2];
    softmax.Update(scores, correction);
    CorrectRows(output, correction);
    std::uint32_t probabilities[kKeys / 16][4];
    PackProbabilities(scores, probabilities);
    AddOutput<kD>(output, probabilities, shared.v[block % 2]);
    __syncthreads();
  }
  softmax.Finish();
  StoreTile<kD>(parameters, softmax, output, keys.count > 0, row, head, sample);
}

template <int kD, int kWarps, int kKeys, bool kBias>
void Launch(const Context& context, const AttentionProblem& problem) {
  constexpr std::size_t kSharedBytes = sizeof(SharedTiles<kD, kKeys>);
  const auto kernel = TensorCoreAttentionKernel<kD, kWarps, kKeys, kBias>;
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
  constexpr int kRows = kWarps * kRowsPerWarp;
  const dim3 grid(static_cast<unsigned>((problem.q_length + kRows - 1) / kRows),
                  static_cast<unsigned>(problem.heads), static_cast<unsigned>(problem.batch));
  kernel<<<grid, kWarps * 32, kSharedBytes, context.stream>>>(parameters);
  CheckLaunch("TensorCoreAttention");
}

template <int kD>
void LaunchForHeadSize(const Context& context, const AttentionProblem& problem) {
  const BlockList& list = problem.list;
  if (problem.relative_bias != nullptr) return Launch<kD, 4, kKeyBlock, true>(context, problem);
  if (list.indices == nullptr) return Launch<kD, 8, kKeyBlock, false>(context, problem);
  if (!list.MadeOf(kKeyBlock)) return Launch<kD, 1, kSmallKeyBlock, false>(context, problem);
  list.block_q % 128 == 0 ? Launch<kD, 8, kKeyBlock, false>(context, problem)
                          : Launch<kD, 4, kKeyBlock, false>(context, problem);
}

}  // namespace

void TensorCoreAttention(const Context& context, const AttentionProblem& problem) {
  problem.head_size == 128 ? LaunchForHeadSize<128>(context, problem)
                           : LaunchForHeadSize<64>(context, problem);
}

}  // namespace slalom::cuda
