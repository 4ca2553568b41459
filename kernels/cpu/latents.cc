// Latents and frames: reorderings, pixels, and the check for non-finite values.
#include <cmath>
#include <vector>

#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_backend.h"

namespace slalom {
namespace {

// One frame row of patches: where its tokens and its latent pixels are.
struct PatchGrid {
  std::int64_t batch, channels, frames, height, width;  // height and width in patches

  std::int64_t rows() const { return batch * frames * height; }

  // visit(token offset in tokens, latent offset of channel 0's upper left pixel) for each patch of
  // row r, left to right.
  template <typename Visit>
  void Row(std::int64_t r, const Visit& visit) const {
    const std::int64_t y = r % height;
    const std::int64_t f = r / height % frames;
    const std::int64_t b = r / height / frames;
    for (std::int64_t x = 0; x < width; ++x) {
      const std::int64_t token = (b * frames + f) * height * width + y * width + x;
      const std::int64_t pixel =
          b * channels * FrameStride() * frames + f * FrameStride() + 2 * y * LineStride() + 2 * x;
      visit(token, pixel);
    }
  }
  std::int64_t LineStride() const { return 2 * width; }
  std::int64_t FrameStride() const { return 4 * height * width; }
  std::int64_t ChannelStride() const { return frames * FrameStride(); }
};

PatchGrid CheckPatches(const Check& check, const Tensor& latent, const Tensor& tokens) {
  check.Rank(latent, 5, "latent");
  check.That(latent.dtype() == DType::kF32, "latent", "is not F32");
  check.That(latent.dim(3) % 2 == 0 && latent.dim(4) % 2 == 0, "latent",
             "has an odd height or width: " + ToString(latent.shape()));
  check.Compute(tokens, "tokens");
  check.Holds(tokens, latent.NumElements(), tokens.dtype(), "tokens");
  return {latent.dim(0), latent.dim(1), latent.dim(2), latent.dim(3) / 2, latent.dim(4) / 2};
}

}  // namespace

void CpuBackend::Patchify(const PatchifyArgs& args) {
  const PatchGrid grid = CheckPatches(Check("Patchify"), args.latent, args.tokens);
  const float* latent = args.latent.data<float>();
  VisitCompute(args.tokens.dtype(), [&](auto tag) {
    using T = decltype(tag);
    T* tokens = args.tokens.data<T>();
    parallel_.Tasks(grid.rows(), [&](std::int64_t r, int /*thread*/) {
      grid.Row(r, [&](std::int64_t token, std::int64_t pixel) {
        T* out = tokens + token * grid.channels * 4;
        for (std::int64_t c = 0; c < grid.channels; ++c) {
          const float* in = latent + pixel + c * grid.ChannelStride();
          for (int k = 0; k < 4; ++k) {
            out[c * 4 + k] = FromFloat<T>(in[(k / 2) * grid.LineStride() + k % 2]);
          }
        }
      });
    });
  });
}

void CpuBackend::Unpatchify(const UnpatchifyArgs& args) {
  const PatchGrid grid = CheckPatches(Check("Unpatchify"), args.latent, args.tokens);
  float* latent = args.latent.data<float>();
  VisitCompute(args.tokens.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const T* tokens = args.tokens.data<T>();
    parallel_.Tasks(grid.rows(), [&](std::int64_t r, int /*thread*/) {
      grid.Row(r, [&](std::int64_t token, std::int64_t pixel) {
        const T* in = tokens + token * grid.channels * 4;
        for (std::int64_t c = 0; c < grid.channels; ++c) {
          float* out = latent + pixel + c * grid.ChannelStride();
          for (int k = 0; k < 4; ++k) {
            out[(k / 2) * grid.LineStride() + k % 2] = ToFloat(in[k * grid.channels + c]);
          }
        }
      });
    });
  });
}

void CpuBackend::InterleaveFrames(const InterleaveFramesArgs& args) {
  const Check check("InterleaveFrames");
  check.Rank(args.x, 4, "x");
  check.That(args.x.dim(3) % 2 == 0, "x", "has an odd number of channels");
  const std::int64_t frames = args.x.dim(0);
  const std::int64_t pixels = args.x.dim(1) * args.x.dim(2);
  const std::int64_t channels = args.x.dim(3) / 2;
  check.Is(args.out, Shape{2 * frames, args.x.dim(1), args.x.dim(2), channels}, args.x.dtype(),
           "out");
  const auto run = static_cast<std::int64_t>(ByteSize(args.x.dtype())) * channels;
  const std::byte* x = args.x.data<std::byte>();
  std::byte* out = args.out.data<std::byte>();
  parallel_.Rows(frames * pixels, 2 * channels, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t frame = i / pixels;
      const std::int64_t pixel = i % pixels;
      for (std::int64_t p = 0; p < 2; ++p) {
        const std::byte* from = x + (2 * i + p) * run;
        std::copy(from, from + run, out + ((2 * frame + p) * pixels + pixel) * run);
      }
    }
  });
}

void CpuBackend::ToPixels(const ToPixelsArgs& args) {
  const Check check("ToPixels");
  check.Compute(args.x, "x");
  check.Is(args.out, args.x.shape(), DType::kU8, "out");
  VisitCompute(args.x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    parallel_.Ranges(args.x.NumElements(), 1 << 15, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const float x = ToFloat(args.x.data<T>()[i]);
        // Written so that a NaN becomes 0.
        const float clamped = x > -1.0f ? std::min(x, 1.0f) : -1.0f;
        args.out.data<std::uint8_t>()[i] =
            static_cast<std::uint8_t>(255.0f * ((clamped + 1.0f) / 2.0f));
      }
    });
  });
}

void CpuBackend::CountNonFinite(const Tensor& x, const Tensor& counter) {
  const Check check("CountNonFinite");
  check.Compute(x, "x");
  check.Is(counter, Shape{1}, DType::kI64, "counter");
  constexpr std::int64_t kGrain = 1 << 16;
  const std::int64_t n = x.NumElements();
  std::vector<std::int64_t> counts(static_cast<std::size_t>(n / kGrain + 1));
  VisitCompute(x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    parallel_.Ranges(n, kGrain, [&](std::int64_t begin, std::int64_t end) {
      std::int64_t count = 0;
      for (std::int64_t i = begin; i < end; ++i) {
        count += std::isfinite(ToFloat(x.data<T>()[i])) ? 0 : 1;
      }
      counts[static_cast<std::size_t>(begin / kGrain)] = count;
    });
  });
  for (const std::int64_t count : counts) *counter.data<std::int64_t>() += count;
}

}  // namespace slalom
