// Conv: arguments, and which kernel.
#include "kernels/cuda/conv.h"

#include "kernels/cuda/check.h"
#include "kernels/cuda/ops.h"

namespace slalom::cuda {
namespace {

ConvShape CheckConv(const ConvArgs& args) {
  Require(args.x.defined() && args.x.shape().rank() == 4 && IsComputeType(args.x.dtype()),
          "Conv: x is not [T, H, W, Ci] of f32 or bf16");
  Require(args.weight.defined() && args.weight.shape().rank() == 5,
          "Conv: weight is not [Co, kt, kh, kw, Ci]");
  const DType type = args.x.dtype();
  ConvShape shape;
  shape.frames = static_cast<int>(args.x.dim(0));
  shape.height = static_cast<int>(args.x.dim(1));
  shape.width = static_cast<int>(args.x.dim(2));
  shape.channels_in = static_cast<int>(args.x.dim(3));
  shape.channels_out = static_cast<int>(args.weight.dim(0));
  shape.kt = static_cast<int>(args.weight.dim(1));
  shape.kh = static_cast<int>(args.weight.dim(2));
  shape.kw = static_cast<int>(args.weight.dim(3));
  shape.doubling = args.upsample ? 1 : 0;
  Require(shape.kt % 2 == 1 && shape.kh % 2 == 1 && shape.kw % 2 == 1,
          "Conv: weight has an even kernel");
  Require(!args.upsample || shape.kt == 1, "Conv: upsample needs kt = 1");
  RequireTensor(args.weight, {shape.channels_out, shape.kt, shape.kh, shape.kw, shape.channels_in},
                type, "Conv: weight");
  if (args.history.defined()) {
    shape.history = static_cast<int>(args.history.dim(0));
    Require(shape.history <= shape.kt - 1, "Conv: history has more than kt - 1 frames");
    RequireTensor(args.history, {shape.history, shape.height, shape.width, shape.channels_in}, type,
                  "Conv: history");
  }
  const Shape out{shape.frames, shape.out_height(), shape.out_width(), shape.channels_out};
  RequireTensor(args.out, out, type, "Conv: out");
  if (args.residual.defined()) RequireTensor(args.residual, out, type, "Conv: residual");
  if (args.bias.defined()) {
    RequireTensor(args.bias, {shape.channels_out}, DType::kF32, "Conv: bias");
  }
  return shape;
}

bool Aligned16(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

}  // namespace

ConvKernel ChooseConvKernel(const ConvShape& shape, DType type, bool aligned, int compute_major) {
  if (type != DType::kBF16 || !aligned || shape.channels_in % 8 != 0) return ConvKernel::kSimple;
  const bool hopper = compute_major == kHopperMajor && shape.channels_in % 96 == 0 &&
                      shape.kh <= 3 && shape.kw <= 3 &&
                      (shape.channels_out % 96 == 0 || shape.channels_out <= 8);
  return hopper ? ConvKernel::kHopper : ConvKernel::kTensorCore;
}

void RunConv(const Context& context, const ConvProblem& problem, DType type, ConvKernel kernel) {
  switch (kernel) {
    case ConvKernel::kHopper:
      return HopperConv(context, problem);
    case ConvKernel::kTensorCore:
      return TensorCoreConv(context, problem);
    case ConvKernel::kSimple:
      return SimpleConv(context, problem, type);
  }
}

void Conv(const Context& context, const ConvArgs& args) {
  const ConvShape shape = CheckConv(args);
  if (args.out.NumElements() == 0) return;
  if (shape.kt * shape.kh * shape.kw == 1 && !args.upsample) {
    const std::int64_t pixels = shape.pixels();
    LinearArgs linear;
    linear.x = args.x.Reshape({pixels, shape.channels_in});
    linear.weight = args.weight.Reshape({shape.channels_out, shape.channels_in});
    linear.bias = args.bias;
    linear.residual = args.residual;
    linear.out = args.out.Reshape({pixels, shape.channels_out});
    Linear(context, linear);
    return;
  }
  ConvProblem problem;
  problem.shape = shape;
  problem.x = args.x.raw();
  problem.history = args.history.defined() ? args.history.raw() : nullptr;
  problem.weight = args.weight.raw();
  problem.bias = args.bias.defined() ? args.bias.data<float>() : nullptr;
  problem.residual = args.residual.defined() ? args.residual.raw() : nullptr;
  problem.out = args.out.raw();
  const bool aligned = Aligned16(problem.x) && Aligned16(problem.history) &&
                       Aligned16(problem.weight) && Aligned16(problem.bias) &&
                       Aligned16(problem.residual) && Aligned16(problem.out);
  RunConv(context, problem, args.x.dtype(),
          ChooseConvKernel(shape, args.x.dtype(), aligned, context.compute_major));
}

}  // namespace slalom::cuda
