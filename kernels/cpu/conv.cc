// Causal convolution over channels-last frames: the frames are laid out behind their history, once,
// and oneDNN does the rest.
#include <cstring>

#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_backend.h"

namespace slalom {
namespace {

struct ConvShape {
  std::int64_t frames, height, width, channels_in;  // of x, before doubling
  std::int64_t channels_out, kt, kh, kw;
  std::int64_t history;
  std::int64_t out_height, out_width;
};

ConvShape CheckConv(const ConvArgs& args) {
  const Check check("Conv");
  check.Rank(args.x, 4, "x");
  check.Compute(args.x, "x");
  check.Rank(args.weight, 5, "weight");
  const DType type = args.x.dtype();
  ConvShape s{args.x.dim(0),      args.x.dim(1),      args.x.dim(2),
              args.x.dim(3),      args.weight.dim(0), args.weight.dim(1),
              args.weight.dim(2), args.weight.dim(3), 0,
              args.x.dim(1),      args.x.dim(2)};
  check.Is(args.weight, Shape{s.channels_out, s.kt, s.kh, s.kw, s.channels_in}, type, "weight");
  check.That(s.kt % 2 == 1 && s.kh % 2 == 1 && s.kw % 2 == 1, "weight", "has an even kernel");
  if (args.upsample) {
    check.That(s.kt == 1, "upsample", "needs kt = 1");
    s.out_height *= 2;
    s.out_width *= 2;
  }
  if (args.history.defined()) {
    check.Rank(args.history, 4, "history");
    s.history = args.history.dim(0);
    check.Is(args.history, Shape{s.history, s.height, s.width, s.channels_in}, type, "history");
    check.That(s.history <= s.kt - 1, "history", "has more than kt - 1 frames");
  }
  if (args.bias.defined()) check.Is(args.bias, Shape{s.channels_out}, DType::kF32, "bias");
  const Shape out{s.frames, s.out_height, s.out_width, s.channels_out};
  check.Is(args.out, out, type, "out");
  if (args.residual.defined()) check.Is(args.residual, out, type, "residual");
  return s;
}

// Nearest: every pixel twice, every line twice.
void DoubleFrame(const std::byte* in, std::int64_t height, std::int64_t width, std::int64_t pixel,
                 std::byte* out) {
  const std::int64_t line = 2 * width * pixel;
  for (std::int64_t y = 0; y < height; ++y) {
    std::byte* first = out + 2 * y * line;
    for (std::int64_t x = 0; x < width; ++x) {
      const std::byte* from = in + (y * width + x) * pixel;
      std::copy(from, from + pixel, first + 2 * x * pixel);
      std::copy(from, from + pixel, first + (2 * x + 1) * pixel);
    }
    std::copy(first, first + line, first + line);
  }
}

}  // namespace

void CpuBackend::Conv(const ConvArgs& args) {
  const ConvShape s = CheckConv(args);
  if (args.out.NumElements() == 0) return;
  const DType type = args.x.dtype();
  const auto pixel = static_cast<std::int64_t>(ByteSize(type)) * s.channels_in;
  Tensor input = args.x;
  if (args.upsample) {
    input = Allocate(Shape{s.frames, s.out_height, s.out_width, s.channels_in}, type);
    parallel_.Tasks(s.frames, [&](std::int64_t f, int /*thread*/) {
      DoubleFrame(args.x.data<std::byte>() + f * s.height * s.width * pixel, s.height, s.width,
                  pixel, input.data<std::byte>() + f * s.out_height * s.out_width * pixel);
    });
  } else if (s.kt > 1) {
    input = Allocate(Shape{s.frames + s.kt - 1, s.height, s.width, s.channels_in}, type);
    const std::int64_t zeros = s.kt - 1 - s.history;
    if (zeros > 0) Zero(input.Slice(0, zeros));
    if (s.history > 0) Copy(args.history, input.Slice(zeros, s.kt - 1));
    Copy(args.x, input.Slice(s.kt - 1, s.kt - 1 + s.frames));
  }
  // oneDNN's bf16 needs AVX-512; elsewhere the convolution runs in f32.
  const bool widen = type == DType::kBF16 && !features_.avx512;
  const auto in_f32 = [&](const Tensor& x) {
    if (!widen) return x;
    Tensor copy = Allocate(x.shape(), DType::kF32);
    Copy(x, copy);
    return copy;
  };
  const Tensor weight = in_f32(args.weight);
  const Tensor out = widen ? Allocate(args.out.shape(), DType::kF32) : args.out;
  input = in_f32(input);
  if (args.residual.defined() && args.residual.raw() != out.raw()) Copy(args.residual, out);
  onednn_.Convolution({.frames_out = s.frames,
                       .height = s.out_height,
                       .width = s.out_width,
                       .channels_in = s.channels_in,
                       .channels_out = s.channels_out,
                       .kt = s.kt,
                       .kh = s.kh,
                       .kw = s.kw,
                       .type = widen ? DType::kF32 : type,
                       .x = input.raw(),
                       .weight = weight.raw(),
                       .bias = args.bias.defined() ? args.bias.data<float>() : nullptr,
                       .add_to_out = args.residual.defined(),
                       .out = out.raw()});
  if (widen) Copy(out, args.out);
}

}  // namespace slalom
