// Normalisations over rows, and the step before attention.
#include "kernels/cpu/block_map.h"
#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_backend.h"

namespace slalom {
namespace {

// x has the compute type, which out names, or f32.
void CheckNormTypes(const Check& check, const Tensor& x, const Tensor& out) {
  check.Compute(out, "out");
  check.Compute(x, "x");
  check.That(x.dtype() == out.dtype() || x.dtype() == DType::kF32, "x",
             "has neither out's type nor F32");
}

}  // namespace

void CpuBackend::LayerNorm(const LayerNormArgs& args) {
  const Check check("LayerNorm");
  check.Rank(args.x, 3, "x");
  CheckNormTypes(check, args.x, args.out);
  check.That(args.out.shape() == args.x.shape(), "out", "has not x's shape");
  const std::int64_t batch = args.x.dim(0);
  const std::int64_t rows = args.x.dim(1);
  const std::int64_t d = args.x.dim(2);
  check.That(args.weight.defined() == args.bias.defined(), "bias",
             "comes with weight or not at all");
  check.That(args.scale.defined() == args.shift.defined(), "shift",
             "comes with scale or not at all");
  if (args.weight.defined()) {
    check.Is(args.weight, Shape{d}, DType::kF32, "weight");
    check.Is(args.bias, Shape{d}, DType::kF32, "bias");
  }
  if (args.scale.defined()) {
    check.Is(args.scale, Shape{batch, d}, DType::kF32, "scale");
    check.Is(args.shift, Shape{batch, d}, DType::kF32, "shift");
  }
  const float* weight = args.weight.defined() ? args.weight.data<float>() : nullptr;
  const float* bias = args.bias.defined() ? args.bias.data<float>() : nullptr;
  VisitCompute(args.out.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const auto& loops = simd::Rows<T>(kernels_);
    parallel_.Rows(batch * rows, d, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        const std::int64_t b = r / rows;
        const float* scale = args.scale.defined() ? args.scale.data<float>() + b * d : nullptr;
        const float* shift = args.shift.defined() ? args.shift.data<float>() + b * d : nullptr;
        T* out = args.out.data<T>() + r * d;
        if (args.x.dtype() == DType::kF32) {
          loops.layer_norm_f32(args.x.data<float>() + r * d, weight, bias, scale, shift, args.eps,
                               d, out);
        } else {
          loops.layer_norm(args.x.data<T>() + r * d, weight, bias, scale, shift, args.eps, d, out);
        }
      }
    });
  });
}

void CpuBackend::RmsNorm(const RmsNormArgs& args) {
  const Check check("RmsNorm");
  CheckNormTypes(check, args.x, args.out);
  check.That(args.x.shape().rank() >= 1, "x", "has no dimension");
  const std::int64_t d = args.x.dim(-1);
  check.Is(args.weight, Shape{d}, DType::kF32, "weight");
  check.Holds(args.out, args.x.NumElements(), args.out.dtype(), "out");
  const std::int64_t rows = d == 0 ? 0 : args.x.NumElements() / d;
  VisitCompute(args.out.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const auto& loops = simd::Rows<T>(kernels_);
    const float* weight = args.weight.data<float>();
    parallel_.Rows(rows, d, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        T* out = args.out.data<T>() + r * d;
        if (args.x.dtype() == DType::kF32) {
          loops.rms_norm_f32(args.x.data<float>() + r * d, weight, args.eps, d, out);
        } else {
          loops.rms_norm(args.x.data<T>() + r * d, weight, args.eps, d, out);
        }
      }
    });
  });
}

void CpuBackend::QkNormRope(const QkNormRopeArgs& args) {
  const Check check("QkNormRope");
  check.Rank(args.x, 3, "x");
  check.Compute(args.x, "x");
  check.Rank(args.out, 4, "out");
  const std::int64_t batch = args.x.dim(0);
  const std::int64_t length = args.x.dim(1);
  const std::int64_t width = args.x.dim(2);
  const std::int64_t head_size = args.out.dim(3);
  const std::int64_t heads = args.out.dim(2);
  check.Is(args.out, Shape{batch, length, heads, head_size}, args.x.dtype(), "out");
  check.That(heads * head_size == width, "out", "has heads that do not make up x's rows");
  if (args.weight.defined()) check.Is(args.weight, Shape{width}, DType::kF32, "weight");
  check.That(args.cos.defined() == args.sin.defined(), "sin", "comes with cos or not at all");
  if (args.cos.defined()) {
    check.That(head_size % 2 == 0, "out", "has an odd head size");
    check.Is(args.cos, Shape{length, head_size / 2}, DType::kF32, "cos");
    check.Is(args.sin, Shape{length, head_size / 2}, DType::kF32, "sin");
  }
  if (args.means.defined()) {
    check.That(args.pool > 0, "pool", "is no number of rows");
    const std::int64_t blocks = (length + args.pool - 1) / args.pool;
    check.Is(args.means, Shape{batch, blocks, width}, DType::kF32, "means");
  }
  const float* weight = args.weight.defined() ? args.weight.data<float>() : nullptr;
  VisitCompute(args.x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const auto& loops = simd::Rows<T>(kernels_);
    parallel_.Rows(batch * length, width, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        const std::int64_t angle = r % length * (head_size / 2);
        const float* cos = args.cos.defined() ? args.cos.data<float>() + angle : nullptr;
        const float* sin = args.sin.defined() ? args.sin.data<float>() + angle : nullptr;
        loops.qk_norm_rope(args.x.data<T>() + r * width, weight, args.eps, cos, sin,
                           args.relu_before_rotation, heads, head_size,
                           args.out.data<T>() + r * width);
      }
    });
  });
  if (args.means.defined()) {
    PoolBlocks(kernels_, parallel_, args.out, width, args.pool, args.means);
  }
}

void CpuBackend::ChannelNorm(const ChannelNormArgs& args) {
  const Check check("ChannelNorm");
  check.Rank(args.x, 4, "x");
  check.Compute(args.x, "x");
  const std::int64_t channels = args.x.dim(3);
  check.Is(args.gamma, Shape{channels}, DType::kF32, "gamma");
  check.Is(args.out, args.x.shape(), args.x.dtype(), "out");
  const std::int64_t rows = channels == 0 ? 0 : args.x.NumElements() / channels;
  VisitCompute(args.x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const auto& loops = simd::Rows<T>(kernels_);
    parallel_.Rows(rows, channels, [&](std::int64_t begin, std::int64_t end) {
      loops.channel_norm(args.x.data<T>() + begin * channels, args.gamma.data<float>(), args.silu,
                         end - begin, channels, args.out.data<T>() + begin * channels);
    });
  });
}

}  // namespace slalom
