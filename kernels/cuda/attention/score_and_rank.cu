// Block maps from pooled queries and keys in one kernel: a block of threads multiplies some query
// blocks of a head with all of its key blocks in f32, keeps the scores in shared memory, and ranks
// them there.
#include "kernels/cuda/attention/block_map.h"
#include "kernels/cuda/attention/ranking.cuh"
#include "kernels/cuda/check.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/shared_address.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16;    // query blocks
constexpr int kKeys = 256;   // key blocks at once
constexpr int kDepth = 32;   // channels at once
constexpr int kStride = 36;  // floats between rows of keys: 8 lanes' 16 bytes meet 32 banks
constexpr int kOwn = 4;      // rows, and keys, of a thread
constexpr int kKeyGroups = kKeys / kOwn;
constexpr std::size_t kMostSharedBytes = 99 * 1024;  // what every device has
constexpr std::size_t kMostHopperBytes = 227 * 1024;
static_assert(kThreads == kKeyGroups * kRows / kOwn && kKeyGroups % 32 == 0);

struct Parameters {
  const float* q;  // [B, Nq, H * D]
  const float* k;  // [B, Nk, H * D]
  int query_blocks;
  int key_blocks;
  int heads;
  int head_size;  // a multiple of 4
  int critical;
  int negligible;
  std::uint8_t* classes;  // [B, H, Nq, Nk]
  std::int32_t* lists;    // [B, H, Nq, critical]
  std::int32_t* counts;   // [B, H, Nq]
};

// Whole depths: the channels that there are not are zeros.
__host__ __device__ constexpr int PaddedChannels(int head_size) {
  return (head_size + kDepth - 1) / kDepth * kDepth;
}

// In dynamic shared memory.
struct Tiles {
  float* q;  // [kRows][padded channels]
  float (*k)[kKeys][kStride];
  float* scores;  // [kRows][key blocks]

  __device__ Tiles(float* memory, int channels)
      : q(memory),
        k(reinterpret_cast<float (*)[kKeys][kStride]>(memory + kRows * channels)),
        scores(memory + kRows * channels + 2 * kKeys * kStride) {}
  static std::size_t Bytes(std::int64_t head_size, std::int64_t key_blocks) {
    const std::int64_t channels = PaddedChannels(static_cast<int>(head_size));
    return static_cast<std::size_t>(kRows * (channels + key_blocks) + 2 * kKeys * kStride) *
           sizeof(float);
  }
};

__device__ inline void LoadQueries(const Parameters& p, const float* q, int rows, int channels,
                                   float* to) {
  for (int i = threadIdx.x; i < kRows * channels; i += kThreads) {
    const int row = i / channels, channel = i % channels;
    const bool there = row < rows && channel < p.head_size;
    to[i] = there ? q[static_cast<std::int64_t>(row) * p.heads * p.head_size + channel] : 0.0f;
  }
}

// kDepth channels of kKeys key blocks; asynchronous.
__device__ inline void LoadKeys(const Parameters& p, const float* k, int first_key,
                                int first_channel, float (&to)[kKeys][kStride]) {
  constexpr int kPieces = kDepth / 4;
  const std::int64_t width = std::int64_t{p.heads} * p.head_size;
  const int channel = first_channel + static_cast<int>(threadIdx.x) % kPieces * 4;
#pragma unroll
  for (int row = threadIdx.x / kPieces; row < kKeys; row += kThreads / kPieces) {
    const bool there = first_key + row < p.key_blocks && channel < p.head_size;
    CopyAsync16(SharedAddress(&to[row][channel % kDepth]),
                k + (there ? (first_key + row) * width + channel : 0), there);
  }
}

// sums += q k^T over one depth, in the order of the channels. `q` is the thread's first row.
__device__ inline void Multiply(const float* q, int channels, const float (&k)[kKeys][kStride],
                                float (&sums)[kOwn][kOwn]) {
  const int own = threadIdx.x % kKeyGroups;
#pragma unroll 2
  for (int c = 0; c < kDepth; c += 4) {
    float a[kOwn][4], b[kOwn][4];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      LoadFloats<4>(q + i * channels + c, a[i]);
      LoadFloats<4>(&k[own + i * kKeyGroups][c], b[i]);
    }
#pragma unroll
    for (int channel = 0; channel < 4; ++channel) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int j = 0; j < kOwn; ++j) sums[i][j] += a[i][channel] * b[j][channel];
      }
    }
  }
}

