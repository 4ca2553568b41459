// Convolution with mma.sync: tiles of 128 output pixels, k in steps of 32, four stages of cp.async.
#include "kernels/cuda/check.h"
#include "kernels/cuda/conv.h"
#include "kernels/cuda/fragments.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/shared_address.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = 128;  // rows of a tile
constexpr int kDepth = 32;    // k per stage
constexpr int kChunks = kDepth / 8;
constexpr int kStages = 4;
constexpr int kRowsPerThread = kPixels * kChunks / kThreads;

// A tile of kPixels x kChannels, split over a grid of warps.
template <int kChannels>
struct Tiling {
  static constexpr int kWarpsN = kChannels >= 64 ? 2 : 1;
  static constexpr int kWarpsM = kThreads / 32 / kWarpsN;
  static constexpr int kWarpPixels = kPixels / kWarpsM;
  static constexpr int kWarpChannels = kChannels / kWarpsN;
  static constexpr int kPixelFragments = kWarpPixels / 16;
  static constexpr int kChannelPairs = kWarpChannels / 16;
  static_assert(kPixelFragments * 16 * kWarpsM == kPixels);
  static_assert(kChannelPairs * 16 * kWarpsN == kChannels);
};

template <int kChannels>
struct alignas(128) SharedTiles {
  bf16 pixels[kStages][kPixels][kDepth];
  bf16 weights[kStages][kChannels][kDepth];
};

struct Parameters {
  ConvShape shape;
  const bf16* x;
  const bf16* history;
  const bf16* weight;
  const float* bias;
  const bf16* residual;
  bf16* out;
};

// What one thread brings: the same 8 values of k of some pixels and some output channels.
template <int kChannels>
struct Loader {
  const Parameters& p;
  SharedTiles<kChannels>& shared;
  int chunk;
  int first_channel;
  ConvTap tap;
  int k;
  ConvPixel pixels[kRowsPerThread];
  bool inside[kRowsPerThread];

  __device__ Loader(const Parameters& parameters, SharedTiles<kChannels>& tiles,
                    std::int64_t first_pixel, int channel)
      : p(parameters),
        shared(tiles),
        chunk(threadIdx.x % kChunks),
        first_channel(channel),
        tap(ConvTap::At(parameters.shape, chunk * 8)),
        k(chunk * 8) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const std::int64_t index = first_pixel + Row(i);
      inside[i] = index < p.shape.pixels();
      pixels[i] = ConvPixel::At(p.shape, inside[i] ? index : 0);
    }
  }
  __device__ static int Row(int i) { return threadIdx.x / kChunks + i * (kThreads / kChunks); }

  __device__ void Load(int stage) {
    const auto pixel_base = SharedAddress(&shared.pixels[stage]);
    const auto weight_base = SharedAddress(&shared.weights[stage]);
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const ConvSource source = ConvSource::Find(p.shape, pixels[i], tap);
      const bool valid = inside[i] && source.place != ConvSource::Place::kNowhere;
      const bf16* from = source.place == ConvSource::Place::kHistory ? p.history : p.x;
      CopyAsync16(pixel_base + SwizzledOffset<kChunks>(Row(i), chunk),
                  from + (valid ? source.offset : 0), valid);
    }
    const int depth = p.shape.depth();
#pragma unroll
    for (int row = threadIdx.x / kChunks; row < kChannels; row += kThreads / kChunks) {
      const int channel = first_channel + row;
      const bool valid = channel < p.shape.channels_out && k < depth;
      CopyAsync16(weight_base + SwizzledOffset<kChunks>(row, chunk),
                  p.weight + (valid ? static_cast<std::int64_t>(channel) * depth + k : 0), valid);
    }
    k += kDepth;
    tap.Advance(p.shape, kDepth);
  }
};

template <int kChannels>
struct Accumulators {
  using Tile = Tiling<kChannels>;
  float sums[Tile::kPixelFragments][2 * Tile::kChannelPairs][4] = {};

  __device__ static int WarpPixel() {
    return static_cast<int>(threadIdx.x) / 32 / Tile::kWarpsN * Tile::kWarpPixels;
  }
  __device__ static int WarpChannel() {
    return static_cast<int>(threadIdx.x) / 32 % Tile::kWarpsN * Tile::kWarpChannels;
  }

