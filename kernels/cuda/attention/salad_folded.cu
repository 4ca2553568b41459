// SALAD's linear branch with its projection folded into the sums over the keys.
#include "kernels/cuda/attention/features.cuh"
#include "kernels/cuda/attention/salad.h"
#include "kernels/cuda/attention/sparse_parts.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

constexpr int kWarps = 8;           // a warp has one token
constexpr int kWidth = 8;           // channels that a lane takes at once
constexpr int kStep = 32 * kWidth;  // and a warp
constexpr int kAtOnce = 3;          // steps whose loads are under way together
constexpr int kExtra = 8;           // columns for the bias: one, and what keeps rows aligned

struct Parameters {
  const bf16* q;     // [rows, width], normed
  const float* cos;  // [length, kD / 2]
  const float* sin;
  const bf16* sums;  // [samples * heads, kD + 1, kD], the normaliser below the others
  const bf16* x;     // [rows, width], or null: then the gates are given
  const float* gate_weight;
  const float* gate_bias;
  float* gates;  // [rows], read without x, else written unless it is null
  std::int64_t rows;
  std::int64_t length;
  int width;
  bf16* features;  // [rows, width + kExtra]
};

// Calls `use` for kAtOnce pieces of a row after the other, all of them loaded before.
template <typename Use>
__device__ inline void ForPieces(const bf16* row, int width, const Use& use) {
  const int lane = threadIdx.x % 32;
  for (int first = lane * kWidth; first - lane * kWidth < width; first += kAtOnce * kStep) {
    Packed8<bf16> pieces[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int column = first + i * kStep;
      if (column < width) pieces[i].Load(row + column);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first - lane * kWidth + i * kStep >= width) break;  // of the whole warp
      float values[kWidth] = {};
      const int column = first + i * kStep;
      if (column < width) pieces[i].Unpack(values);
      use(column, values);
    }
  }
}

__device__ inline float Gate(const Parameters& p, std::int64_t row) {
  if (p.x == nullptr) return p.gates[row];
  float sum = 0.0f;
  ForPieces(p.x + row * p.width, p.width, [&](int column, const float(&x)[kWidth]) {
    if (column >= p.width) return;
    float weight[kWidth];
    LoadConstants<kWidth>(p.gate_weight + column, weight);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += x[i] * weight[i];
  });
  const float gate = 1.0f / (1.0f + expf(-(GroupSum<32>(sum) + *p.gate_bias)));
  if (p.gates != nullptr && threadIdx.x % 32 == 0) p.gates[row] = gate;
  return gate;
}

template <int kD>
__global__ void __launch_bounds__(kWarps * 32) FeatureKernel(const Parameters p) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const int lane = threadIdx.x % 32;
  const float gate = Gate(p, row);
  // A step of whole heads: a lane has the same channels of another head each time.
  static_assert(kStep % kD == 0);
  const int channel = lane * kWidth % kD;
  float cosine[kWidth / 2], sine[kWidth / 2];
  const std::int64_t angle = row % p.length * (kD / 2) + channel / 2;
  LoadConstants<kWidth / 2>(p.cos + angle, cosine);
  LoadConstants<kWidth / 2>(p.sin + angle, sine);
  const std::int64_t first_head = row / p.length * (p.width / kD);
  bf16* out = p.features + row * (p.width + kExtra);
  ForPieces(p.q + row * p.width, p.width, [&](int column, float(&x)[kWidth]) {
    MapFeatures<kD / kWidth>(Feature::kRelu, x);
    float normaliser[kWidth] = {};
    if (column < p.width) {
      LoadFloats<kWidth>(p.sums + ((first_head + column / kD) * (kD + 1) + kD) * kD + channel,
                         normaliser);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += x[i] * normaliser[i];
    const float factor = gate / (GroupSum<kD / kWidth>(sum) + kNormaliserEpsilon);
    if (column >= p.width) return;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      RotatePair(cosine[i], sine[i], x[2 * i], x[2 * i + 1]);
      x[2 * i] *= factor;
      x[2 * i + 1] *= factor;
    }
    StoreFloats<kWidth>(out + column, x);
  });
  if (lane == 0) {
    const float extra[kExtra] = {gate};
    StoreFloats<kExtra>(out + p.width, extra);
  }
}

// The rows below the folded sums: the bias, and zeros. Grid (pieces of the width, samples).
__global__ void __launch_bounds__(kWarps * 32)
    BiasKernel(const float* bias, int width, bf16* folded) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= width) return;
  bf16* rows = folded + (std::int64_t{blockIdx.y} * (width + kExtra) + width) * width + column;