// Grid (groups of kRows query blocks, heads, samples).
template <int kPerLane>
__global__ void __launch_bounds__(kThreads, 2) ScoreAndRankKernel(const Parameters p) {
  extern __shared__ __align__(16) float dynamic_shared[];
  const int channels = PaddedChannels(p.head_size), depths = channels / kDepth;
  const Tiles tiles(dynamic_shared, channels);
  const std::int64_t width = std::int64_t{p.heads} * p.head_size;
  const int first_row = blockIdx.x * kRows;
  const float* k = p.k + std::int64_t{blockIdx.z} * p.key_blocks * width + blockIdx.y * p.head_size;
  LoadQueries(p,
              p.q + (std::int64_t{blockIdx.z} * p.query_blocks + first_row) * width +
                  blockIdx.y * p.head_size,
              p.query_blocks - first_row, channels, tiles.q);
  const int steps = (p.key_blocks + kKeys - 1) / kKeys * depths;
  const auto load = [&](int step) {
    if (step < steps) {
      LoadKeys(p, k, step / depths * kKeys, step % depths * kDepth, tiles.k[step % 2]);
    }
    CopyAsyncCommit();
  };
  const int own_row = static_cast<int>(threadIdx.x) / kKeyGroups * kOwn;
  float sums[kOwn][kOwn] = {};
  load(0);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    load(step + 1);
    CopyAsyncWait<1>();
    __syncthreads();
    Multiply(tiles.q + own_row * channels + step % depths * kDepth, channels, tiles.k[step % 2],
             sums);
    __syncthreads();  // the stage is free
    if (step % depths != depths - 1) continue;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int key = step / depths * kKeys + threadIdx.x % kKeyGroups + j * kKeyGroups;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (key < p.key_blocks) tiles.scores[(own_row + i) * p.key_blocks + key] = sums[i][j];
        sums[i][j] = 0.0f;
      }
    }
  }
  __syncthreads();
  const std::int64_t head = std::int64_t{blockIdx.z} * p.heads + blockIdx.y;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < min(kRows, p.query_blocks - first_row); i += kThreads / 32) {
    const std::int64_t row = head * p.query_blocks + first_row + i;
    ClassifyRow<kPerLane>(tiles.scores + i * p.key_blocks, p.key_blocks, p.critical, p.negligible,
                          p.classes + row * p.key_blocks, p.lists + row * p.critical);
    if (threadIdx.x % 32 == 0) p.counts[row] = p.critical;
  }
}

}  // namespace

RankWay ChooseRankWay(std::int64_t head_size, std::int64_t key_blocks, int compute_major) {
  const std::size_t most = compute_major == kHopperMajor ? kMostHopperBytes : kMostSharedBytes;
  const bool fits = head_size % 4 == 0 && Tiles::Bytes(head_size, key_blocks) <= most;
  return fits ? RankWay::kOwn : RankWay::kLibrary;
}

void ScoreAndRank(const Context& context, const Tensor& q, const Tensor& k, std::int64_t heads,
                  std::int64_t negligible, const BlockMap& map) {
  const auto count = static_cast<int>(k.dim(1));
  const Parameters parameters{q.data<float>(),
                              k.data<float>(),
                              static_cast<int>(q.dim(1)),
                              count,
                              static_cast<int>(heads),
                              static_cast<int>(q.dim(2) / heads),
                              static_cast<int>(map.critical.dim(3)),
                              static_cast<int>(negligible),
                              map.classes.data<std::uint8_t>(),
                              map.critical.data<std::int32_t>(),
                              map.counts.data<std::int32_t>()};
  if (map.counts.NumElements() == 0) return;
  const auto kernel = count <= 128    ? ScoreAndRankKernel<4>
                      : count <= 512  ? ScoreAndRankKernel<16>
                      : count <= 1280 ? ScoreAndRankKernel<40>
                                      : ScoreAndRankKernel<0>;
  const std::size_t bytes = Tiles::Bytes(parameters.head_size, count);
  Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "MakeBlockMap: shared memory");
  const dim3 grid(static_cast<unsigned>((parameters.query_blocks + kRows - 1) / kRows),
                  static_cast<unsigned>(heads), static_cast<unsigned>(q.dim(0)));
  kernel<<<grid, kThreads, bytes, context.stream>>>(parameters);
  CheckLaunch("MakeBlockMap: scores and ranks");
}

}  // namespace slalom::cuda
