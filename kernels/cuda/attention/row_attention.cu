// Attention for whatever the tensor core kernels do not take, and the softmax of ProductAttention.
// One warp per query row: simple, right for any head size, block size and type.
#include "kernels/cuda/attention/problem.h"
#include "kernels/cuda/attention/row_softmax.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxPerLane = 16;  // head sizes up to 512

struct Parameters {
  BlockList list;
  const float* relative_bias;
  float* lse;
  std::int64_t rows;  // B * H * Lq
  int heads;
  int q_length;
  int k_length;
  int head_size;
  float scale;
};

// The running state of one row: 32 keys at a time, one per lane; the output's channels are spread
// over the lanes.
template <typename T>
struct RowState {
  const Parameters& parameters;
  const float* query;  // shared memory, head_size
  const T* k;          // this sample's and head's first row
  const T* v;
  std::int64_t stride;
  const float* bias;  // of the row's first key, or null
  float max = -INFINITY;
  float sum = 0.0f;
  float output[kMaxPerLane] = {};

  __device__ void AddKeys(int first, int count) {
    const int lane = threadIdx.x % 32;
    const int key = first + lane;
    float score = -INFINITY;
    if (lane < count) {
      const T* row = k + key * stride;
      score = 0.0f;
      for (int c = 0; c < parameters.head_size; ++c) score += query[c] * ToFloat(row[c]);
      score *= parameters.scale;
      if (bias != nullptr) score += bias[key];
    }
    const float largest = fmaxf(max, GroupMax<32>(score));
    const float correction = expf(max - largest);
    const float probability = lane < count ? expf(score - largest) : 0.0f;
    sum = sum * correction + GroupSum<32>(probability);
    max = largest;
#pragma unroll
    for (int i = 0; i < kMaxPerLane; ++i) output[i] *= correction;
    for (int j = 0; j < count; ++j) {
      const float weight = __shfl_sync(kFullWarp, probability, j);
      const T* row = v + (first + j) * stride;
#pragma unroll
      for (int i = 0; i < kMaxPerLane; ++i) {
        const int c = i * 32 + lane;
        if (c < parameters.head_size) output[i] += weight * ToFloat(row[c]);
      }
    }
  }

  __device__ void AddRange(int first, int end) {
    for (int at = first; at < end; at += 32) AddKeys(at, min(32, end - at));
  }
};

template <typename T>
__global__ void __launch_bounds__(kWarps * 32)
    RowAttentionKernel(const Parameters parameters, const T* q, const T* k, const T* v, T* out) {
  extern __shared__ float queries[];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp;
  if (index >= parameters.rows) return;  // whole warps: no barrier of the block follows
  const int row = static_cast<int>(index % parameters.q_length);
  const std::int64_t head_index = index / parameters.q_length;
  const int head = static_cast<int>(head_index % parameters.heads);
  const std::int64_t sample = head_index / parameters.heads;
  const int head_size = parameters.head_size;
  const std::int64_t stride = static_cast<std::int64_t>(parameters.heads) * head_size;
  const std::int64_t at = (sample * parameters.q_length + row) * stride + head * head_size;
  const std::int64_t kv = sample * parameters.k_length * stride + head * head_size;

  float* query = queries + warp * head_size;
  for (int c = lane; c < head_size; c += 32) query[c] = ToFloat(q[at + c]);
  __syncwarp();
  const float* bias =
      parameters.relative_bias == nullptr
          ? nullptr
          : parameters.relative_bias +
                static_cast<std::int64_t>(head) * (parameters.q_length + parameters.k_length - 1) +
                parameters.q_length - 1 - row;
  RowState<T> state{parameters, query, k + kv, v + kv, stride, bias};
  if (parameters.list.indices == nullptr) {
    state.AddRange(0, parameters.k_length);
  } else {
    const BlockList& list = parameters.list;
    const std::int64_t list_row = head_index * list.query_blocks + row / list.block_q;
    for (int i = 0; i < list.counts[list_row]; ++i) {
      const int first = list.indices[list_row * list.capacity + i] * list.block_k;
      state.AddRange(first, min(first + list.block_k, parameters.k_length));
    }
  }
  const float factor = state.sum > 0.0f ? 1.0f / state.sum : 0.0f;
#pragma unroll
  for (int i = 0; i < kMaxPerLane; ++i) {
    const int c = i * 32 + lane;
    if (c < head_size) out[at + c] = FromFloat<T>(state.output[i] * factor);
  }
  if (parameters.lse != nullptr && lane == 0) parameters.lse[index] = state.max + logf(state.sum);
}

