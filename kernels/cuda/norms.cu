// LayerNorm with modulation, RMSNorm, the q/k norm with rotation, and the decoder's channel norm.
#include "kernels/cuda/attention/block_map.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/row_kernel.cuh"

namespace slalom::cuda {
namespace {

template <typename In, typename Out>
struct LayerNormOp {
  static constexpr bool kCentred = true;
  static constexpr int kNarrow = 1;
  int columns;
  std::int64_t rows_per_sample;
  float eps;
  const In* x;          // [B * L, columns]
  const float* weight;  // [columns] or null
  const float* bias;
  const float* scale;  // [B, columns] or null
  const float* shift;
  Out* out;

  using Row = NoRow;
  __device__ Row BeginRow(std::int64_t, int, int) const { return {}; }
  __device__ float Factor(float squares) const {
    return 1.0f / sqrtf(squares / static_cast<float>(columns) + eps);
  }
  template <int kWidth>
  __device__ void Store(const Row&, std::int64_t row, int column, const float* values, float mean,
                        float factor) const {
    float y[kWidth], a[kWidth], b[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) y[j] = (values[j] - mean) * factor;
    if (weight != nullptr) {
      LoadConstants<kWidth>(weight + column, a);
      LoadConstants<kWidth>(bias + column, b);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) y[j] = y[j] * a[j] + b[j];
    }
    if (scale != nullptr) {
      const unsigned sample = static_cast<unsigned>(row) / static_cast<unsigned>(rows_per_sample);
      LoadConstants<kWidth>(scale + std::int64_t{sample} * columns + column, a);
      LoadConstants<kWidth>(shift + std::int64_t{sample} * columns + column, b);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) y[j] = y[j] * (1.0f + a[j]) + b[j];
    }
    StoreFloats<kWidth>(out + row * columns + column, y);
  }
};

template <typename In, typename Out>
struct RmsNormOp {
  static constexpr bool kCentred = false;
  static constexpr int kNarrow = 1;
  int columns;
  float eps;
  const In* x;
  const float* weight;
  Out* out;

  using Row = NoRow;
  __device__ Row BeginRow(std::int64_t, int, int) const { return {}; }
  __device__ float Factor(float squares) const {
    return 1.0f / sqrtf(squares / static_cast<float>(columns) + eps);
  }
  template <int kWidth>
  __device__ void Store(const Row&, std::int64_t row, int column, const float* values, float,
                        float factor) const {
    float y[kWidth], w[kWidth];
    LoadConstants<kWidth>(weight + column, w);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) y[j] = values[j] * factor * w[j];
    StoreFloats<kWidth>(out + row * columns + column, y);
  }
};

template <typename T>
struct QkNormRopeOp {
  static constexpr bool kCentred = false;
  static constexpr int kNarrow = 2;  // a rotation needs both of its channels
  int columns;
  int head_size;
  std::int64_t length;
  float eps;
  bool relu;
  const T* x;           // [B * L, H * D]
  const float* weight;  // [H * D] or null: then rows are not normalised
  const float* cos;     // [L, D / 2] or null
  const float* sin;
  T* out;

  // A step of whole heads brings a thread to the same channels of another head each time, so that
  // it needs four angles for all of its row.
  struct Row {
    float cos[4];
    float sin[4];
    bool kept;
  };
  __device__ Row BeginRow(std::int64_t row, int lane, int step) const {
    Row begun;
    begun.kept = cos != nullptr && step > 0 && step % head_size == 0;
    if (begun.kept) {
      const std::int64_t first = FirstAngle(row, lane * 8);
      LoadConstants<4>(cos + first, begun.cos);
      LoadConstants<4>(sin + first, begun.sin);
    }
    return begun;
  }
  __device__ std::int64_t FirstAngle(std::int64_t row, int column) const {
    const unsigned token = static_cast<unsigned>(row) % static_cast<unsigned>(length);
    return std::int64_t{token} * (head_size / 2) + column % head_size / 2;
  }
  __device__ float Factor(float squares) const {
    return weight == nullptr ? 1.0f : 1.0f / sqrtf(squares / static_cast<float>(columns) + eps);
  }
  // y = the results of `values`.
  template <int kWidth>
  __device__ void Map(const Row& begun, std::int64_t row, int column, const float* values,
                      float factor, float* y) const {
    if (weight != nullptr) {
      LoadConstants<kWidth>(weight + column, y);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) y[j] *= values[j] * factor;
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) y[j] = values[j];
    }
    if (relu) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) y[j] = fmaxf(y[j], 0.0f);
    }
    if (cos != nullptr) {
      float c[kWidth / 2], s[kWidth / 2];
      if (begun.kept) {
#pragma unroll
        for (int j = 0; j < kWidth / 2; ++j) c[j] = begun.cos[j], s[j] = begun.sin[j];
      } else {
        const std::int64_t first = FirstAngle(row, column);
        LoadConstants<kWidth / 2>(cos + first, c);
        LoadConstants<kWidth / 2>(sin + first, s);
      }
#pragma unroll
      for (int j = 0; j < kWidth; j += 2) {
        const float even = y[j] * c[j / 2] - y[j + 1] * s[j / 2];
        y[j + 1] = y[j + 1] * c[j / 2] + y[j] * s[j / 2];
        y[j] = even;
      }
    }
  }
  template <int kWidth>
  __device__ void Store(const Row& begun, std::int64_t row, int column, const float* values, float,
                        float factor) const {
    float y[kWidth];
    Map<kWidth>(begun, row, column, values, factor, y);
    StoreFloats<kWidth>(out + row * columns + column, y);
  }
};

