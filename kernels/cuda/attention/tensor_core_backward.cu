// The sparse branch's gradients for sm_80 and newer, with mma.sync. Two kernels of one shape: a
// warp owns 16 rows (queries for d_q, keys for d_k and d_v), keeps both of their operands in
// registers, and walks along the listed blocks of the other side, which cp.async brings one ahead.
// What a product leaves in registers (P, dS, or their transposes) is the next one's left operand.
// Blocks of threads have tiles of 64 rows, or of 16 (one warp) where blocks are smaller than 64.
#include "kernels/cuda/attention/mma_tiles.cuh"
#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/attention/sparse_gradient.cuh"
#include "kernels/cuda/fragments.cuh"

namespace slalom::cuda {
namespace {

constexpr int kRowsPerWarp = 16;

using Parameters = SparseGradientParameters;

// kTile: rows of either side at once.
template <int kD, int kTile>
struct alignas(2 * kD) SharedTiles {
  bf16 first[2][kTile][kD];   // K, or Q
  bf16 second[2][kTile][kD];  // V, or d_out
  float lse[2][kTile];        // of the queries, where they are the other side; times log2(e)
  float delta[2][kTile];
};

// products = own rows times 16 rows of a tile, from `first_row` on: two fragments of 8 columns.
template <int kD, int kTile>
__device__ inline void MultiplyRows(float (&products)[2][4], const std::uint32_t (&own)[kD / 16][4],
                                    const bf16 (&tile)[kTile][kD], int first_row) {
  const FragmentReader<Operand::kRightTransposed, kD> rows(tile, first_row);
#pragma unroll
  for (int i = 0; i < 8; ++i) products[i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    std::uint32_t b[4];
    rows.Load(b, 0, step * 16);
    Mma16x16x16(products[0], products[1], own[step], b);
  }
}

// sums [16, kD] += weights [16, 16] times 16 rows of a tile, from `first_row` on.
template <int kD, int kTile>
__device__ inline void AddRows(float (&sums)[kD / 8][4], const std::uint32_t (&weights)[4],
                               const bf16 (&tile)[kTile][kD], int first_row) {
  const FragmentReader<Operand::kRight, kD> rows(tile, first_row);
#pragma unroll
  for (int pair = 0; pair < kD / 16; ++pair) {
    std::uint32_t b[4];
    rows.Load(b, 0, pair * 16);
    Mma16x16x16(sums[2 * pair], sums[2 * pair + 1], weights, b);
  }
}

// Two fragments of 8 columns as one A fragment of 16.
__device__ inline void PackFragments(const float (&x)[2][4], std::uint32_t (&packed)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) packed[i] = PackBf16(x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
}

// Writes a warp's 16 rows, scaled, added to what is there if asked.
template <int kD>
__device__ void StoreOwn(const float (&sums)[kD / 8][4], float factor, bool accumulate, bf16* to,
                         std::int64_t row_stride, int row, int length) {
  const int column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = row + half * 8;
    if (at >= length) continue;
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) {
      auto* pair = reinterpret_cast<std::uint32_t*>(to + at * row_stride + j * 8 + column);
      float x = factor * sums[j][2 * half], y = factor * sums[j][2 * half + 1];
      if (accumulate) {
        const float2 before = UnpackBf16(*pair);
        x += before.x;
        y += before.y;
      }
      *pair = PackBf16(x, y);
    }
  }
}

// What both kernels begin with.
template <int kD, int kTile>
struct Walk {
  static constexpr int kThreads = kTile / kRowsPerWarp * 32;
  const Parameters& p;
  SharedTiles<kD, kTile>& shared;
  const int head, sample;
  const std::int64_t stride, start, rows_start;
  const KeyBlocksOf<kTile> blocks;

