// Layouts: latent patches and tokens, channels and frames, floats and pixels.
#include "kernels/cuda/elementwise.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

// The place of one latent element: [B, C, F, 2h, 2w].
struct LatentGrid {
  std::int64_t channels;
  std::int64_t frames;
  std::int64_t height;  // 2h
  std::int64_t width;   // 2w

  __device__ std::int64_t Index(std::int64_t sample, std::int64_t channel, std::int64_t frame,
                                std::int64_t y, std::int64_t x) const {
    return (((sample * channels + channel) * frames + frame) * height + y) * width + x;
  }
};

template <typename T>
struct PatchifyFunction {
  LatentGrid grid;
  const float* latent;
  T* tokens;  // [B, L, C * 4]
  template <int kWidth>
  __device__ void Apply(std::int64_t first) const {
    const std::int64_t columns = grid.channels * 4;
    float v[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      std::int64_t rest = (first + j) / columns;
      const int column = static_cast<int>((first + j) % columns);
      const std::int64_t x = rest % (grid.width / 2);
      rest /= grid.width / 2;
      const std::int64_t y = rest % (grid.height / 2);
      rest /= grid.height / 2;
      v[j] = latent[grid.Index(rest / grid.frames, column / 4, rest % grid.frames,
                               2 * y + (column / 2) % 2, 2 * x + column % 2)];
    }
    StoreFloats<kWidth>(tokens + first, v);
  }
};

template <typename T>
struct UnpatchifyFunction {
  LatentGrid grid;
  const T* tokens;  // [B, L, 4 * C]
  float* latent;
  template <int kWidth>
  __device__ void Apply(std::int64_t first) const {
    float v[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      std::int64_t rest = first + j;
      const std::int64_t x = rest % grid.width;
      rest /= grid.width;
      const std::int64_t y = rest % grid.height;
      rest /= grid.height;
      const std::int64_t frame = rest % grid.frames;
      rest /= grid.frames;
      const std::int64_t channel = rest % grid.channels;
      const std::int64_t sample = rest / grid.channels;
      const std::int64_t token =
          ((sample * grid.frames + frame) * (grid.height / 2) + y / 2) * (grid.width / 2) + x / 2;
      v[j] = ToFloat(tokens[(token * 4 + (y % 2) * 2 + x % 2) * grid.channels + channel]);
    }
    StoreFloats<kWidth>(latent + first, v);
  }
};

template <typename T>
struct InterleaveFunction {
  std::int64_t frame_pixels;  // H * W
  std::int64_t channels;      // C
  const T* x;                 // [T, H, W, 2 * C]
  T* out;                     // [2 * T, H, W, C]
  template <int kWidth>
  __device__ void Apply(std::int64_t first) const {
    const std::int64_t pixel = first / channels;
    const std::int64_t frame = pixel / frame_pixels;
    const std::int64_t source = (frame / 2 * frame_pixels + pixel % frame_pixels) * 2 + frame % 2;
    float v[kWidth];
    LoadFloats<kWidth>(x + source * channels + first % channels, v);
    StoreFloats<kWidth>(out + first, v);
  }
};

template <typename T>
struct PixelFunction {
  const T* x;
  std::uint8_t* out;
  template <int kWidth>
  __device__ void Apply(std::int64_t first) const {
    float v[kWidth];
    LoadFloats<kWidth>(x + first, v);
    std::uint8_t pixels[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float clamped = fminf(fmaxf(v[j], -1.0f), 1.0f);
      pixels[j] = static_cast<std::uint8_t>(255.0f * ((clamped + 1.0f) * 0.5f));
    }
    if constexpr (kWidth == 8) {
      uint2 packed;
      packed.x = pixels[0] | pixels[1] << 8 | pixels[2] << 16 | pixels[3] << 24;
      packed.y = pixels[4] | pixels[5] << 8 | pixels[6] << 16 | pixels[7] << 24;
      *reinterpret_cast<uint2*>(out + first) = packed;
    } else {
      for (int j = 0; j < kWidth; ++j) out[first + j] = pixels[j];
    }
  }
};

