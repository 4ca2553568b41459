// Operations that touch each element once: activations, gates, modulation, look-ups, conversions.
#include <cuda_fp16.h>

#include "kernels/core/error.h"
#include "kernels/cuda/elementwise.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

__device__ float Apply(Activation activation, float x) {
  switch (activation) {
    case Activation::kGeluTanh:
      return GeluTanh(x);
    case Activation::kSilu:
      return Silu(x);
    case Activation::kNone:
      break;
  }
  return x;
}

template <typename T>
struct ActivateFunction {
  Activation activation;
  const T* x;
  T* out;
  template <int kWidth>
  __device__ void Apply(std::int64_t first) const {
    float v[kWidth];
    LoadFloats<kWidth>(x + first, v);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v[j] = cuda::Apply(activation, v[j]);
    StoreFloats<kWidth>(out + first, v);
  }
};

template <typename T>
struct GatedGeluFunction {
  std::int64_t columns;  // F
  const T* x;            // [M, 2 F]
  T* out;                // [M, F]
  template <int kWidth>
  __device__ void Apply(std::int64_t first) const {
    const std::int64_t row = first / columns;
    const T* from = x + row * 2 * columns + first % columns;
    float a[kWidth], b[kWidth];
    LoadFloats<kWidth>(from, a);
    LoadFloats<kWidth>(from + columns, b);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) a[j] = GeluTanh(a[j]) * b[j];
    StoreFloats<kWidth>(out + first, a);
  }
};

template <typename T>
struct EpilogueFunction {
  Activation activation;
  std::int64_t columns;          // N
  std::int64_t rows_per_sample;  // M / B
  const T* y;                    // [M, N]
  const float* bias;             // [N] or null
  const T* residual;             // [M, N] or null
  const float* gate;             // [B, N] or null
  T* out;                        // [M, N]
  template <int kWidth>
  __device__ void Apply(std::int64_t first) const {
    const std::int64_t row = first / columns;
    const std::int64_t column = first - row * columns;
    float v[kWidth], a[kWidth];
    LoadFloats<kWidth>(y + first, v);
    if (bias != nullptr) {
      LoadFloats<kWidth>(bias + column, a);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) v[j] += a[j];
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v[j] = cuda::Apply(activation, v[j]);
    if (gate != nullptr) {
      LoadFloats<kWidth>(gate + row / rows_per_sample * columns + column, a);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) v[j] *= a[j];
    }
    if (residual != nullptr) {
      LoadFloats<kWidth>(residual + first, a);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) v[j] += a[j];
    }
    StoreFloats<kWidth>(out + first, v);
  }
};

struct ModulationFunction {
  std::int64_t rows;     // n
  std::int64_t batch;    // B
  std::int64_t columns;  // d
  bool row_per_sample;   // t is [B, d]
  const float* table;    // [n, d]
  const float* t;        // [B, n, d] or [B, d]
  float* out;            // [n, B, d]
  template <int kWidth>
  __device__ void Apply(std::int64_t first) const {
    const std::int64_t column = first % columns;
    const std::int64_t sample = first / columns % batch;
    const std::int64_t row = first / columns / batch;
    const std::int64_t from = row_per_sample ? sample : sample * rows + row;
    float a[kWidth], b[kWidth];
    LoadFloats<kWidth>(table + row * columns + column, a);
    LoadFloats<kWidth>(t + from * columns + column, b);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) a[j] += b[j];
    StoreFloats<kWidth>(out + first, a);
  }
};

template <typename T>
struct EmbeddingFunction {
  std::int64_t columns;
  std::int64_t entries;
  const std::int32_t* ids;
  const T* table;
  T* out;
  template <int kWidth>
  __device__ void Apply(std::int64_t first) const {
    const std::int64_t row = first / columns;
    const std::int32_t id = ids[row];
    const std::int64_t entry = id < 0 || id >= entries ? 0 : id;
    float v[kWidth];
    LoadFloats<kWidth>(table + entry * columns + (first - row * columns), v);
    StoreFloats<kWidth>(out + first, v);
  }
};

struct TimestepFunction {
  int half;  // n / 2
  const float* timesteps;
  float* out;
  template <int kWidth>
  __device__ void Apply(std::int64_t first) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const std::int64_t sample = (first + j) / (2 * half);
      const int column = static_cast<int>((first + j) % (2 * half));
      // In double: t reaches 1000, where a float's angle is off by 6e-5. A few hundred numbers.
      const double frequency = exp(-log(10000.0) * (column % half) / half);
      const double angle = static_cast<double>(timesteps[sample]) * frequency;
      out[first + j] = static_cast<float>(column < half ? cos(angle) : sin(angle));
    }
  }
};

constexpr int kMaxCombined = 8;

struct CombineFunction {
  int count;
  const float* inputs[kMaxCombined];
  float coefficients[kMaxCombined];
  float* out;
  template <int kWidth>
  __device__ void Apply(std::int64_t first) const {
    float sum[kWidth] = {};
#pragma unroll
    for (int i = 0; i < kMaxCombined; ++i) {
      if (i >= count) break;
      float v[kWidth];
      LoadFloats<kWidth>(inputs[i] + first, v);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum[j] += coefficients[i] * v[j];
    }
    StoreFloats<kWidth>(out + first, sum);
  }
};

