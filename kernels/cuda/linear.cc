// Linear layers: what the library can fuse it fuses (bias, GELU, a plain residual). A gate goes
// into the weight where that fits; else a gate, or SiLU, takes one pass of ours over the product.
#include <cstdint>

#include "kernels/core/error.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/ops.h"

namespace slalom::cuda {
namespace {

struct LinearShape {
  std::int64_t m, n, k;
};

LinearShape CheckLinear(const LinearArgs& args) {
  Require(args.x.defined() && IsComputeType(args.x.dtype()) && args.x.shape().rank() >= 1,
          "Linear: x is not [M, K] of f32 or bf16");
  Require(args.weight.defined() && args.weight.shape().rank() == 2, "Linear: weight is not [N, K]");
  const std::int64_t k = args.weight.dim(1);
  const std::int64_t n = args.weight.dim(0);
  Require(args.x.dim(-1) == k && k > 0, "Linear: x's last dimension is not weight's");
  const std::int64_t m = args.x.NumElements() / k;
  RequireTensor(args.weight, {n, k}, args.x.dtype(), "Linear: weight");
  Require(args.out.defined() && !args.out.device().is_cpu() && args.out.NumElements() == m * n &&
              args.out.dim(-1) == n &&
              (args.out.dtype() == args.x.dtype() || args.out.dtype() == DType::kF32),
          "Linear: out is not [M, N] of x's type or f32");
  if (args.bias.defined()) {
    const bool narrow = args.bias.dtype() == args.x.dtype() && args.out.dtype() == args.x.dtype();
    RequireTensor(args.bias, {n}, narrow ? args.x.dtype() : DType::kF32, "Linear: bias");
  }
  Require(!args.residual.defined() ||
              (args.residual.dtype() == args.out.dtype() && args.residual.NumElements() == m * n),
          "Linear: residual is not [M, N] of out's type");
  if (args.gate.defined()) {
    Require(args.residual.defined(), "Linear: a gate needs a residual");
    Require(args.gate.dtype() == DType::kF32 && args.gate.dim(-1) == n && args.gate.dim(0) > 0 &&
                args.gate.NumElements() == args.gate.dim(0) * n && m % args.gate.dim(0) == 0,
            "Linear: gate is not [B, N] f32 with M divisible by B");
  }
  return {m, n, k};
}

// What the library's epilogue does; the rest is left to LinearEpilogue.
struct Fusion {
  bool bias = false;
  bool gelu = false;
  bool residual = false;
};

Fusion ChooseFusion(const LinearArgs& args) {
  Fusion fusion;
  const bool plain = args.activation == Activation::kNone;
  // The residual comes after the activation and inside the gate, so it fuses only without both.
  fusion.residual = args.residual.defined() && !args.gate.defined() && plain;
  // The library's tanh is an approximation that is good for bf16 only.
  fusion.gelu = args.activation == Activation::kGeluTanh && !args.residual.defined() &&
                args.out.dtype() == DType::kBF16;
  // When a pass of ours follows anyway, it adds the bias in f32.
  fusion.bias = args.bias.defined() &&
                (fusion.gelu || fusion.residual || (plain && !args.residual.defined()));
  return fusion;
}

bool RunProduct(const Context& context, const LinearArgs& args, const LinearShape& shape,
                const Fusion& fusion, const Tensor& out) {
  GemmArgs gemm;
  gemm.m = shape.m;
  gemm.n = shape.n;
  gemm.k = shape.k;
  gemm.in_type = args.x.dtype();
  gemm.out_type = out.dtype();
  gemm.a = args.x.raw();
  gemm.lda = shape.k;
  gemm.b = args.weight.raw();
  gemm.ldb = shape.k;
  gemm.out = out.raw();
  gemm.ldo = shape.n;
  if (fusion.residual) {
    gemm.residual = args.residual.raw();
    gemm.beta = 1.0f;
  }
  Tensor bias;
  if (fusion.bias) {
    bias = args.bias;
    if (bias.dtype() != out.dtype()) {  // the library wants the bias in out's type
      bias = context.Allocate({shape.n}, out.dtype());
      Convert(context, args.bias, bias);
    }
    gemm.bias = bias.raw();
  }
  gemm.epilogue = fusion.gelu
                      ? (fusion.bias ? GemmArgs::Epilogue::kGeluBias : GemmArgs::Epilogue::kGelu)
                      : (fusion.bias ? GemmArgs::Epilogue::kBias : GemmArgs::Epilogue::kNone);
  return context.gemm->TryRun(gemm);
}

// gate * (x w^T + bias) = x (gate w)^T + gate * bias: a pass over the weight instead of one over
// the tokens, which are many more. The gated weight is rounded to bf16 once more; the usual way
// rounds the product instead.
bool RunGated(const Context& context, const LinearArgs& args, const LinearShape& shape) {
  const bool fits = args.gate.defined() && args.activation == Activation::kNone &&
                    args.x.dtype() == DType::kBF16 && args.out.dtype() == DType::kF32 &&
                    shape.k % 8 == 0 && shape.n % 4 == 0 &&  // samples are all aligned alike
                    reinterpret_cast<std::uintptr_t>(args.weight.raw()) % 16 == 0;
  if (!fits) return false;
  const std::int64_t samples = args.gate.dim(0), rows = shape.m / samples;
  const Tensor weight = context.Allocate(args.weight.shape(), DType::kBF16);
  const Tensor bias = args.bias.defined() ? context.Allocate({shape.n}, DType::kF32) : Tensor();
  GemmArgs gemm;
  gemm.m = rows;
  gemm.n = shape.n;
  gemm.k = shape.k;
  gemm.out_type = DType::kF32;
  gemm.lda = shape.k;
  gemm.b = weight.raw();
  gemm.ldb = shape.k;
  gemm.ldo = shape.n;
  gemm.beta = 1.0f;
  if (bias.defined()) {
    gemm.epilogue = GemmArgs::Epilogue::kBias;
    gemm.bias = bias.raw();
  }
  for (std::int64_t sample = 0; sample < samples; ++sample) {
    const float* gate = args.gate.data<float>() + sample * shape.n;
    GateWeight(context, args.weight, args.bias, gate, weight, bias);
    gemm.a = args.x.data<std::uint16_t>() + sample * rows * shape.k;
    gemm.residual = args.residual.data<float>() + sample * rows * shape.n;
    gemm.out = args.out.data<float>() + sample * rows * shape.n;
    // Every sample has the same plan: if one has a kernel, all have.
    if (!context.gemm->TryRun(gemm)) return false;
  }
  return true;
}

}  // namespace

void Linear(const Context& context, const LinearArgs& given) {
  const LinearShape shape = CheckLinear(given);
  if (shape.m == 0 || shape.n == 0) return;
  if (RunGated(context, given, shape)) return;
  LinearArgs args = given;
  const Fusion fusion = ChooseFusion(args);
  const bool whole = args.bias.defined() == fusion.bias &&
                     args.residual.defined() == fusion.residual &&
                     (args.activation != Activation::kNone) == fusion.gelu;
  if (whole && RunProduct(context, args, shape, fusion, args.out)) return;

  // Passes of ours add the bias in f32.
  if (args.bias.defined() && args.bias.dtype() != DType::kF32) {
    args.bias = context.Allocate({shape.n}, DType::kF32);
    Convert(context, given.bias, args.bias);
  }
  // The product must not overwrite the residual that our own pass still reads.
  const bool aliased = args.residual.defined() && args.residual.raw() == args.out.raw();
  const Tensor product = aliased ? context.Allocate(args.out.shape(), args.out.dtype()) : args.out;
  if (!RunProduct(context, args, shape, Fusion{}, product)) {
    return SimpleLinear(context, args);  // odd sizes that the library has no kernel for
  }
  EpilogueArgs epilogue;
  epilogue.y = product;
  epilogue.bias = args.bias;
  epilogue.activation = args.activation;
  epilogue.residual = args.residual;
  epilogue.gate = args.gate;
  epilogue.out = args.out;
  LinearEpilogue(context, epilogue);
}

}  // namespace slalom::cuda