// Checks latent [B, C, F, 2h, 2w] f32 and tokens [B, F * h * w, C * 4] f32 or bf16.
LatentGrid CheckPatches(const Tensor& latent, const Tensor& tokens, const char* message) {
  Require(latent.defined() && latent.dtype() == DType::kF32 && latent.shape().rank() == 5, message);
  Require(tokens.defined() && IsComputeType(tokens.dtype()) && tokens.shape().rank() == 3, message);
  const LatentGrid grid{latent.dim(1), latent.dim(2), latent.dim(3), latent.dim(4)};
  Require(grid.height % 2 == 0 && grid.width % 2 == 0 && tokens.dim(0) == latent.dim(0) &&
              tokens.dim(1) == grid.frames * (grid.height / 2) * (grid.width / 2) &&
              tokens.dim(2) == grid.channels * 4,
          message);
  return grid;
}

template <typename T>
void RunInterleave(const Context& context, const InterleaveFramesArgs& args) {
  const std::int64_t channels = args.out.dim(3);
  const InterleaveFunction<T> function{args.out.dim(1) * args.out.dim(2), channels,
                                       args.x.data<T>(), args.out.data<T>()};
  RunElementwise(context, function, args.out.NumElements(),
                 channels % 8 == 0 && AllAligned16(function.x, function.out), "InterleaveFrames");
}

}  // namespace

void Patchify(const Context& context, const PatchifyArgs& args) {
  const LatentGrid grid =
      CheckPatches(args.latent, args.tokens, "Patchify: latent and tokens do not fit each other");
  const std::int64_t elements = args.tokens.NumElements();
  if (args.tokens.dtype() == DType::kBF16) {
    const PatchifyFunction<bf16> function{grid, args.latent.data<float>(),
                                          args.tokens.data<bf16>()};
    RunElementwise(context, function, elements, AllAligned16(function.tokens), "Patchify");
  } else {
    const PatchifyFunction<float> function{grid, args.latent.data<float>(),
                                           args.tokens.data<float>()};
    RunElementwise(context, function, elements, AllAligned16(function.tokens), "Patchify");
  }
}

void Unpatchify(const Context& context, const UnpatchifyArgs& args) {
  const LatentGrid grid =
      CheckPatches(args.latent, args.tokens, "Unpatchify: latent and tokens do not fit each other");
  const std::int64_t elements = args.latent.NumElements();
  if (args.tokens.dtype() == DType::kBF16) {
    const UnpatchifyFunction<bf16> function{grid, args.tokens.data<bf16>(),
                                            args.latent.data<float>()};
    RunElementwise(context, function, elements, AllAligned16(function.latent), "Unpatchify");
  } else {
    const UnpatchifyFunction<float> function{grid, args.tokens.data<float>(),
                                             args.latent.data<float>()};
    RunElementwise(context, function, elements, AllAligned16(function.latent), "Unpatchify");
  }
}

void InterleaveFrames(const Context& context, const InterleaveFramesArgs& args) {
  Require(args.x.defined() && args.x.shape().rank() == 4 && args.x.dim(3) % 2 == 0 &&
              IsComputeType(args.x.dtype()),
          "InterleaveFrames: x is not [T, H, W, 2 * C] of f32 or bf16");
  RequireTensor(args.out, {2 * args.x.dim(0), args.x.dim(1), args.x.dim(2), args.x.dim(3) / 2},
                args.x.dtype(), "InterleaveFrames: out");
  args.x.dtype() == DType::kBF16 ? RunInterleave<bf16>(context, args)
                                 : RunInterleave<float>(context, args);
}

void ToPixels(const Context& context, const ToPixelsArgs& args) {
  Require(args.x.defined() && IsComputeType(args.x.dtype()), "ToPixels: x is not f32 or bf16");
  RequireTensor(args.out, args.x.shape(), DType::kU8, "ToPixels: out");
  const std::int64_t elements = args.x.NumElements();
  auto* out = args.out.data<std::uint8_t>();
  if (args.x.dtype() == DType::kBF16) {
    const PixelFunction<bf16> function{args.x.data<bf16>(), out};
    RunElementwise(context, function, elements, AllAligned16(function.x, out), "ToPixels");
  } else {
    const PixelFunction<float> function{args.x.data<float>(), out};
    RunElementwise(context, function, elements, AllAligned16(function.x, out), "ToPixels");
  }
}

}  // namespace slalom::cuda