template <typename T>
__device__ float AsFloat(T x) {
  return static_cast<float>(x);
}

template <typename From, typename To>
struct ConvertFunction {
  const From* from;
  To* to;
  template <int kWidth>
  __device__ void Apply(std::int64_t first) const {
    float v[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v[j] = AsFloat(from[first + j]);
    StoreFloats<kWidth>(to + first, v);
  }
};

template <typename T>
__global__ void __launch_bounds__(256)
    CountNonFiniteKernel(const T* x, std::int64_t elements, unsigned long long* counter) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  int bad = 0;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < elements; i += step) {
    bad += !isfinite(ToFloat(x[i]));
  }
  bad = __reduce_add_sync(kFullWarp, bad);
  if (threadIdx.x % 32 == 0 && bad > 0) atomicAdd(counter, static_cast<unsigned long long>(bad));
}

template <typename From, typename To>
void RunConvert(const Context& context, const Tensor& from, const Tensor& to) {
  const ConvertFunction<From, To> function{from.data<From>(), to.data<To>()};
  RunElementwise(context, function, to.NumElements(), AllAligned16(function.to), "Convert");
}

template <typename To>
void ConvertTo(const Context& context, const Tensor& from, const Tensor& to) {
  switch (from.dtype()) {
    case DType::kF32:
      return RunConvert<float, To>(context, from, to);
    case DType::kBF16:
      return RunConvert<bf16, To>(context, from, to);
    case DType::kF16:
      return RunConvert<__half, To>(context, from, to);
    case DType::kF64:
      return RunConvert<double, To>(context, from, to);
    default:
      throw Error(ErrorCode::kInternal, "Copy: integers are not converted");
  }
}

template <typename T>
void RunEpilogue(const Context& context, const EpilogueArgs& args) {
  const std::int64_t columns = args.out.dim(-1);
  const std::int64_t rows = args.out.NumElements() / columns;
  const std::int64_t samples = args.gate.defined() ? args.gate.dim(0) : 1;
  const EpilogueFunction<T> function{args.activation,
                                     columns,
                                     rows / samples,
                                     args.y.data<T>(),
                                     args.bias.defined() ? args.bias.data<float>() : nullptr,
                                     args.residual.defined() ? args.residual.data<T>() : nullptr,
                                     args.gate.defined() ? args.gate.data<float>() : nullptr,
                                     args.out.data<T>()};
  const bool vectors = columns % 8 == 0 && AllAligned16(function.y, function.bias, function.gate,
                                                        function.residual, function.out);
  RunElementwise(context, function, rows * columns, vectors, "LinearEpilogue");
}

template <typename T>
void RunActivate(const Context& context, Activation activation, const Tensor& x,
                 const Tensor& out) {
  const ActivateFunction<T> function{activation, x.data<T>(), out.data<T>()};
  RunElementwise(context, function, x.NumElements(), AllAligned16(function.x, function.out),
                 "Activate");
}

template <typename T>
void RunGatedGelu(const Context& context, const Tensor& x, const Tensor& out) {
  const GatedGeluFunction<T> function{out.dim(-1), x.data<T>(), out.data<T>()};
  const bool vectors = out.dim(-1) % 8 == 0 && AllAligned16(function.x, function.out);
  RunElementwise(context, function, out.NumElements(), vectors, "GatedGelu");
}

template <typename T>
void RunEmbedding(const Context& context, const Tensor& ids, const Tensor& table,
                  const Tensor& out) {
  const EmbeddingFunction<T> function{table.dim(1), table.dim(0), ids.data<std::int32_t>(),
                                      table.data<T>(), out.data<T>()};
  const bool vectors = table.dim(1) % 8 == 0 && AllAligned16(function.table, function.out);
  RunElementwise(context, function, out.NumElements(), vectors, "Embedding");
}

}  // namespace

void Modulation(const Context& context, const ModulationArgs& args) {
  Require(args.table.defined() && args.table.shape().rank() == 2 && args.t.defined(),
          "Modulation: table is not [n, d], or t is missing");
  const std::int64_t rows = args.table.dim(0);
  const std::int64_t columns = args.table.dim(1);
  const std::int64_t batch = args.t.dim(0);
  const bool row_per_sample = args.t.shape().rank() == 2;
  RequireTensor(args.table, {rows, columns}, DType::kF32, "Modulation: table");
  RequireTensor(args.t, row_per_sample ? Shape{batch, columns} : Shape{batch, rows, columns},
                DType::kF32, "Modulation: t");
  RequireTensor(args.out, {rows, batch, columns}, DType::kF32, "Modulation: out");
  const ModulationFunction function{rows,
                                    batch,
                                    columns,
                                    row_per_sample,
                                    args.table.data<float>(),
                                    args.t.data<float>(),
                                    args.out.data<float>()};
  const bool vectors = columns % 8 == 0 && AllAligned16(function.table, function.t, function.out);
  RunElementwise(context, function, args.out.NumElements(), vectors, "Modulation");
}

