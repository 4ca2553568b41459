// The frame of every operation that normalises rows: read a row once, keep it in registers, reduce,
// write it once. An Op says what to read, what to divide by and what to write.
//
//   struct Op {
//     static constexpr bool kCentred;   // subtract the mean before squares are summed
//     static constexpr int kNarrow;     // elements per access when rows do not fit vectors of 8
//     int columns;
//     const In* x;                      // [rows, columns]
//     struct Row;                       // what of a row every access of a thread needs
//     Row BeginRow(int64_t row, int lane, int step) const;  // columns: lane * 8 + i * step
//     float Factor(float squares) const;  // from the sum of (centred) squares
//     template <int kWidth>
//     void Store(const Row&, int64_t row, int column, const float* values, float mean,
//                float factor) const;
//   };
//
// A thread stores only what it loaded itself, so an Op may write over its input.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/check.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {

inline constexpr int kRowThreads = 256;

// What an Op's x points to.
template <class Op>
using RowElement = std::remove_const_t<std::remove_pointer_t<decltype(Op::x)>>;
// For an Op that needs nothing.
struct NoRow {};

// A row belongs to kLanes neighbouring lanes of a warp, or to the whole block when kLanes is 0. All
// of it is loaded before anything waits for a load. kFull: lanes and vectors cover a row exactly.
template <class Op, int kLanes, int kVectors, bool kFull>
__global__ void __launch_bounds__(kRowThreads) RowKernel(Op op, std::int64_t rows) {
  __shared__ float shared[32];
  const int lanes = kLanes == 0 ? static_cast<int>(blockDim.x) : kLanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const std::int64_t wanted =
      static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
  const std::int64_t row = wanted < rows ? wanted : rows - 1;  // all lanes take part in shuffles
  const auto sum = [&](float value) {
    if constexpr (kLanes == 0) {
      return BlockSum(value, shared);
    } else {
      return GroupSum<kLanes>(value);
    }
  };
  const auto column = [&](int i) { return (i * lanes + lane) * 8; };
  const auto mine = [&](int i) { return kFull || column(i) < op.columns; };

  Packed8<RowElement<Op>> packed[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (mine(i)) packed[i].Load(op.x + row * op.columns + column(i));
  }
  const typename Op::Row begun = op.BeginRow(row, lane, lanes * 8);

  float values[8];
  float mean = 0.0f;
  if constexpr (Op::kCentred) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!mine(i)) continue;
      packed[i].Unpack(values);
#pragma unroll
      for (int j = 0; j < 8; ++j) mean += values[j];
    }
    mean = sum(mean) / static_cast<float>(op.columns);
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!mine(i)) continue;
    packed[i].Unpack(values);
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += (values[j] - mean) * (values[j] - mean);
  }
  const float factor = op.Factor(sum(squares));
  if (wanted >= rows) return;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!mine(i)) continue;
    packed[i].Unpack(values);
    op.template Store<8>(begun, row, column(i), values, mean, factor);
  }
}

// Any number of columns and any alignment: one block per row, which it reads up to three times.
template <class Op>
__global__ void __launch_bounds__(kRowThreads) NarrowRowKernel(Op op) {
  __shared__ float shared[32];
  constexpr int kWidth = Op::kNarrow;
  const std::int64_t row = blockIdx.x;
  const auto* x = op.x + row * op.columns;
  const int first = static_cast<int>(threadIdx.x) * kWidth;
  const int step = static_cast<int>(blockDim.x) * kWidth;
  const typename Op::Row begun = op.BeginRow(row, 0, 0);
  float values[kWidth];
  float mean = 0.0f;
  if constexpr (Op::kCentred) {
    for (int column = first; column < op.columns; column += step) {
      LoadFloats<kWidth>(x + column, values);
      for (int j = 0; j < kWidth; ++j) mean += values[j];
    }
    mean = BlockSum(mean, shared) / static_cast<float>(op.columns);
  }
  float squares = 0.0f;
  for (int column = first; column < op.columns; column += step) {
    LoadFloats<kWidth>(x + column, values);
    for (int j = 0; j < kWidth; ++j) squares += (values[j] - mean) * (values[j] - mean);
  }
  const float factor = op.Factor(BlockSum(squares, shared));
  for (int column = first; column < op.columns; column += step) {
    LoadFloats<kWidth>(x + column, values);
    op.template Store<kWidth>(begun, row, column, values, mean, factor);
  }
}

template <class Op, int kLanes, int kVectors, bool kFull = false>
void LaunchRows(const Op& op, std::int64_t rows, int threads, cudaStream_t stream) {
  const int rows_per_block = kLanes == 0 ? 1 : threads / kLanes;
  const auto blocks = static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block);
  RowKernel<Op, kLanes, kVectors, kFull><<<blocks, threads, 0, stream>>>(op, rows);
}

// `vectors` says that every access of 8 elements is aligned; then rows of up to 8192 columns stay
// in registers.
template <class Op>
void RunRows(const Op& op, std::int64_t rows, bool vectors, cudaStream_t stream,
             const char* kernel) {
  if (rows == 0) return;
  Require(rows < (std::int64_t{1} << 31), "a row operation has at most 2^31 - 1 rows");
  const int chunks = op.columns / 8;
  const auto whole_warps = [](int threads) { return (threads + 31) / 32 * 32; };
  if (!vectors || op.columns % 8 != 0 || chunks > 4 * kRowThreads) {
    NarrowRowKernel<Op><<<static_cast<unsigned>(rows), kRowThreads, 0, stream>>>(op);
  } else if (chunks == 12) {  // 96 channels and their multiples: no lane is idle
    LaunchRows<Op, 4, 3, true>(op, rows, kRowThreads, stream);
  } else if (chunks == 24) {
    LaunchRows<Op, 8, 3, true>(op, rows, kRowThreads, stream);
  } else if (chunks == 48) {
    LaunchRows<Op, 16, 3, true>(op, rows, kRowThreads, stream);
  } else if (chunks <= 16) {
    LaunchRows<Op, 16, 1>(op, rows, kRowThreads, stream);
  } else if (chunks <= 64) {
    LaunchRows<Op, 32, 2>(op, rows, kRowThreads, stream);
  } else if (chunks == 192) {  // the width of Wan 1.3B: a warp's own row needs no barrier
    LaunchRows<Op, 32, 6, true>(op, rows, kRowThreads, stream);
  } else if (chunks <= kRowThreads) {
    LaunchRows<Op, 0, 1>(op, rows, whole_warps(chunks), stream);
  } else {
    LaunchRows<Op, 0, 4>(op, rows, whole_warps((chunks + 3) / 4), stream);
  }
  CheckLaunch(kernel);
}

// True when all of these may be read 16 bytes at a time.
template <class... Pointers>
bool Aligned16(Pointers... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace slalom::cuda
