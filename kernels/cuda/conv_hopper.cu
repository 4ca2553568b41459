// Convolution for Hopper: a producer warp brings, for each tap and 96 channels, a patch of pixels
// and the weights by TMA, which also pads with zeros at the edges of a frame; two warpgroups
// multiply them with wgmma. A tile lies in one frame, so taps in front of the history are left out
// whole.
#include <algorithm>

#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/check.h"
#include "kernels/cuda/conv.h"
#include "kernels/cuda/hopper/mbarrier.cuh"
#include "kernels/cuda/hopper/ring.h"
#include "kernels/cuda/hopper/tensor_map.h"
#include "kernels/cuda/hopper/tma.cuh"
#include "kernels/cuda/hopper/wgmma.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

using namespace hopper;

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kPanel = 32;  // channels per box: 64 bytes
constexpr int kPanels = 3;
constexpr int kDepth = kPanel * kPanels;  // channels per stage
constexpr int kStages = 3;
constexpr int kConsumerRegisters = 240;
constexpr int kProducerRegisters = 24;

// kFragments blocks of 64 pixels per consumer, times kChannels output channels.
template <int kChannelCount, int kFragmentCount>
struct Tiling {
  static constexpr int kChannels = kChannelCount;
  static constexpr int kFragments = kFragmentCount;
  static constexpr int kPixels = kConsumers * kFragments * 64;
  static constexpr std::uint32_t kStageBytes = (kPixels + kChannels) * kDepth * 2;
};

template <class Tile>
struct alignas(1024) SharedStorage {
  bf16 pixels[kStages][kPanels][Tile::kPixels][kPanel];
  bf16 weights[kStages][kPanels][Tile::kChannels][kPanel];
  std::uint64_t full[kStages], empty[kStages];
};

struct Parameters {
  ConvShape shape;
  int patch_height, patch_width;  // their product is a tile's pixels
  int patches_per_line;
  const float* bias;
  const bf16* residual;
  bf16* out;
};

// A tile's place: frame, the patch's upper left pixel, first output channel.
struct Place {
  int frame, y, x, channel;

  template <class Tile>
  __device__ static Place OfBlock(const Parameters& p) {
    const int patch = blockIdx.y;
    return {static_cast<int>(blockIdx.z), patch / p.patches_per_line * p.patch_height,
            patch % p.patches_per_line * p.patch_width,
            static_cast<int>(blockIdx.x) * Tile::kChannels};
  }
  // The first dt whose frame exists, in x or in the history.
  __device__ int FirstTap(const ConvShape& shape) const {
    return max(0, shape.kt - 1 - frame - shape.history);
  }
  __device__ int Stages(const ConvShape& shape) const {
    return (shape.kt - FirstTap(shape)) * shape.kh * shape.kw * (shape.channels_in / kDepth);
  }
};

template <class Tile>
__device__ void Produce(const CUtensorMap* x_map, const CUtensorMap* history_map,
                        const CUtensorMap* weight_map, SharedStorage<Tile>& shared,
                        const Parameters& p, const Place& place) {
  const ConvShape& shape = p.shape;
  ConvTap tap;
  tap.dt = place.FirstTap(shape);
  Ring<kStages> ring;
  for (; tap.dt < shape.kt; tap.Advance(shape, kDepth), ring.Next()) {
    const int frame = place.frame + tap.dt - (shape.kt - 1);
    const CUtensorMap* map = frame >= 0 ? x_map : history_map;
    const int row = ((tap.dt * shape.kh + tap.dy) * shape.kw + tap.dx) * shape.channels_in;
    BarrierWait(&shared.empty[ring.stage], ring.parity ^ 1);
    BarrierExpect(&shared.full[ring.stage], Tile::kStageBytes);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const int channel = tap.channel + panel * kPanel;
      CopyBox(map, &shared.full[ring.stage], shared.pixels[ring.stage][panel], channel,
              place.x + tap.dx - shape.kw / 2, place.y + tap.dy - shape.kh / 2,
              frame >= 0 ? frame : frame + shape.history);
      CopyBox(weight_map, &shared.full[ring.stage], shared.weights[ring.stage][panel],
              row + channel, place.channel, 0, 0);
    }
  }
}