constexpr int kPoolWarps = kRowThreads / 32;
constexpr int kPoolVectors = 6;  // of 8 columns, for each lane: the width of Wan 1.3B
constexpr int kPoolColumns = kPoolVectors * 32 * 8;

// The same for the rows of a block, a warp for each, and the means of what is stored, in the order
// of PoolBlocks. Grid (blocks, samples).
__global__ void __launch_bounds__(kRowThreads, 2)
    PooledQkKernel(const QkNormRopeOp<bf16> op, int block, float* means) {
  __shared__ __align__(16) float partial[kPoolWarps][kPoolColumns];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * block;
  const int count = static_cast<int>(min(std::int64_t{block}, op.length - first));
  const std::int64_t start = blockIdx.y * op.length + first;  // of all samples' rows
  const auto column = [&](int i) { return (i * 32 + lane) * 8; };
  Packed8<bf16> next[kPoolVectors];
  const auto load = [&](int row) {
#pragma unroll
    for (int i = 0; i < kPoolVectors; ++i) {
      if (row < count && column(i) < op.columns) {
        next[i].Load(op.x + (start + row) * op.columns + column(i));
      }
    }
  };
  float sums[kPoolVectors][8] = {};
  load(warp);
#pragma unroll 1
  for (int r = warp; r < count; r += kPoolWarps) {
    const std::int64_t row = start + r;
    const QkNormRopeOp<bf16>::Row begun = op.BeginRow(row, lane, 32 * 8);
    Packed8<bf16> packed[kPoolVectors];
#pragma unroll
    for (int i = 0; i < kPoolVectors; ++i) packed[i] = next[i];
    load(r + kPoolWarps);
    float values[8], squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kPoolVectors; ++i) {
      if (column(i) >= op.columns) continue;
      packed[i].Unpack(values);
#pragma unroll
      for (int j = 0; j < 8; ++j) squares += values[j] * values[j];
    }
    const float factor = op.Factor(GroupSum<32>(squares));
#pragma unroll
    for (int i = 0; i < kPoolVectors; ++i) {
      if (column(i) >= op.columns) continue;
      float y[8];
      packed[i].Unpack(values);
      op.Map<8>(begun, row, column(i), values, factor, y);
      StoreFloats<8>(op.out + row * op.columns + column(i), y);
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[i][j] += ToFloat(FromFloat<bf16>(y[j]));
    }
  }
#pragma unroll
  for (int i = 0; i < kPoolVectors; ++i) StoreFloats<8>(&partial[warp][column(i)], sums[i]);
  __syncthreads();
  means += (static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * op.columns;
  for (int c = threadIdx.x; c < op.columns; c += kRowThreads) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kPoolWarps; ++i) total += partial[i][c];
    means[c] = total / static_cast<float>(count);
  }
}

template <typename T>
struct ChannelNormOp {
  static constexpr bool kCentred = false;
  static constexpr int kNarrow = 1;
  int columns;
  bool silu;
  const T* x;
  const float* gamma;
  T* out;

  using Row = NoRow;
  __device__ Row BeginRow(std::int64_t, int, int) const { return {}; }
  __device__ float Factor(float squares) const {
    return sqrtf(static_cast<float>(columns)) / fmaxf(sqrtf(squares), 1e-12f);
  }
  template <int kWidth>
  __device__ void Store(const Row&, std::int64_t row, int column, const float* values, float,
                        float factor) const {
    float y[kWidth], g[kWidth];
    LoadConstants<kWidth>(gamma + column, g);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      y[j] = values[j] * factor * g[j];
      if (silu) y[j] = sizeof(T) == 2 ? FastSilu(y[j]) : Silu(y[j]);
    }
    StoreFloats<kWidth>(out + row * columns + column, y);
  }
};

