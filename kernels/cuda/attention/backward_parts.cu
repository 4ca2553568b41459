// Small kernels that the gradients of both attentions share.
#include <algorithm>

#include "kernels/cuda/attention/backward.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMostSumBlocks = 512;

unsigned Blocks(std::int64_t items, std::int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// A thread per key block: neighbouring threads read neighbouring classes.
__global__ void __launch_bounds__(kThreads)
    QueryListKernel(const std::uint8_t* classes, std::int64_t columns, int query_blocks,
                    int key_blocks, std::int32_t* indices, std::int32_t* counts) {
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  const std::int64_t head = column / key_blocks;
  const std::uint8_t* own = classes + head * query_blocks * key_blocks + column % key_blocks;
  std::int32_t* list = indices + column * query_blocks;
  int count = 0;
#pragma unroll 8
  for (int i = 0; i < query_blocks; ++i) {
    const auto c = static_cast<BlockClass>(own[static_cast<std::int64_t>(i) * key_blocks]);
    if (c == BlockClass::kCritical) list[count++] = i;
  }
  counts[column] = count;
}

template <typename T>
struct DeltaParameters {
  const T* out;
  const T* d_out;
  const float* bias;
  const T* projected;
  const float* gates;
  const float* linear_delta;
  TokenGrid grid;
  std::int64_t length;
  std::int64_t rows;  // B * H * L
  int heads;
  int head_size;
  float* delta;
};

// One warp per row, in the order of delta.
template <typename T>
__global__ void __launch_bounds__(kThreads) DeltaKernel(const DeltaParameters<T> p) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const std::int64_t position = row % p.length;
  const int head = static_cast<int>(row / p.length % p.heads);
  const std::int64_t sample = row / p.length / p.heads;
  std::int64_t token = position;
  if (p.grid.frames > 0 && head >= p.heads / 2) {
    token = position % p.grid.frames * (p.grid.height * p.grid.width) + position / p.grid.frames;
  }
  const std::int64_t at = ((sample * p.length + token) * p.heads + head) * p.head_size;
  const float gate = p.projected != nullptr ? p.gates[sample * p.length + token] : 0.0f;
  float sum = 0.0f;
  for (int c = 2 * (threadIdx.x % 32); c < p.head_size; c += 64) {
    float out[2], slope[2];
    LoadFloats<2>(p.out + at + c, out);
    LoadFloats<2>(p.d_out + at + c, slope);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (p.bias != nullptr) out[i] -= p.bias[c + i];
      if (p.projected != nullptr) out[i] -= gate * ToFloat(p.projected[at + c + i]);
      sum += out[i] * slope[i];
    }
  }
  sum = GroupSum<32>(sum);
  if (threadIdx.x % 32 == 0) {
    p.delta[row] = p.linear_delta != nullptr ? sum - p.linear_delta[row] : sum;
  }
}

// partial [blocks, columns]: each block of threads has a range of rows. Grid (columns / kThreads,
// blocks).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    SumColumnsKernel(const T* x, const float* weights, std::int64_t rows, std::int64_t columns,
                     std::int64_t rows_each, float* partial) {
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  const std::int64_t first = blockIdx.y * rows_each;
  const std::int64_t end = min(first + rows_each, rows);
  float sum = 0.0f;
#pragma unroll 4
  for (std::int64_t r = first; r < end; ++r) {
    const float value = ToFloat(x[r * columns + column]);
    sum += weights != nullptr ? weights[r] * value : value;
  }
  partial[blockIdx.y * columns + column] = sum;
}

template <typename T>
void RunDelta(const Context& context, const DeltaArgs& args) {
  const auto floats = [](const Tensor& x) { return x.defined() ? x.data<float>() : nullptr; };
  const std::int64_t rows = args.delta.NumElements();
  const DeltaParameters<T> parameters{args.out.data<T>(),
                                      args.d_out.data<T>(),
                                      floats(args.bias),
                                      args.projected.defined() ? args.projected.data<T>() : nullptr,
                                      floats(args.gates),
                                      floats(args.linear_delta),
                                      args.grid,
                                      args.delta.dim(2),
                                      rows,
                                      static_cast<int>(args.delta.dim(1)),
                                      static_cast<int>(args.out.NumElements() / rows),
                                      args.delta.data<float>()};
  DeltaKernel<T><<<Blocks(rows, kWarps), kThreads, 0, context.stream>>>(parameters);
  CheckLaunch("attention backward: delta");
}

template <typename T>
void RunSumColumns(const Context& context, const Tensor& x, const Tensor& weights,
                   const Tensor& out) {
  const std::int64_t columns = out.NumElements(), rows = x.NumElements() / columns;
  const std::int64_t wanted = std::min<std::int64_t>(kMostSumBlocks, (rows + 31) / 32);
  const std::int64_t rows_each = (rows + wanted - 1) / wanted;
  const std::int64_t blocks = (rows + rows_each - 1) / rows_each;
  const Tensor partial = context.Allocate({blocks, columns}, DType::kF32);
  const dim3 grid(Blocks(columns, kThreads), static_cast<unsigned>(blocks));
  SumColumnsKernel<T><<<grid, kThreads, 0, context.stream>>>(
      x.data<T>(), weights.defined() ? weights.data<float>() : nullptr, rows, columns, rows_each,
      partial.data<float>());
  SumColumnsKernel<float><<<dim3(Blocks(columns, kThreads), 1), kThreads, 0, context.stream>>>(
      partial.data<float>(), nullptr, blocks, columns, blocks, out.data<float>());
  CheckLaunch("attention backward: sums of columns");
}

}  // namespace

QueryLists MakeQueryLists(const Context& context, const BlockMap& map) {
  const std::int64_t nq = map.classes.dim(2), nk = map.classes.dim(3);
  QueryLists lists;
  lists.indices = context.Allocate({map.classes.dim(0), map.classes.dim(1), nk, nq}, DType::kI32);
  lists.counts = context.Allocate({map.classes.dim(0), map.classes.dim(1), nk}, DType::kI32);
  const std::int64_t columns = lists.counts.NumElements();
  QueryListKernel<<<Blocks(columns, kThreads), kThreads, 0, context.stream>>>(
      map.classes.data<std::uint8_t>(), columns, static_cast<int>(nq), static_cast<int>(nk),
      lists.indices.data<std::int32_t>(), lists.counts.data<std::int32_t>());
  CheckLaunch("attention backward: lists of query blocks");
  lists.list = {lists.indices.data<std::int32_t>(),
                lists.counts.data<std::int32_t>(),
                nk,
                nq,
                map.block_k,
                map.block_q};
  return lists;
}

void SparseDelta(const Context& context, const DeltaArgs& args) {
  args.out.dtype() == DType::kBF16 ? RunDelta<bf16>(context, args) : RunDelta<float>(context, args);
}

void SumColumns(const Context& context, const Tensor& x, const Tensor& weights, const Tensor& out) {
  x.dtype() == DType::kBF16 ? RunSumColumns<bf16>(context, x, weights, out)
                            : RunSumColumns<float>(context, x, weights, out);
}

}  // namespace slalom::cuda
