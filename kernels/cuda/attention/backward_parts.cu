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

// A block of threads has kColumns key blocks of one head, and brings their classes kListRows query
// blocks at a time; a warp makes the lists of a few columns, 32 query blocks at once. Grid (groups
// of columns, heads).
constexpr int kColumns = 32;
constexpr int kListRows = 256;
__global__ void __launch_bounds__(kThreads)
    QueryListKernel(const std::uint8_t* classes, int query_blocks, int key_blocks,
                    std::int32_t* indices, std::int32_t* counts) {
  __shared__ std::uint8_t tile[kListRows][kColumns + 4];  // rows start in different banks
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int first = blockIdx.x * kColumns;
  const std::int64_t head = blockIdx.y;
  int count[kColumns / kWarps] = {};
  for (int begin = 0; begin < query_blocks; begin += kListRows) {
    const int rows = min(kListRows, query_blocks - begin);
    const std::uint8_t* own = classes + (head * query_blocks + begin) * key_blocks + first + lane;
    for (int row = warp; row < rows; row += kWarps) {
      tile[row][lane] = first + lane < key_blocks ? own[std::int64_t{row} * key_blocks] : 0;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kColumns / kWarps; ++i) {
      const int column = warp + i * kWarps;
      if (first + column >= key_blocks) break;
      std::int32_t* list = indices + (head * key_blocks + first + column) * query_blocks;
      for (int row = lane; row - lane < rows; row += 32) {
        const bool critical =
            row < rows && static_cast<BlockClass>(tile[row][column]) == BlockClass::kCritical;
        const unsigned all = __ballot_sync(~0u, critical);
        if (critical) list[count[i] + __popc(all & ((1u << lane) - 1))] = begin + row;
        count[i] += __popc(all);
      }
    }
    __syncthreads();  // the tile is free
  }
#pragma unroll
  for (int i = 0; i < kColumns / kWarps; ++i) {
    const int column = first + warp + i * kWarps;
    if (lane == 0 && column < key_blocks) counts[head * key_blocks + column] = count[i];
  }
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

// A group of kGroup lanes per row, in the order of memory.
constexpr int kGroup = 16;
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) DeltaKernel(const DeltaParameters<T> p) {
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup;
  if (row - threadIdx.x % 32 / kGroup >= p.rows) return;  // the whole warp
  const std::int64_t token = row / p.heads;               // of all samples
  const int head = static_cast<int>(row % p.heads);
  const bool there = row < p.rows;
  const float gate = there && p.projected != nullptr ? p.gates[token] : 0.0f;
  float sum = 0.0f;
  for (int c = kWidth * (threadIdx.x % kGroup); there && c < p.head_size; c += kWidth * kGroup) {
    const std::int64_t at = row * p.head_size + c;
    float out[kWidth], slope[kWidth];
    LoadFloats<kWidth>(p.out + at, out);
    LoadFloats<kWidth>(p.d_out + at, slope);
    if (p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out[i] -= p.bias[c + i];
    }
    if (p.projected != nullptr) {
      float projected[kWidth];
      LoadFloats<kWidth>(p.projected + at, projected);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out[i] -= gate * projected[i];
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += out[i] * slope[i];
  }
  sum = GroupSum<kGroup>(sum);
  if (!there || threadIdx.x % kGroup != 0) return;
  const std::int64_t sample = token / p.length;
  std::int64_t position = token % p.length;
  if (p.grid.frames > 0 && head >= p.heads / 2) {
    const std::int64_t plane = p.grid.height * p.grid.width;
    position = position % plane * p.grid.frames + position / plane;
  }
  const std::int64_t at = (sample * p.heads + head) * p.length + position;
  p.delta[at] = p.linear_delta != nullptr ? sum - p.linear_delta[at] : sum;
}

// partial [blocks, columns]: each block of threads has a range of rows, of which it takes as many
// at once as it has threads for. A thread has kWidth neighbouring columns, `lanes` threads a row.
// Grid (groups of columns, blocks).
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    SumColumnsKernel(const T* x, const float* weights, std::int64_t rows, std::int64_t columns,
                     std::int64_t rows_each, int lanes, float* partial) {
  __shared__ float sums[kThreads * kWidth];
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int own = static_cast<int>(threadIdx.x) / lanes;
  const int at_once = kThreads / lanes;
  const std::int64_t column = (std::int64_t{blockIdx.x} * lanes + lane) * kWidth;
  const std::int64_t end = min((blockIdx.y + 1) * rows_each, rows);
  float sum[kWidth] = {};
  if (column < columns && own < at_once) {
#pragma unroll 4
    for (std::int64_t r = blockIdx.y * rows_each + own; r < end; r += at_once) {
      float values[kWidth];
      LoadFloats<kWidth>(x + r * columns + column, values);
      const float weight = weights != nullptr ? weights[r] : 1.0f;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] += weight * values[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sums[threadIdx.x * kWidth + i] = sum[i];
  __syncthreads();
  const int width = lanes * kWidth;  // of the block
  for (int c = threadIdx.x; c < width; c += kThreads) {
    const std::int64_t at = std::int64_t{blockIdx.x} * width + c;
    if (at >= columns) break;
    float total = 0.0f;
    for (int r = 0; r < at_once; ++r) total += sums[r * width + c];
    partial[blockIdx.y * columns + at] = total;
  }
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
  bool wide = parameters.head_size % 8 == 0;
  for (const Tensor* x : {&args.out, &args.d_out, &args.projected}) {
    wide = wide && (!x->defined() || reinterpret_cast<std::uintptr_t>(x->raw()) % 16 == 0);
  }
  const auto kernel = wide ? DeltaKernel<T, 8> : DeltaKernel<T, 1>;
  kernel<<<Blocks(rows, kThreads / kGroup), kThreads, 0, context.stream>>>(parameters);
  CheckLaunch("attention backward: delta");
}

template <typename T>
void LaunchSumColumns(const Context& context, const T* x, const float* weights, std::int64_t rows,
                      std::int64_t columns, std::int64_t rows_each, float* out) {
  const bool wide = columns % 8 == 0 && reinterpret_cast<std::uintptr_t>(x) % 16 == 0;
  const std::int64_t lanes = std::min<std::int64_t>(wide ? columns / 8 : columns, kThreads);
  const dim3 grid(Blocks(columns, lanes * (wide ? 8 : 1)), Blocks(rows, rows_each));
  const auto kernel = wide ? SumColumnsKernel<T, 8> : SumColumnsKernel<T, 1>;
  kernel<<<grid, kThreads, 0, context.stream>>>(x, weights, rows, columns, rows_each,
                                                static_cast<int>(lanes), out);
  CheckLaunch("attention backward: sums of columns");
}

template <typename T>
void RunSumColumns(const Context& context, const Tensor& x, const Tensor& weights,
                   const Tensor& out) {
  const std::int64_t columns = out.NumElements(), rows = x.NumElements() / columns;
  const std::int64_t wanted = std::min<std::int64_t>(kMostSumBlocks, (rows + 31) / 32);
  const std::int64_t rows_each = (rows + wanted - 1) / wanted;
  const std::int64_t blocks = (rows + rows_each - 1) / rows_each;
  const Tensor partial = context.Allocate({blocks, columns}, DType::kF32);
  LaunchSumColumns(context, x.data<T>(), weights.defined() ? weights.data<float>() : nullptr, rows,
                   columns, rows_each, partial.data<float>());
  LaunchSumColumns<float>(context, partial.data<float>(), nullptr, blocks, columns, blocks,
                          out.data<float>());
}

}  // namespace

QueryLists MakeQueryLists(const Context& context, const BlockMap& map) {
  const std::int64_t nq = map.classes.dim(2), nk = map.classes.dim(3);
  QueryLists lists;
  lists.indices = context.Allocate({map.classes.dim(0), map.classes.dim(1), nk, nq}, DType::kI32);
  lists.counts = context.Allocate({map.classes.dim(0), map.classes.dim(1), nk}, DType::kI32);
  const dim3 grid(Blocks(nk, kColumns),
                  static_cast<unsigned>(map.classes.dim(0) * map.classes.dim(1)));
  QueryListKernel<<<grid, kThreads, 0, context.stream>>>(
      map.classes.data<std::uint8_t>(), static_cast<int>(nq), static_cast<int>(nk),
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
