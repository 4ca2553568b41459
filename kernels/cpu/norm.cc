// Normalisations over rows, and the step before attention.
#include <cmath>

#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_backend.h"

namespace slalom {
namespace {

template <typename T>
float SumOfSquares(const T* x, std::int64_t d) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < d; ++i) sum += ToFloat(x[i]) * ToFloat(x[i]);
  return sum;
}

template <typename T>
void LayerNormRow(const T* x, const float* weight, const float* bias, const float* scale,
                  const float* shift, float eps, std::int64_t d, T* out) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < d; ++i) sum += ToFloat(x[i]);
  const float mean = sum / static_cast<float>(d);
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (std::int64_t i = 0; i < d; ++i) {
    const float centred = ToFloat(x[i]) - mean;
    squares += centred * centred;
  }
  const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(d) + eps);
  for (std::int64_t i = 0; i < d; ++i) {
    float y = (ToFloat(x[i]) - mean) * inverse;
    if (weight != nullptr) y = y * weight[i] + bias[i];
    if (scale != nullptr) y = y * (1.0f + scale[i]) + shift[i];
    out[i] = FromFloat<T>(y);
  }
}

template <typename T>
void RmsNormRow(const T* x, const float* weight, float eps, std::int64_t d, T* out) {
  const float inverse = 1.0f / std::sqrt(SumOfSquares(x, d) / static_cast<float>(d) + eps);
  for (std::int64_t i = 0; i < d; ++i) out[i] = FromFloat<T>(ToFloat(x[i]) * inverse * weight[i]);
}

}  // namespace

void CpuBackend::LayerNorm(const LayerNormArgs& args) {
  const Check check("LayerNorm");
  check.Rank(args.x, 3, "x");
  check.Compute(args.x, "x");
  check.Is(args.out, args.x.shape(), args.x.dtype(), "out");
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
  VisitCompute(args.x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    parallel_.Rows(batch * rows, d, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        const std::int64_t b = r / rows;
        const float* scale = args.scale.defined() ? args.scale.data<float>() + b * d : nullptr;
        const float* shift = args.shift.defined() ? args.shift.data<float>() + b * d : nullptr;
        LayerNormRow(args.x.data<T>() + r * d, weight, bias, scale, shift, args.eps, d,
                     args.out.data<T>() + r * d);
      }
    });
  });
}

void CpuBackend::RmsNorm(const RmsNormArgs& args) {
  const Check check("RmsNorm");
  check.Compute(args.x, "x");
  check.That(args.x.shape().rank() >= 1, "x", "has no dimension");
  const std::int64_t d = args.x.dim(-1);
  check.Is(args.weight, Shape{d}, DType::kF32, "weight");
  check.Holds(args.out, args.x.NumElements(), args.x.dtype(), "out");
  const std::int64_t rows = d == 0 ? 0 : args.x.NumElements() / d;
  VisitCompute(args.x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    parallel_.Rows(rows, d, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        RmsNormRow(args.x.data<T>() + r * d, args.weight.data<float>(), args.eps, d,
                   args.out.data<T>() + r * d);
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
  VisitCompute(args.x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    parallel_.Rows(batch * length, width, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        const T* x = args.x.data<T>() + r * width;
        T* out = args.out.data<T>() + r * width;
        float inverse = 1.0f;
        if (args.weight.defined()) {
          inverse = 1.0f / std::sqrt(SumOfSquares(x, width) / static_cast<float>(width) + args.eps);
        }
        const auto value = [&](std::int64_t i) {
          float y = ToFloat(x[i]) * inverse;
          if (args.weight.defined()) y *= args.weight.data<float>()[i];
          return args.relu_before_rotation && y < 0.0f ? 0.0f : y;
        };
        if (!args.cos.defined()) {
          for (std::int64_t i = 0; i < width; ++i) out[i] = FromFloat<T>(value(i));
          continue;
        }
        const std::int64_t pairs = head_size / 2;
        const float* cos = args.cos.data<float>() + (r % length) * pairs;
        const float* sin = args.sin.data<float>() + (r % length) * pairs;
        for (std::int64_t i = 0; i < width; i += 2) {
          const std::int64_t p = (i % head_size) / 2;
          const float even = value(i);
          const float odd = value(i + 1);
          out[i] = FromFloat<T>(even * cos[p] - odd * sin[p]);
          out[i + 1] = FromFloat<T>(even * sin[p] + odd * cos[p]);
        }
      }
    });
  });
}

void CpuBackend::ChannelNorm(const ChannelNormArgs& args) {
  const Check check("ChannelNorm");
  check.Rank(args.x, 4, "x");
  check.Compute(args.x, "x");
  const std::int64_t channels = args.x.dim(3);
  check.Is(args.gamma, Shape{channels}, DType::kF32, "gamma");
  check.Is(args.out, args.x.shape(), args.x.dtype(), "out");
  const std::int64_t rows = channels == 0 ? 0 : args.x.NumElements() / channels;
  const float root = std::sqrt(static_cast<float>(channels));
  const float* gamma = args.gamma.data<float>();
  VisitCompute(args.x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    parallel_.Rows(rows, channels, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        const T* x = args.x.data<T>() + r * channels;
        T* out = args.out.data<T>() + r * channels;
        const float norm = std::sqrt(SumOfSquares(x, channels));
        const float factor = root / std::max(norm, 1e-12f);
        for (std::int64_t i = 0; i < channels; ++i) {
          float y = ToFloat(x[i]) * factor * gamma[i];
          if (args.silu) y = y / (1.0f + std::exp(-y));
          out[i] = FromFloat<T>(y);
        }
      }
    });
  });
}

}  // namespace slalom