template <class Tile>
__device__ void Multiply(float (&sums)[Tile::kChannels / 2], std::uint64_t pixels,
                         std::uint64_t weights, bool accumulate) {
  if constexpr (Tile::kChannels == 192) {
    Wgmma64x192<false>(sums, pixels, weights, accumulate);
  } else {
    Wgmma64x96<false>(sums, pixels, weights, accumulate);
  }
}

template <class Tile>
__device__ void Consume(SharedStorage<Tile>& shared, int group, int stages,
                        float (&sums)[Tile::kFragments][Tile::kChannels / 2]) {
  Ring<kStages> ring;
  Ring<kStages> released;  // one stage behind: its products are finished
  for (int i = 0; i < stages; ++i, ring.Next()) {
    BarrierWait(&shared.full[ring.stage], ring.parity);
#pragma unroll
    for (int f = 0; f < Tile::kFragments; ++f) HoldRegisters(sums[f]);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      const int panel = step / 2;
      const std::uint32_t column_bytes = step % 2 * 32;
      const std::uint64_t weights =
          NarrowSwizzledTile(SharedAddress(shared.weights[ring.stage][panel]) + column_bytes);
#pragma unroll
      for (int f = 0; f < Tile::kFragments; ++f) {
        const int row = (group * Tile::kFragments + f) * 64;
        const std::uint64_t pixels =
            NarrowSwizzledTile(SharedAddress(shared.pixels[ring.stage][panel][row]) + column_bytes);
        Multiply<Tile>(sums[f], pixels, weights, i > 0 || step > 0);
      }
    }
    WgmmaCommit();
    if (i == 0) continue;
    WgmmaWait<1>();
    if (threadIdx.x % 32 == 0) BarrierArrive(&shared.empty[released.stage]);
    released.Next();
  }
  WgmmaWait<0>();
#pragma unroll
  for (int f = 0; f < Tile::kFragments; ++f) HoldRegisters(sums[f]);
}

// Adds bias and residual to a thread's part of 64 pixels and stores it.
template <int kChannels>
__device__ void StoreFragment(const Parameters& p, const Place& place, int first_pixel,
                              float (&sums)[kChannels / 2]) {
  const ConvShape& shape = p.shape;
  const int thread = threadIdx.x % kWarpgroup;
  const int column = place.channel + 2 * (thread % 4);
  if (p.bias != nullptr) {
#pragma unroll
    for (int j = 0; j < kChannels / 8; ++j) {
      const float2 bias = *reinterpret_cast<const float2*>(p.bias + column + 8 * j);
      sums[4 * j] += bias.x;
      sums[4 * j + 1] += bias.y;
      sums[4 * j + 2] += bias.x;
      sums[4 * j + 3] += bias.y;
    }
  }
  bf16* rows[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int pixel = first_pixel + thread / 32 * 16 + thread % 32 / 4 + 8 * r;
    const int y = place.y + pixel / p.patch_width;
    const int x = place.x + pixel % p.patch_width;
    rows[r] = nullptr;
    if (y >= shape.height || x >= shape.width) continue;
    const std::int64_t at =
        ((static_cast<std::int64_t>(place.frame) * shape.height + y) * shape.width + x) *
        shape.channels_out;
    rows[r] = p.out + at + place.channel;
    if (p.residual == nullptr) continue;
#pragma unroll
    for (int j = 0; j < kChannels / 8; ++j) {
      const float2 pair =
          UnpackBf16(*reinterpret_cast<const std::uint32_t*>(p.residual + at + column + 8 * j));
      sums[4 * j + 2 * r] += pair.x;
      sums[4 * j + 2 * r + 1] += pair.y;
    }
  }
  StoreRows(sums, rows[0], rows[1]);
}