void Activate(const Context& context, Activation activation, const Tensor& x, const Tensor& out) {
  Require(x.defined() && IsComputeType(x.dtype()), "Activate: x is not f32 or bf16");
  RequireTensor(out, x.shape(), x.dtype(), "Activate: out");
  x.dtype() == DType::kBF16 ? RunActivate<bf16>(context, activation, x, out)
                            : RunActivate<float>(context, activation, x, out);
}

void GatedGelu(const Context& context, const Tensor& x, const Tensor& out) {
  Require(x.defined() && out.defined() && IsComputeType(x.dtype()) && x.dtype() == out.dtype(),
          "GatedGelu: x and out are not of one type, f32 or bf16");
  Require(x.dim(-1) == 2 * out.dim(-1) && x.NumElements() == 2 * out.NumElements(),
          "GatedGelu: out is not half as wide as x");
  x.dtype() == DType::kBF16 ? RunGatedGelu<bf16>(context, x, out)
                            : RunGatedGelu<float>(context, x, out);
}

void Embedding(const Context& context, const Tensor& ids, const Tensor& table, const Tensor& out) {
  Require(table.defined() && table.shape().rank() == 2 && IsComputeType(table.dtype()),
          "Embedding: table is not [entries, d] of f32 or bf16");
  Require(ids.defined() && ids.dtype() == DType::kI32, "Embedding: ids are not i32");
  Require(out.defined() && out.dtype() == table.dtype() &&
              out.NumElements() == ids.NumElements() * table.dim(1),
          "Embedding: out is not [n, d] of table's type");
  table.dtype() == DType::kBF16 ? RunEmbedding<bf16>(context, ids, table, out)
                                : RunEmbedding<float>(context, ids, table, out);
}

void TimestepEmbedding(const Context& context, const Tensor& timesteps, const Tensor& out) {
  Require(out.defined() && out.shape().rank() == 2 && out.dim(1) % 2 == 0,
          "TimestepEmbedding: out is not [B, n] with n even");
  RequireTensor(timesteps, {out.dim(0)}, DType::kF32, "TimestepEmbedding: timesteps");
  RequireTensor(out, out.shape(), DType::kF32, "TimestepEmbedding: out");
  const TimestepFunction function{static_cast<int>(out.dim(1) / 2), timesteps.data<float>(),
                                  out.data<float>()};
  RunElementwise(context, function, out.NumElements(), false, "TimestepEmbedding");
}

void Combine(const Context& context, const CombineArgs& args) {
  Require(!args.inputs.empty() && args.inputs.size() <= kMaxCombined &&
              args.inputs.size() == args.coefficients.size(),
          "Combine: takes 1 to 8 inputs with a coefficient each");
  CombineFunction function{};
  function.count = static_cast<int>(args.inputs.size());
  bool vectors = true;
  for (std::size_t i = 0; i < args.inputs.size(); ++i) {
    RequireTensor(args.inputs[i], args.out.shape(), DType::kF32, "Combine: input");
    function.inputs[i] = args.inputs[i].data<float>();
    function.coefficients[i] = args.coefficients[i];
    vectors = vectors && AllAligned16(function.inputs[i]);
  }
  RequireTensor(args.out, args.out.shape(), DType::kF32, "Combine: out");
  function.out = args.out.data<float>();
  RunElementwise(context, function, args.out.NumElements(), vectors && AllAligned16(function.out),
                 "Combine");
}

void CountNonFinite(const Context& context, const Tensor& x, const Tensor& counter) {
  Require(x.defined() && IsComputeType(x.dtype()), "CountNonFinite: x is not f32 or bf16");
  RequireTensor(counter, {1}, DType::kI64, "CountNonFinite: counter");
  if (x.NumElements() == 0) return;
  const std::int64_t wanted = (x.NumElements() + 255) / 256;
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(wanted, context.sm_count * 8));
  auto* count = reinterpret_cast<unsigned long long*>(counter.raw());
  if (x.dtype() == DType::kBF16) {
    CountNonFiniteKernel<<<blocks, 256, 0, context.stream>>>(x.data<bf16>(), x.NumElements(),
                                                             count);
  } else {
    CountNonFiniteKernel<<<blocks, 256, 0, context.stream>>>(x.data<float>(), x.NumElements(),
                                                             count);
  }
  CheckLaunch("CountNonFinite");
}

void Convert(const Context& context, const Tensor& from, const Tensor& to) {
  Require(IsComputeType(to.dtype()), "Copy: floats are converted into f32 or bf16 only");
  to.dtype() == DType::kBF16 ? ConvertTo<bf16>(context, from, to)
                             : ConvertTo<float>(context, from, to);
}

void LinearEpilogue(const Context& context, const EpilogueArgs& args) {
  args.out.dtype() == DType::kBF16 ? RunEpilogue<bf16>(context, args)
                                   : RunEpilogue<float>(context, args);
}

}  // namespace slalom::cuda