const float* OptionalFloats(const Tensor& tensor) {
  return tensor.defined() ? tensor.data<float>() : nullptr;
}

// out has x's shape and type, or is bf16 of an f32 residual stream.
void RequireNormOut(const Tensor& x, const Tensor& out, const char* name) {
  Require(out.defined() && IsComputeType(out.dtype()), name);
  const bool narrows = x.dtype() == DType::kF32 && out.dtype() == DType::kBF16;
  RequireTensor(out, out.shape(), narrows ? DType::kBF16 : x.dtype(), name);
  Require(out.NumElements() == x.NumElements(), name);
}

template <typename In, typename Out>
void RunLayerNorm(const Context& context, const LayerNormArgs& args) {
  LayerNormOp<In, Out> op{static_cast<int>(args.x.dim(-1)),
                          args.x.dim(1),
                          args.eps,
                          args.x.data<In>(),
                          OptionalFloats(args.weight),
                          OptionalFloats(args.bias),
                          OptionalFloats(args.scale),
                          OptionalFloats(args.shift),
                          args.out.data<Out>()};
  const bool vectors = Aligned16(op.x, op.weight, op.bias, op.scale, op.shift, op.out);
  RunRows(op, args.x.dim(0) * args.x.dim(1), vectors, context.stream, "LayerNorm");
}

template <typename In, typename Out>
void RunRmsNorm(const Context& context, const RmsNormArgs& args) {
  const std::int64_t columns = args.x.dim(-1);
  RmsNormOp<In, Out> op{static_cast<int>(columns), args.eps, args.x.data<In>(),
                        args.weight.data<float>(), args.out.data<Out>()};
  RunRows(op, args.x.NumElements() / columns, Aligned16(op.x, op.weight, op.out), context.stream,
          "RmsNorm");
}

template <typename T>
void RunQkNormRope(const Context& context, const QkNormRopeArgs& args) {
  const int head_size = static_cast<int>(args.out.dim(3));
  QkNormRopeOp<T> op{static_cast<int>(args.x.dim(2)),
                     head_size,
                     args.x.dim(1),
                     args.eps,
                     args.relu_before_rotation,
                     args.x.data<T>(),
                     OptionalFloats(args.weight),
                     OptionalFloats(args.cos),
                     OptionalFloats(args.sin),
                     args.out.data<T>()};
  const bool vectors = head_size % 8 == 0 && Aligned16(op.x, op.weight, op.cos, op.sin, op.out);
  if constexpr (sizeof(T) == sizeof(bf16)) {
    const std::int64_t length = args.x.dim(1);
    if (args.means.defined() && ChoosePooling(op.columns, vectors) == PoolingWay::kFused) {
      const dim3 grid(static_cast<unsigned>(args.means.dim(1)),
                      static_cast<unsigned>(args.x.dim(0)));
      if (length == 0 || args.x.dim(0) == 0) return;
      PooledQkKernel<<<grid, kRowThreads, 0, context.stream>>>(op, args.pool,
                                                               args.means.data<float>());
      CheckLaunch("QkNormRope: pooled");
      return;
    }
  }
  RunRows(op, args.x.dim(0) * args.x.dim(1), vectors, context.stream, "QkNormRope");
  if (args.means.defined()) PoolBlocks(context, args.out, args.pool, args.means);
}

template <typename T>
void RunChannelNorm(const Context& context, const ChannelNormArgs& args) {
  const std::int64_t columns = args.x.dim(-1);
  ChannelNormOp<T> op{static_cast<int>(columns), args.silu, args.x.data<T>(),
                      args.gamma.data<float>(), args.out.data<T>()};
  RunRows(op, args.x.NumElements() / columns, Aligned16(op.x, op.gamma, op.out), context.stream,
          "ChannelNorm");
}

}  // namespace

PoolingWay ChoosePooling(std::int64_t columns, bool vectors) {
  return vectors && columns % 8 == 0 && columns <= kPoolColumns ? PoolingWay::kFused
                                                                : PoolingWay::kSeparate;
}

