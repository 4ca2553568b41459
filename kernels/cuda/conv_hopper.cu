// Convolution for Hopper. For each frame and group of channels a producer brings the pixels of a
// patch and of its surroundings by TMA, which also pads with zeros at the edges of a frame; all
// taps of that frame then read the same copy, each from its own start. Another producer brings the
// weights tap by tap; two warpgroups multiply with wgmma. A tile lies in one frame, so taps in
// front of the history are left out whole.
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
constexpr int kPatchWidth = 8;  // pixels
constexpr int kMaxTaps = 3;     // of a line or column of the kernel
constexpr int kPatchStages = 2;
constexpr int kConsumerRegisters = 232;
constexpr int kProducerRegisters = 40;

// Output channels, a multiple of 96 or at most 8; fragments of 8 lines of 8 pixels per consumer;
// and input channels per stage, in panels that are a row of the swizzle.
template <int kChannelCount, int kFragmentCount, int kPanelCount, int kPanelWidth>
struct Tiling {
  static constexpr int kChannels = kChannelCount;
  static constexpr int kFragments = kFragmentCount;
  static constexpr int kPatchHeight = kConsumers * kFragments * 8;
  static constexpr int kPanels = kPanelCount;
  static constexpr int kPanel = kPanelWidth;
  static constexpr int kDepth = kPanels * kPanel;
  static constexpr int kWeightStages = kChannels == 8 ? 16 : 5;
  static constexpr std::uint32_t kRowBytes = kPanel * 2;
  static constexpr std::uint32_t kWeightBytes = kChannels * kDepth * 2;
  // A patch with its surroundings, to a multiple of the swizzle's 1024 bytes.
  static constexpr int kPatchRows =
      ((kPatchWidth + kMaxTaps - 1) * (kPatchHeight + kMaxTaps - 1) + 15) / 16 * 16;
};

template <class Tile>
struct alignas(1024) SharedStorage {
  bf16 pixels[kPatchStages][Tile::kPanels][Tile::kPatchRows][Tile::kPanel];
  bf16 weights[Tile::kWeightStages][Tile::kPanels][Tile::kChannels][Tile::kPanel];
  std::uint64_t patch_full[kPatchStages], patch_empty[kPatchStages];
  std::uint64_t weight_full[Tile::kWeightStages], weight_empty[Tile::kWeightStages];
};

struct Parameters {
  ConvShape shape;
  int patches_per_line;
  const float* bias;
  const bf16* residual;
  bf16* out;
};

// A tile's place: frame, the patch's upper left pixel in x, first output channel. With doubling a
// tile computes every second pixel of every second line, one of four `phases`: these read their
// pixels from x as if nothing was doubled, and only the taps' places differ.
struct Place {
  int frame, y, x, channel, phase_y, phase_x;

  template <class Tile>
  __device__ static Place OfBlock(const Parameters& p) {
    const int doubling = p.shape.doubling;
    const int patch = blockIdx.y >> 2 * doubling;
    return {static_cast<int>(blockIdx.z),
            patch / p.patches_per_line * Tile::kPatchHeight,
            patch % p.patches_per_line * kPatchWidth,
            static_cast<int>(blockIdx.x) * Tile::kChannels,
            static_cast<int>(blockIdx.y) >> 1 & doubling,
            static_cast<int>(blockIdx.y) & doubling};
  }
  // The first dt whose frame exists, in x or in the history.
  __device__ int FirstTap(const ConvShape& shape) const {
    return max(0, shape.kt - 1 - frame - shape.history);
  }
  // The row of a patch at which a tap's pixels begin.
  __device__ int FirstRow(const ConvShape& shape, int dy, int dx) const {
    const int line = ((phase_y + dy - shape.kh / 2) >> shape.doubling) + shape.kh / 2;
    const int column = ((phase_x + dx - shape.kw / 2) >> shape.doubling) + shape.kw / 2;
    return line * (kPatchWidth + shape.kw - 1) + column;
  }
};