// Blocks that run together work on the same frame and share its lines in the L2 cache.
template <class Tile>
__global__ void __launch_bounds__(kThreads, 1)
    HopperConvKernel(const __grid_constant__ CUtensorMap x_map,
                     const __grid_constant__ CUtensorMap history_map,
                     const __grid_constant__ CUtensorMap weight_map, const Parameters p) {
  extern __shared__ std::byte dynamic_shared[];
  auto& shared = *reinterpret_cast<SharedStorage<Tile>*>(
      dynamic_shared + (1024 - SharedAddress(dynamic_shared) % 1024) % 1024);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      BarrierInit(&shared.full[stage], 1);
      BarrierInit(&shared.empty[stage], kConsumers * kWarpgroup / 32);
    }
    BarrierInitFence();
  }
  __syncthreads();
  const Place place = Place::OfBlock<Tile>(p);
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (warpgroup == 0) {
    LowerRegisters<kProducerRegisters>();
    if (threadIdx.x == 0) Produce<Tile>(&x_map, &history_map, &weight_map, shared, p, place);
  } else {
    RaiseRegisters<kConsumerRegisters>();
    const int group = warpgroup - 1;
    float sums[Tile::kFragments][Tile::kChannels / 2];
    Consume<Tile>(shared, group, place.Stages(p.shape), sums);
#pragma unroll
    for (int f = 0; f < Tile::kFragments; ++f) {
      StoreFragment<Tile::kChannels>(p, place, (group * Tile::kFragments + f) * 64, sums[f]);
    }
  }
}

CUtensorMap FramesMap(const void* data, int frames, const ConvShape& shape, int patch_height,
                      int patch_width) {
  const auto c = static_cast<std::uint64_t>(shape.channels_in);
  const auto w = static_cast<std::uint64_t>(shape.width);
  const auto h = static_cast<std::uint64_t>(shape.height);
  return MakeTensorMap(data, {c, w, h, static_cast<std::uint64_t>(frames)}, {c, w * c, h * w * c},
                       {kPanel, static_cast<std::uint32_t>(patch_width),
                        static_cast<std::uint32_t>(patch_height), 1});
}

std::int64_t Patches(int extent, int patch) { return (extent + patch - 1) / patch; }

template <class Tile>
void Launch(const Context& context, const ConvProblem& problem) {
  const ConvShape& shape = problem.shape;
  // The patch that covers a frame with the fewest pixels to spare; wider is better for the caches.
  int patch_width = 64;
  for (const int width : {32, 16, 8}) {
    const auto covered = [&](int w) {
      return Patches(shape.width, w) * Patches(shape.height, Tile::kPixels / w);
    };
    if (covered(width) < covered(patch_width)) patch_width = width;
  }
  const int patch_height = Tile::kPixels / patch_width;
  const auto depth = static_cast<std::uint64_t>(shape.depth());
  const auto channels = static_cast<std::uint64_t>(shape.channels_out);
  const CUtensorMap x_map = FramesMap(problem.x, shape.frames, shape, patch_height, patch_width);
  const CUtensorMap history_map = shape.history > 0 ? FramesMap(problem.history, shape.history,
                                                                shape, patch_height, patch_width)
                                                    : x_map;
  const CUtensorMap weight_map =
      MakeTensorMap(problem.weight, {depth, channels, 1, 1},
                    {depth, depth * channels, depth * channels}, {kPanel, Tile::kChannels, 1, 1});
  const Parameters parameters{shape,
                              patch_height,
                              patch_width,
                              static_cast<int>(Patches(shape.width, patch_width)),
                              problem.bias,
                              static_cast<const bf16*>(problem.residual),
                              static_cast<bf16*>(problem.out)};
  constexpr std::size_t kSharedBytes = sizeof(SharedStorage<Tile>) + 1024;  // room to align
  static_assert(kSharedBytes <= 227 * 1024);
  Check(cudaFuncSetAttribute(HopperConvKernel<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kSharedBytes),
        "HopperConv: shared memory");
  const std::int64_t patches =
      Patches(shape.width, patch_width) * Patches(shape.height, patch_height);
  Require(patches < 65536 && shape.frames < 65536, "Conv: too many pixels in one call");
  const dim3 grid(static_cast<unsigned>(shape.channels_out / Tile::kChannels),
                  static_cast<unsigned>(patches), static_cast<unsigned>(shape.frames));
  HopperConvKernel<Tile><<<grid, kThreads, kSharedBytes, context.stream>>>(x_map, history_map,
                                                                           weight_map, parameters);
  CheckLaunch("HopperConv");
}

}  // namespace

void HopperConv(const Context& context, const ConvProblem& problem) {
  if (problem.shape.channels_out % 192 == 0) {
    Launch<Tiling<192, 1>>(context, problem);
  } else {
    Launch<Tiling<96, 2>>(context, problem);
  }
}

}  // namespace slalom::cuda