  __device__ void AddStage(const bf16 (&pixels)[kPixels][kDepth],
                           const bf16 (&weights)[kChannels][kDepth]) {
    const FragmentReader<Operand::kLeft, kDepth> left(pixels, WarpPixel());
    const FragmentReader<Operand::kRightTransposed, kDepth> right(weights, WarpChannel());
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      std::uint32_t a[Tile::kPixelFragments][4];
#pragma unroll
      for (int i = 0; i < Tile::kPixelFragments; ++i) left.Load(a[i], i * 16, step * 16);
#pragma unroll
      for (int pair = 0; pair < Tile::kChannelPairs; ++pair) {
        std::uint32_t b[4];
        right.Load(b, pair * 16, step * 16);
#pragma unroll
        for (int i = 0; i < Tile::kPixelFragments; ++i) {
          Mma16x16x16(sums[i][2 * pair], sums[i][2 * pair + 1], a[i], b);
        }
      }
    }
  }

  __device__ void Store(const Parameters& p, std::int64_t first_pixel, int first_channel) const {
    const int lane = threadIdx.x % 32;
    const int channels = p.shape.channels_out;
#pragma unroll
    for (int i = 0; i < Tile::kPixelFragments; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::int64_t pixel = first_pixel + WarpPixel() + i * 16 + half * 8 + lane / 4;
        if (pixel >= p.shape.pixels()) continue;
#pragma unroll
        for (int j = 0; j < 2 * Tile::kChannelPairs; ++j) {
          const int channel = first_channel + WarpChannel() + j * 8 + 2 * (lane % 4);
          StorePair(p, pixel * channels + channel, channel, sums[i][j][2 * half],
                    sums[i][j][2 * half + 1]);
        }
      }
    }
  }

  __device__ static void StorePair(const Parameters& p, std::int64_t at, int channel, float first,
                                   float second) {
    const int channels = p.shape.channels_out;
    if (channel >= channels) return;
    const bool both = channel + 1 < channels;
    if (p.bias != nullptr) {
      first += p.bias[channel];
      if (both) second += p.bias[channel + 1];
    }
    if (channels % 2 == 0) {
      if (p.residual != nullptr) {
        const float2 pair = UnpackBf16(*reinterpret_cast<const std::uint32_t*>(p.residual + at));
        first += pair.x;
        second += pair.y;
      }
      *reinterpret_cast<std::uint32_t*>(p.out + at) = PackBf16(first, second);
      return;
    }
    if (p.residual != nullptr) {
      first += ToFloat(p.residual[at]);
      if (both) second += ToFloat(p.residual[at + 1]);
    }
    p.out[at] = FromFloat<bf16>(first);
    if (both) p.out[at + 1] = FromFloat<bf16>(second);
  }
};

// Blocks that run together share pixels: the grid's x runs over the channel tiles.
template <int kChannels>
__global__ void __launch_bounds__(kThreads, 2) ConvKernel(const Parameters p) {
  extern __shared__ std::byte dynamic_shared[];
  auto& shared = *reinterpret_cast<SharedTiles<kChannels>*>(dynamic_shared);
  const std::int64_t first_pixel = static_cast<std::int64_t>(blockIdx.y) * kPixels;
  const int first_channel = blockIdx.x * kChannels;
  const int steps = (p.shape.depth() + kDepth - 1) / kDepth;
  Loader<kChannels> loader(p, shared, first_pixel, first_channel);
  Accumulators<kChannels> accumulators;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) loader.Load(stage);
    CopyAsyncCommit();
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    CopyAsyncWait<kStages - 2>();
    __syncthreads();  // the stage is there for all, and the one read last is free
    if (step + kStages - 1 < steps) loader.Load((step + kStages - 1) % kStages);
    CopyAsyncCommit();
    accumulators.AddStage(shared.pixels[step % kStages], shared.weights[step % kStages]);
  }
  accumulators.Store(p, first_pixel, first_channel);
}

template <int kChannels>
void Launch(const Context& context, const Parameters& parameters) {
  constexpr std::size_t kSharedBytes = sizeof(SharedTiles<kChannels>);
  Check(cudaFuncSetAttribute(ConvKernel<kChannels>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kSharedBytes),
        "TensorCoreConv: shared memory");
  const std::int64_t tiles = (parameters.shape.pixels() + kPixels - 1) / kPixels;
  Require(tiles < 65536, "Conv: too many pixels in one call");
  const dim3 grid(
      static_cast<unsigned>((parameters.shape.channels_out + kChannels - 1) / kChannels),
      static_cast<unsigned>(tiles));
  ConvKernel<kChannels><<<grid, kThreads, kSharedBytes, context.stream>>>(parameters);
  CheckLaunch("TensorCoreConv");
}

}  // namespace

void TensorCoreConv(const Context& context, const ConvProblem& problem) {
  const Parameters parameters{problem.shape,
                              static_cast<const bf16*>(problem.x),
                              static_cast<const bf16*>(problem.history),
                              static_cast<const bf16*>(problem.weight),
                              problem.bias,
                              static_cast<const bf16*>(problem.residual),
                              static_cast<bf16*>(problem.out)};
  const int channels = problem.shape.channels_out;
  if (channels <= 16) return Launch<16>(context, parameters);
  // The Wan decoder has 96, 192 and 384: all whole multiples of 96.
  if (channels % 96 == 0) return Launch<96>(context, parameters);
  if (channels <= 64) return Launch<64>(context, parameters);
  Launch<128>(context, parameters);
}

}  // namespace slalom::cuda