template <class Tile>
__device__ void ProducePatches(const CUtensorMap* x_map, const CUtensorMap* history_map,
                               SharedStorage<Tile>& shared, const Parameters& p,
                               const Place& place) {
  const ConvShape& shape = p.shape;
  const std::uint32_t bytes = (kPatchWidth + shape.kw - 1) * (Tile::kPatchHeight + shape.kh - 1) *
                              Tile::kPanels * Tile::kRowBytes;
  Ring<kPatchStages> ring;
  for (int dt = place.FirstTap(shape); dt < shape.kt; ++dt) {
    const int frame = place.frame + dt - (shape.kt - 1);
    const CUtensorMap* map = frame >= 0 ? x_map : history_map;
    for (int channel = 0; channel < shape.channels_in; channel += Tile::kDepth, ring.Next()) {
      BarrierWait(&shared.patch_empty[ring.stage], ring.parity ^ 1);
      BarrierExpect(&shared.patch_full[ring.stage], bytes);
#pragma unroll
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        CopyBox(map, &shared.patch_full[ring.stage], shared.pixels[ring.stage][panel],
                channel + panel * Tile::kPanel, place.x - shape.kw / 2, place.y - shape.kh / 2,
                frame >= 0 ? frame : frame + shape.history);
      }
    }
  }
}

template <class Tile>
__device__ void ProduceWeights(const CUtensorMap* weight_map, SharedStorage<Tile>& shared,
                               const Parameters& p, const Place& place) {
  const ConvShape& shape = p.shape;
  const int taps = shape.kh * shape.kw;
  Ring<Tile::kWeightStages> ring;
  for (int dt = place.FirstTap(shape); dt < shape.kt; ++dt) {
    for (int channel = 0; channel < shape.channels_in; channel += Tile::kDepth) {
      for (int tap = 0; tap < taps; ++tap, ring.Next()) {
        BarrierWait(&shared.weight_empty[ring.stage], ring.parity ^ 1);
        BarrierExpect(&shared.weight_full[ring.stage], Tile::kWeightBytes);
        const int depth = (dt * taps + tap) * shape.channels_in + channel;
#pragma unroll
        for (int panel = 0; panel < Tile::kPanels; ++panel) {
          CopyBox(weight_map, &shared.weight_full[ring.stage], shared.weights[ring.stage][panel],
                  depth + panel * Tile::kPanel, place.channel, 0, 0);
        }
      }
    }
  }
}

// One consumer warpgroup at work on its fragments.
template <class Tile>
struct Consumer {
  SharedStorage<Tile>& shared;
  int group;
  Ring<kPatchStages> patch_ring;
  Ring<Tile::kWeightStages> weight_ring;
  float (&sums)[Tile::kFragments][Tile::kChannels / 2];

  // Adds one tap's product, from `row` of the patch and `line_rows` per line; committed, not
  // waited for.
  __device__ void StartTap(int row, int line_rows, bool accumulate) {
#pragma unroll
    for (int f = 0; f < Tile::kFragments; ++f) HoldRegisters(sums[f]);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < Tile::kDepth / 16; ++step) {
      const int panel = step / (Tile::kPanel / 16);
      const std::uint32_t column_bytes = step % (Tile::kPanel / 16) * 32;
      const std::uint64_t weights = SwizzledRows<Tile::kRowBytes>(
          SharedAddress(shared.weights[weight_ring.stage][panel]) + column_bytes, 8);
      const std::uint32_t patch =
          SharedAddress(shared.pixels[patch_ring.stage][panel]) + row * Tile::kRowBytes;
#pragma unroll
      for (int f = 0; f < Tile::kFragments; ++f) {
        const int line = (group * Tile::kFragments + f) * 8;
        const std::uint64_t pixels = SwizzledRows<Tile::kRowBytes>(
            patch + line * line_rows * Tile::kRowBytes + column_bytes, line_rows);
        if constexpr (Tile::kChannels == 8) {
          Wgmma64x8<false>(sums[f], pixels, weights, accumulate || step > 0);
        } else if constexpr (Tile::kChannels == 192) {
          Wgmma64x192<false>(sums[f], pixels, weights, accumulate || step > 0);
        } else {
          Wgmma64x96<false>(sums[f], pixels, weights, accumulate || step > 0);
        }
      }
    }
    WgmmaCommit();
  }

  __device__ void Run(const ConvShape& shape, const Place& place) {
    const int line_rows = kPatchWidth + shape.kw - 1;
    const int patches = (shape.kt - place.FirstTap(shape)) * (shape.channels_in / Tile::kDepth);
    int done_patch = -1, done_weight = -1;  // stages that the product before this one has read
    for (int patch = 0; patch < patches; ++patch, patch_ring.Next()) {
      BarrierWait(&shared.patch_full[patch_ring.stage], patch_ring.parity);
      for (int dy = 0; dy < shape.kh; ++dy) {
        for (int dx = 0; dx < shape.kw; ++dx, weight_ring.Next()) {
          BarrierWait(&shared.weight_full[weight_ring.stage], weight_ring.parity);
          StartTap(place.FirstRow(shape, dy, dx), line_rows, done_weight >= 0);
          WgmmaWait<1>();
          if (threadIdx.x % 32 == 0) {
            if (done_weight >= 0) BarrierArrive(&shared.weight_empty[done_weight]);
            if (done_patch >= 0) BarrierArrive(&shared.patch_empty[done_patch]);
          }
          done_patch = -1;
          done_weight = weight_ring.stage;
        }
      }
      done_patch = patch_ring.stage;
    }
    WgmmaWait<0>();
#pragma unroll
    for (int f = 0; f < Tile::kFragments; ++f) HoldRegisters(sums[f]);
  }
};