template <typename T>
__global__ void __launch_bounds__(256) RowSoftmaxKernel(const RowSoftmaxArgs args) {
  __shared__ float shared[32];
  const std::int64_t row = blockIdx.x;
  const std::int64_t head = blockIdx.y;
  const std::int64_t query = args.first_row + row;
  const float* scores = args.scores + head * args.head_stride + row * args.row_stride;
  T* probabilities =
      static_cast<T*>(args.probabilities) + head * args.head_stride + row * args.row_stride;
  const float* bias = args.relative_bias == nullptr
                          ? nullptr
                          : args.relative_bias + head * (args.q_length + args.k_length - 1) +
                                args.q_length - 1 - query;
  const auto score = [&](std::int64_t key) {
    return scores[key] + (bias == nullptr ? 0.0f : bias[key]);
  };
  float max = -INFINITY;
  for (std::int64_t key = threadIdx.x; key < args.k_length; key += blockDim.x) {
    max = fmaxf(max, score(key));
  }
  max = BlockMax(max, shared);
  float sum = 0.0f;
  for (std::int64_t key = threadIdx.x; key < args.k_length; key += blockDim.x) {
    sum += expf(score(key) - max);
  }
  sum = BlockSum(sum, shared);
  for (std::int64_t key = threadIdx.x; key < args.k_length; key += blockDim.x) {
    probabilities[key] = FromFloat<T>(expf(score(key) - max) / sum);
  }
  if (args.lse != nullptr && threadIdx.x == 0) {
    args.lse[head * args.q_length + query] = max + logf(sum);
  }
}

template <typename T>
void Launch(const Context& context, const AttentionProblem& problem) {
  const Parameters parameters{problem.list,
                              problem.relative_bias,
                              problem.lse,
                              problem.batch * problem.heads * problem.q_length,
                              static_cast<int>(problem.heads),
                              static_cast<int>(problem.q_length),
                              static_cast<int>(problem.k_length),
                              problem.head_size,
                              problem.scale};
  const auto blocks = static_cast<unsigned>((parameters.rows + kWarps - 1) / kWarps);
  const std::size_t shared_bytes = kWarps * sizeof(float) * problem.head_size;
  RowAttentionKernel<<<blocks, kWarps * 32, shared_bytes, context.stream>>>(
      parameters, static_cast<const T*>(problem.q), static_cast<const T*>(problem.k),
      static_cast<const T*>(problem.v), static_cast<T*>(problem.out));
  CheckLaunch("RowAttention");
}

}  // namespace

void RowAttention(const Context& context, const AttentionProblem& problem) {
  Require(problem.head_size <= 32 * kMaxPerLane, "Attention: heads have at most 512 channels");
  problem.dtype == DType::kBF16 ? Launch<bf16>(context, problem) : Launch<float>(context, problem);
}

void RowSoftmax(const Context& context, const RowSoftmaxArgs& args) {
  const dim3 grid(static_cast<unsigned>(args.rows), static_cast<unsigned>(args.heads));
  if (args.type == DType::kBF16) {
    RowSoftmaxKernel<bf16><<<grid, 256, 0, context.stream>>>(args);
  } else {
    RowSoftmaxKernel<float><<<grid, 256, 0, context.stream>>>(args);
  }
  CheckLaunch("RowSoftmax");
}

}  // namespace slalom::cuda