#pragma unroll
  for (int i = 0; i < kExtra; ++i) rows[i * width] = FromFloat<bf16>(i == 0 ? bias[column] : 0.0f);
}

// [B, H * D + kExtra, H * D]: of each head its sums times its columns of the projection,
// transposed.
Tensor FoldProjection(const Context& context, const SaladArgs& args, const Tensor& sums) {
  const std::int64_t batch = args.q.dim(0), heads = args.q.dim(2), d = args.q.dim(3);
  const std::int64_t width = heads * d;
  const Tensor folded = context.Allocate({batch, width + kExtra, width}, DType::kBF16);
  GemmArgs product;
  product.m = product.k = d;
  product.n = width;
  product.lda = d;
  product.a_stride = (d + 1) * d;
  product.b = args.proj_weight.raw();
  product.ldb = width;
  product.b_stride = d;
  product.ldo = width;
  product.out_stride = d * width;
  product.batch = heads;
  for (std::int64_t sample = 0; sample < batch; ++sample) {
    product.a = sums.data<bf16>() + sample * heads * product.a_stride;
    product.out = folded.data<bf16>() + sample * (width + kExtra) * width;
    context.gemm->Run(product);
  }
  const dim3 grid(static_cast<unsigned>((width + kWarps * 32 - 1) / (kWarps * 32)),
                  static_cast<unsigned>(batch));
  BiasKernel<<<grid, kWarps * 32, 0, context.stream>>>(
      args.proj_bias.data<float>(), static_cast<int>(width), folded.data<bf16>());
  CheckLaunch("SaladAttention: bias");
  return folded;
}

// [B, L, H * D + kExtra]
Tensor ScaledFeatures(const Context& context, const SaladArgs& args, const Tensor& sums) {
  const std::int64_t batch = args.q.dim(0), length = args.q.dim(1), d = args.q.dim(3);
  const std::int64_t width = args.q.dim(2) * d, rows = batch * length;
  const Tensor features = context.Allocate({batch, length, width + kExtra}, DType::kBF16);
  const bool averaged = args.gate == SaladGate::kSample;
  Tensor gates = args.gate_out;
  if (averaged) {
    if (!gates.defined()) gates = context.Allocate({batch, length}, DType::kF32);
    SaladGates(context, args.x, args.gate_weight, args.gate_bias, args.gate, gates);
  }
  const Parameters parameters{args.q_normed.data<bf16>(),
                              args.cos.data<float>(),
                              args.sin.data<float>(),
                              sums.data<bf16>(),
                              averaged ? nullptr : args.x.data<bf16>(),
                              args.gate_weight.data<float>(),
                              args.gate_bias.data<float>(),
                              gates.defined() ? gates.data<float>() : nullptr,
                              rows,
                              length,
                              static_cast<int>(width),
                              features.data<bf16>()};
  const auto blocks = static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  const auto kernel = d == 64 ? FeatureKernel<64> : FeatureKernel<128>;
  kernel<<<blocks, kWarps * 32, 0, context.stream>>>(parameters);
  CheckLaunch("SaladAttention: features");
  return features;
}

}  // namespace

void AddSaladBranch(const Context& context, const SaladArgs& args) {
  const LinearBranchArgs linear = SaladLinearArgs(args, args.out.Reshape(args.q.shape()));
  const std::int64_t batch = args.q.dim(0), length = args.q.dim(1);
  const std::int64_t width = args.q.dim(2) * args.q.dim(3);
  // With every key in scope all heads are visited at once.
  const auto add = [&](const LinearStates& states) {
    const Tensor features = ScaledFeatures(context, args, states.sums);
    const Tensor folded = FoldProjection(context, args, states.sums);
    GemmArgs product;
    product.m = length;
    product.n = product.ldb = product.ldo = width;
    product.k = product.lda = width + kExtra;
    product.b_is_kn = true;
    product.beta = 1.0f;
    for (std::int64_t sample = 0; sample < batch; ++sample) {
      product.a = features.Slice(sample, sample + 1).raw();
      product.b = folded.Slice(sample, sample + 1).raw();
      product.residual = product.out = args.out.Slice(sample, sample + 1).raw();
      context.gemm->Run(product);
    }
  };
  VisitLinearStates(context, linear, ChooseStateKernel(context.compute_major), add);
}

}  // namespace slalom::cuda