// Where a patch's pixel begins in the result; -1 outside of the frame.
__device__ inline std::int64_t PixelOffset(const ConvShape& shape, const Place& place, int pixel) {
  const int y = place.y + pixel / kPatchWidth, x = place.x + pixel % kPatchWidth;
  if (y >= shape.height || x >= shape.width) return -1;
  const int line = (y << shape.doubling) + place.phase_y;
  const int column = (x << shape.doubling) + place.phase_x;
  return ((static_cast<std::int64_t>(place.frame) * shape.out_height() + line) * shape.out_width() +
          column) *
         shape.channels_out;
}

// The same for at most 8 channels, one by one.
__device__ inline void StoreFewChannels(const Parameters& p, const Place& place, int first_pixel,
                                        const float (&sums)[4]) {
  const int thread = threadIdx.x % kWarpgroup;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int channel = 2 * (thread % 4) + i % 2;
    const int pixel = first_pixel + thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8;
    const std::int64_t at = PixelOffset(p.shape, place, pixel);
    if (at < 0 || channel >= p.shape.channels_out) continue;
    float sum = sums[i];
    if (p.bias != nullptr) sum += p.bias[channel];
    if (p.residual != nullptr) sum += __bfloat162float(p.residual[at + channel]);
    p.out[at + channel] = __float2bfloat16(sum);
  }
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
    const std::int64_t at = PixelOffset(shape, place, pixel);
    rows[r] = at < 0 ? nullptr : p.out + at + place.channel;
    if (at < 0) continue;
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
    for (int stage = 0; stage < kPatchStages; ++stage) {
      BarrierInit(&shared.patch_full[stage], 1);
      BarrierInit(&shared.patch_empty[stage], kConsumers * kWarpgroup / 32);
    }
    for (int stage = 0; stage < Tile::kWeightStages; ++stage) {
      BarrierInit(&shared.weight_full[stage], 1);
      BarrierInit(&shared.weight_empty[stage], kConsumers * kWarpgroup / 32);
    }
    BarrierInitFence();
  }
  __syncthreads();
  const Place place = Place::OfBlock<Tile>(p);
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (warpgroup == 0) {
    LowerRegisters<kProducerRegisters>();
    if (threadIdx.x == 0) ProducePatches<Tile>(&x_map, &history_map, shared, p, place);
    if (threadIdx.x == 32) ProduceWeights<Tile>(&weight_map, shared, p, place);
  } else {
    RaiseRegisters<kConsumerRegisters>();
    const int group = warpgroup - 1;
    float sums[Tile::kFragments][Tile::kChannels / 2];
    Consumer<Tile>{shared, group, {}, {}, sums}.Run(p.shape, place);
#pragma unroll
    for (int f = 0; f < Tile::kFragments; ++f) {
      const int first_pixel = (group * Tile::kFragments + f) * 64;
      if constexpr (Tile::kChannels == 8) {
        StoreFewChannels(p, place, first_pixel, sums[f]);
      } else {
        StoreFragment<Tile::kChannels>(p, place, first_pixel, sums[f]);
      }
    }
  }
}