  __device__ Walk(const Parameters& parameters, SharedTiles<kD, kTile>& tiles)
      : p(parameters),
        shared(tiles),
        head(blockIdx.y),
        sample(blockIdx.z),
        stride(std::int64_t{p.heads} * kD),
        start(std::int64_t{sample} * p.length * stride + head * kD),
        rows_start((std::int64_t{sample} * p.heads + head) * p.length),
        blocks(KeyBlocksOfTile<kTile>(p.list, p.length, std::int64_t{sample} * p.heads + head,
                                      static_cast<int>(blockIdx.x) * kTile)) {}

  __device__ static int Row() {
    const int thread = threadIdx.x;
    return static_cast<int>(blockIdx.x) * kTile + thread / 32 * kRowsPerWarp + thread % 32 / 4;
  }

  // `queries`: bring lse and delta of the block's rows too. Rows that are not there get a lse that
  // makes their probabilities zero.
  __device__ void Copy(int i, const bf16* first, const bf16* second, bool queries) {
    const int block = blocks.Start(i), stage = i % 2;
    const std::int64_t offset = start + block * stride;
    CopyTile<kD, kThreads>(shared.first[stage], first + offset, stride, p.length - block);
    CopyTile<kD, kThreads>(shared.second[stage], second + offset, stride, p.length - block);
    const int row = threadIdx.x;
    if (queries && row < kTile) {
      const bool there = block + row < p.length;
      shared.lse[stage][row] = there ? kLog2E * p.lse[rows_start + block + row] : INFINITY;
      shared.delta[stage][row] = there ? p.delta[rows_start + block + row] : 0.0f;
    }
  }

  // visit(stage, i) for every block, from the last to the first.
  template <typename Visit>
  __device__ void Run(const bf16* first, const bf16* second, bool queries, const Visit& visit) {
    if (blocks.count > 0) Copy(blocks.count - 1, first, second, queries);
    CopyAsyncCommit();
#pragma unroll 1
    for (int i = blocks.count - 1; i >= 0; --i) {
      if (i > 0) Copy(i - 1, first, second, queries);
      CopyAsyncCommit();
      CopyAsyncWait<1>();
      __syncthreads();
      visit(i % 2, i);
      __syncthreads();
    }
  }
};

// Grid (tiles of queries, heads, samples).
template <int kD, int kTile>
__global__ void __launch_bounds__(kTile / kRowsPerWarp * 32, 2)
    QueryGradientKernel(const Parameters p) {
  extern __shared__ __align__(2 * kD) std::byte dynamic_shared[];
  Walk<kD, kTile> walk(p, *reinterpret_cast<SharedTiles<kD, kTile>*>(dynamic_shared));
  const int row = walk.Row();
  std::uint32_t q[kD / 16][4], d_out[kD / 16][4];
  LoadRowFragments<kD>(q, p.q + walk.start, walk.stride, row, p.length);
  LoadRowFragments<kD>(d_out, p.d_out + walk.start, walk.stride, row, p.length);
  float lse[2], delta[2], sums[kD / 8][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = row + half * 8;
    lse[half] = at < p.length ? kLog2E * p.lse[walk.rows_start + at] : INFINITY;
    delta[half] = at < p.length ? p.delta[walk.rows_start + at] : 0.0f;
  }
  const float scale_log2 = p.scale * kLog2E;
  const int column = 2 * (threadIdx.x % 4);
  walk.Run(p.k, p.v, false, [&](int stage, int block) {
    const int keys = walk.blocks.Keys(block);
#pragma unroll 1
    for (int first = 0; first < kTile; first += 16) {
      float scores[2][4], slopes[2][4];
      MultiplyRows<kD>(scores, q, walk.shared.first[stage], first);
      MultiplyRows<kD>(slopes, d_out, walk.shared.second[stage], first);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int half = i % 4 / 2;
        const float probability = Exp2(fmaf(scores[i / 4][i % 4], scale_log2, -lse[half]));
        const bool there = first + i / 4 * 8 + column + i % 2 < keys;
        float& slope = slopes[i / 4][i % 4];
        slope = there ? probability * (slope - delta[half]) : 0.0f;
      }
      std::uint32_t weights[4];
      PackFragments(slopes, weights);
      AddRows<kD>(sums, weights, walk.shared.first[stage], first);
    }
  });
  StoreOwn<kD>(sums, p.scale, p.accumulate, p.d_q + walk.start, walk.stride, row, p.length);
}