void LayerNorm(const Context& context, const LayerNormArgs& args) {
  Require(args.x.defined() && args.x.shape().rank() == 3 && IsComputeType(args.x.dtype()),
          "LayerNorm: x is not [B, L, d] of f32 or bf16");
  const std::int64_t batch = args.x.dim(0);
  const std::int64_t columns = args.x.dim(2);
  RequireNormOut(args.x, args.out, "LayerNorm: out");
  Require(args.weight.defined() == args.bias.defined(), "LayerNorm: weight and bias go together");
  Require(args.scale.defined() == args.shift.defined(), "LayerNorm: scale and shift go together");
  if (args.weight.defined()) {
    RequireTensor(args.weight, {columns}, DType::kF32, "LayerNorm: weight");
    RequireTensor(args.bias, {columns}, DType::kF32, "LayerNorm: bias");
  }
  if (args.scale.defined()) {
    RequireTensor(args.scale, {batch, columns}, DType::kF32, "LayerNorm: scale");
    RequireTensor(args.shift, {batch, columns}, DType::kF32, "LayerNorm: shift");
  }
  if (args.x.dtype() == DType::kBF16) {
    RunLayerNorm<bf16, bf16>(context, args);
  } else if (args.out.dtype() == DType::kBF16) {
    RunLayerNorm<float, bf16>(context, args);
  } else {
    RunLayerNorm<float, float>(context, args);
  }
}

void RmsNorm(const Context& context, const RmsNormArgs& args) {
  Require(args.x.defined() && args.x.shape().rank() >= 1 && IsComputeType(args.x.dtype()),
          "RmsNorm: x is not [M, d] of f32 or bf16");
  RequireTensor(args.weight, {args.x.dim(-1)}, DType::kF32, "RmsNorm: weight");
  RequireNormOut(args.x, args.out, "RmsNorm: out");
  if (args.x.dtype() == DType::kBF16) {
    RunRmsNorm<bf16, bf16>(context, args);
  } else if (args.out.dtype() == DType::kBF16) {
    RunRmsNorm<float, bf16>(context, args);
  } else {
    RunRmsNorm<float, float>(context, args);
  }
}

void QkNormRope(const Context& context, const QkNormRopeArgs& args) {
  Require(args.x.defined() && args.x.shape().rank() == 3 && IsComputeType(args.x.dtype()),
          "QkNormRope: x is not [B, L, H * D] of f32 or bf16");
  Require(args.out.defined() && args.out.shape().rank() == 4,
          "QkNormRope: out is not [B, L, H, D]");
  const std::int64_t head_size = args.out.dim(3);
  const std::int64_t columns = args.x.dim(2);
  Require(columns == args.out.dim(2) * head_size && head_size % 2 == 0,
          "QkNormRope: x's last dimension is not H * D with D even");
  RequireTensor(args.out, {args.x.dim(0), args.x.dim(1), args.out.dim(2), head_size},
                args.x.dtype(), "QkNormRope: out");
  Require(args.cos.defined() == args.sin.defined(), "QkNormRope: cos and sin go together");
  if (args.weight.defined()) {
    RequireTensor(args.weight, {columns}, DType::kF32, "QkNormRope: weight");
  }
  if (args.cos.defined()) {
    RequireTensor(args.cos, {args.x.dim(1), head_size / 2}, DType::kF32, "QkNormRope: cos");
    RequireTensor(args.sin, {args.x.dim(1), head_size / 2}, DType::kF32, "QkNormRope: sin");
  }
  if (args.means.defined()) {
    Require(args.pool > 0, "QkNormRope: means of no rows");
    const std::int64_t blocks = (args.x.dim(1) + args.pool - 1) / args.pool;
    RequireTensor(args.means, {args.x.dim(0), blocks, columns}, DType::kF32, "QkNormRope: means");
  }
  args.x.dtype() == DType::kBF16 ? RunQkNormRope<bf16>(context, args)
                                 : RunQkNormRope<float>(context, args);
}

void ChannelNorm(const Context& context, const ChannelNormArgs& args) {
  Require(args.x.defined() && args.x.shape().rank() >= 1 && IsComputeType(args.x.dtype()),
          "ChannelNorm: x is not [T, H, W, C] of f32 or bf16");
  RequireTensor(args.gamma, {args.x.dim(-1)}, DType::kF32, "ChannelNorm: gamma");
  RequireTensor(args.out, args.x.shape(), args.x.dtype(), "ChannelNorm: out");
  args.x.dtype() == DType::kBF16 ? RunChannelNorm<bf16>(context, args)
                                 : RunChannelNorm<float>(context, args);
}

}  // namespace slalom::cuda