template <class Tile>
CUtensorMap FramesMap(const void* data, int frames, const ConvShape& shape) {
  const auto c = static_cast<std::uint64_t>(shape.channels_in);
  const auto w = static_cast<std::uint64_t>(shape.width);
  const auto h = static_cast<std::uint64_t>(shape.height);
  return MakeTensorMap(data, {c, w, h, static_cast<std::uint64_t>(frames)}, {c, w * c, h * w * c},
                       {Tile::kPanel, static_cast<std::uint32_t>(kPatchWidth + shape.kw - 1),
                        static_cast<std::uint32_t>(Tile::kPatchHeight + shape.kh - 1), 1});
}

template <class Tile>
dim3 Grid(const ConvShape& shape) {
  const auto patches = [](int extent, int patch) { return (extent + patch - 1) / patch; };
  const std::int64_t per_frame = static_cast<std::int64_t>(patches(shape.width, kPatchWidth)) *
                                 patches(shape.height, Tile::kPatchHeight) *
                                 (shape.doubling ? 4 : 1);
  Require(per_frame < 65536 && shape.frames < 65536, "Conv: too many pixels in one call");
  return dim3(static_cast<unsigned>(patches(shape.channels_out, Tile::kChannels)),
              static_cast<unsigned>(per_frame), static_cast<unsigned>(shape.frames));
}

template <class Tile>
void Launch(const Context& context, const ConvProblem& problem) {
  const ConvShape& shape = problem.shape;
  const auto depth = static_cast<std::uint64_t>(shape.depth());
  const auto channels = static_cast<std::uint64_t>(shape.channels_out);
  const CUtensorMap x_map = FramesMap<Tile>(problem.x, shape.frames, shape);
  const CUtensorMap history_map =
      shape.history > 0 ? FramesMap<Tile>(problem.history, shape.history, shape) : x_map;
  const CUtensorMap weight_map = MakeTensorMap(problem.weight, {depth, channels, 1, 1},
                                               {depth, depth * channels, depth * channels},
                                               {Tile::kPanel, Tile::kChannels, 1, 1});
  const Parameters parameters{shape, (shape.width + kPatchWidth - 1) / kPatchWidth, problem.bias,
                              static_cast<const bf16*>(problem.residual),
                              static_cast<bf16*>(problem.out)};
  constexpr std::size_t kSharedBytes = sizeof(SharedStorage<Tile>) + 1024;  // room to align
  static_assert(kSharedBytes <= 227 * 1024);
  Check(cudaFuncSetAttribute(HopperConvKernel<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kSharedBytes),
        "HopperConv: shared memory");
  HopperConvKernel<Tile><<<Grid<Tile>(shape), kThreads, kSharedBytes, context.stream>>>(
      x_map, history_map, weight_map, parameters);
  CheckLaunch("HopperConv");
}

// Small frames leave multiprocessors idle in large tiles, or the last round of tiles half empty.
template <int kChannels, int kPanels, int kPanel>
void LaunchBest(const Context& context, const ConvProblem& problem) {
  using Large = Tiling<kChannels, 2, kPanels, kPanel>;
  using Small = Tiling<kChannels, 1, kPanels, kPanel>;
  const auto rounds = [&](dim3 grid) {
    const auto blocks = static_cast<std::int64_t>(grid.x) * grid.y * grid.z;
    return (blocks + context.sm_count - 1) / context.sm_count;
  };
  // A small tile takes a little more than half of a large one's time.
  if (rounds(Grid<Small>(problem.shape)) * 6 < rounds(Grid<Large>(problem.shape)) * 10) {
    Launch<Small>(context, problem);
  } else {
    Launch<Large>(context, problem);
  }
}

}  // namespace

void HopperConv(const Context& context, const ConvProblem& problem) {
  const ConvShape& shape = problem.shape;
  if (shape.channels_out <= 8) {
    Launch<Tiling<8, 2, 3, 32>>(context, problem);
  } else if (shape.channels_out % 192 == 0 && shape.channels_in % 64 == 0) {
    LaunchBest<192, 1, 64>(context, problem);
  } else {
    LaunchBest<96, 3, 32>(context, problem);
  }
}

}  // namespace slalom::cuda