// Grid (tiles of keys, heads, samples). Scores are transposed: rows are keys.
template <int kD, int kTile>
__global__ void __launch_bounds__(kTile / kRowsPerWarp * 32, 2)
    KeyGradientKernel(const Parameters p) {
  extern __shared__ __align__(2 * kD) std::byte dynamic_shared[];
  Walk<kD, kTile> walk(p, *reinterpret_cast<SharedTiles<kD, kTile>*>(dynamic_shared));
  const int row = walk.Row();
  std::uint32_t k[kD / 16][4], v[kD / 16][4];
  LoadRowFragments<kD>(k, p.k + walk.start, walk.stride, row, p.length);
  LoadRowFragments<kD>(v, p.v + walk.start, walk.stride, row, p.length);
  float d_k[kD / 8][4] = {}, d_v[kD / 8][4] = {};
  const float scale_log2 = p.scale * kLog2E;
  const int column = 2 * (threadIdx.x % 4);
  walk.Run(p.q, p.d_out, true, [&](int stage, int /*block*/) {
#pragma unroll 1
    for (int first = 0; first < kTile; first += 16) {
      float scores[2][4], slopes[2][4];
      std::uint32_t weights[4];
      MultiplyRows<kD>(scores, k, walk.shared.first[stage], first);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float lse = walk.shared.lse[stage][first + i / 4 * 8 + column + i % 2];
        scores[i / 4][i % 4] = Exp2(fmaf(scores[i / 4][i % 4], scale_log2, -lse));
      }
      PackFragments(scores, weights);
      AddRows<kD>(d_v, weights, walk.shared.second[stage], first);
      MultiplyRows<kD>(slopes, v, walk.shared.second[stage], first);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float delta = walk.shared.delta[stage][first + i / 4 * 8 + column + i % 2];
        slopes[i / 4][i % 4] = scores[i / 4][i % 4] * (slopes[i / 4][i % 4] - delta);
      }
      PackFragments(slopes, weights);
      AddRows<kD>(d_k, weights, walk.shared.first[stage], first);
    }
  });
  StoreOwn<kD>(d_k, p.scale, p.accumulate, p.d_k + walk.start, walk.stride, row, p.length);
  StoreOwn<kD>(d_v, 1.0f, p.accumulate, p.d_v + walk.start, walk.stride, row, p.length);
}

template <int kD, int kTile>
void Run(const Context& context, const SparseGradientProblem& problem) {
  constexpr std::size_t kBytes = sizeof(SharedTiles<kD, kTile>);
  constexpr int kThreads = Walk<kD, kTile>::kThreads;
  LaunchSparseGradient(context, problem, QueryGradientKernel<kD, kTile>, kThreads, kBytes, kTile,
                       Parameters::Of(problem, false));
  LaunchSparseGradient(context, problem, KeyGradientKernel<kD, kTile>, kThreads, kBytes, kTile,
                       Parameters::Of(problem, true));
}

template <int kD>
void RunForBlocks(const Context& context, const SparseGradientProblem& problem) {
  problem.keys.MadeOf(kKeyBlock) ? Run<kD, kKeyBlock>(context, problem)
                                 : Run<kD, kSmallKeyBlock>(context, problem);
}

}  // namespace

void TensorCoreSparseGradient(const Context& context, const SparseGradientProblem& problem) {
  problem.head_size == 128 ? RunForBlocks<128>(context, problem)
                           : RunForBlocks<64>(context, problem);
}

}  // namespace slalom::cuda
