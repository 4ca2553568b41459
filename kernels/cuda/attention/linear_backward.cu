// The linear branch's gradients with mma.sync, for bf16 and heads of 64 or 128 channels.
//
// With a_t = feature(q_t) / (feature(q_t) z + 1e-5), H and z the sums over the scope of
// feature(k)^T v and feature(k), W the projection and y_t = d_out_t:
//   M = H W^T                        delta_t = y_t . (a_t M)
//   E = sum of a_t^T y_t             e = -sum of a_t delta_t        (per query block)
//   d feature(q_t) = (y_t M^T - delta_t z) / (feature(q_t) z + 1e-5)
//   G = (sum of E over the query blocks that have key block j in scope) W, g the same of e
//   d feature(k_j) = v_j G^T + g     d v_j = feature(k_j) G         d W = sum of E^T H
// so that tokens meet one [D, D] matrix each, and sums over scopes are products with the mask. E is
// made by the kernels that make H. SALAD's features are rotated where they meet a matrix, not where
// they meet z or g.
#include <algorithm>

#include "kernels/cuda/attention/backward.h"
#include "kernels/cuda/attention/features.cuh"
#include "kernels/cuda/attention/linear_states.cuh"
#include "kernels/cuda/attention/linear_tiles.cuh"
#include "kernels/cuda/check.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

using namespace linear_tiles;

constexpr int kRowThreads = 128;  // a warp owns 16 rows
constexpr int kThreads = 256;
constexpr std::int64_t kMostParts = 16;  // of a head's sum for d W
constexpr int kMostTiles = 8;  // that one block of threads takes of rows with the same matrix

std::int64_t Blocks(std::int64_t items, std::int64_t per_block) {
  return (items + per_block - 1) / per_block;
}

// Rows x (queries or keys) with y beside them (d_out or v), and the matrix of their block.
struct RowParameters {
  FeatureParameters features;
  const bf16* x;
  const bf16* y;
  const bf16* matrices;  // [heads, per head, kD + 1, kD]: M or G; their last row is not used
  const bf16* vectors;   // likewise, the last row: z or g
  bf16* d_x;
  bf16* product;  // queries: a_t, unrotated; keys: d v
  float* delta;   // queries
  std::int64_t length;
  int heads, first_head;  // of all samples' heads
  int matrices_per_head;
  int rows_per_matrix;  // a multiple of tile_rows unless there is one matrix
  int tile_rows;        // of a tile that are used
  int tiles;            // of rows for one block of threads; they share a matrix
};

// Rows x and y of a tile; what is computed of them takes their places.
template <int kD>
struct RowTiles {
  bf16 x[kTile][kD];
  bf16 y[kTile][kD];
};
template <int kD>
struct alignas(2 * kD) RowStorage {
  bf16 matrix[kD][kD];
  RowTiles<kD> tiles[2];  // one is computed while the next arrives
  float vector[kD];
};

// A thread's pair of channels 8 i + 2 * (lane % 4) of row lane / 4 + 8 * half of a warp's 16.
template <int kD>
__device__ inline std::uint32_t* PairAt(bf16 (&tile)[kTile][kD], int row, int half, int i) {
  const int lane = threadIdx.x % 32;
  auto* base = reinterpret_cast<std::byte*>(&tile);
  return reinterpret_cast<std::uint32_t*>(
      base + SwizzledOffset<kD / 8>(row + half * 8 + lane / 4, i) + lane % 4 * 4);
}

// The features of a warp's rows: in `a` as they meet a matrix; in the tile, over x, as they are
// and, for queries, divided by their normaliser. Returns 1 / normaliser of one half.
template <int kD, bool kQueries>
__device__ float MapHalf(const RowParameters& p, const RowStorage<kD>& shared, RowTiles<kD>& tiles,
                         std::uint32_t (&a)[kD / 16][4], int row, int half, std::int64_t token) {
  const int quad = threadIdx.x % 4;
  float x[kD / 4];
  UnpackHalf<kD>(a, half, x);
  MapFeatures<4>(p.features.feature, x);
  float inverse = 1.0f;
  if constexpr (kQueries) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kD / 8; ++i) {
      sum += x[2 * i] * shared.vector[i * 8 + quad * 2] +
             x[2 * i + 1] * shared.vector[i * 8 + quad * 2 + 1];
    }
    inverse = 1.0f / (GroupSum<4>(sum) + kNormaliserEpsilon);
  }
#pragma unroll
  for (int i = 0; i < kD / 8; ++i) {
    *PairAt<kD>(tiles.x, row, half, i) = PackBf16(x[2 * i] * inverse, x[2 * i + 1] * inverse);
  }
  RotateAndPackHalf<kD>(p.features, token, x, half, a);
  return inverse;
}

// d x of one half of a warp's rows, given d feature as it meets the matrix (not yet divided) and
// what the normaliser adds, `factor` times the vector. Over y in the tile.
template <int kD>
__device__ void FinishHalf(const RowParameters& p, const RowStorage<kD>& shared,
                           RowTiles<kD>& tiles, const std::uint32_t (&a)[kD / 16][4],
                           const float (&d_feature)[kD / 8][4], float inverse, float factor,
                           int row, int half, std::int64_t token) {
  const int quad = threadIdx.x % 4;
  const Feature feature = p.features.feature;
  float d[kD / 4], mean = 0.0f;
#pragma unroll
  for (int i = 0; i < kD / 8; ++i) {
    float even = d_feature[i][2 * half] * inverse, odd = d_feature[i][2 * half + 1] * inverse;
    if (feature == Feature::kRotatedRelu) {
      const std::int64_t angle = token * (kD / 2) + quad + i * 4;
      RotatePair(p.features.cos[angle], -p.features.sin[angle], even, odd);
    }
    d[2 * i] = even + factor * shared.vector[i * 8 + quad * 2];
    d[2 * i + 1] = odd + factor * shared.vector[i * 8 + quad * 2 + 1];
    const float2 phi = UnpackBf16(a[i / 2][i % 2 * 2 + half]);
    mean += phi.x * d[2 * i] + phi.y * d[2 * i + 1];
  }
  mean = feature == Feature::kSoftmax ? GroupSum<4>(mean) : 0.0f;
#pragma unroll
  for (int i = 0; i < kD / 8; ++i) {
    const float2 phi = UnpackBf16(a[i / 2][i % 2 * 2 + half]);
    float2 y;
    if (feature == Feature::kSoftmax) {
      y = make_float2(phi.x * (d[2 * i] - mean), phi.y * (d[2 * i + 1] - mean));
    } else if (feature ==
               Feature::kElu) {  // where x > 0 the feature is above 1, else its own slope
      y = make_float2(fminf(phi.x, 1.0f) * d[2 * i], fminf(phi.y, 1.0f) * d[2 * i + 1]);
    } else {  // the unrotated feature, in the tile, shows where x was positive
      const float2 kept = UnpackBf16(*PairAt<kD>(tiles.x, row, half, i));
      y = make_float2(kept.x > 0.0f ? d[2 * i] : 0.0f, kept.y > 0.0f ? d[2 * i + 1] : 0.0f);
    }
    *PairAt<kD>(tiles.y, row, half, i) = PackBf16(y.x, y.y);
  }
}

// One tile of rows, of which a warp has 16 from `row` on; `token` is the tile's first.
template <int kD, bool kQueries>
__device__ void RowTile(const RowParameters& p, const RowStorage<kD>& shared, RowTiles<kD>& tiles,
                        int row, std::int64_t token, std::int64_t delta_row) {
  const int lane = threadIdx.x % 32;
  std::uint32_t a[kD / 16][4];
  LoadFragments<kD>(a, tiles.x, row);
  __syncwarp();
  float inverse[2], factor[2] = {1.0f, 1.0f};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::int64_t own = min(token + row + lane / 4 + half * 8, p.length - 1);
    inverse[half] = MapHalf<kD, kQueries>(p, shared, tiles, a, row, half, own);
  }
  float sums[kD / 8][4];
  Multiply<kD, false>(a, shared.matrix, sums);
  std::uint32_t y[kD / 16][4];
  LoadFragments<kD>(y, tiles.y, row);
  __syncwarp();
  if constexpr (kQueries) {
    float delta[2] = {};
#pragma unroll
    for (int i = 0; i < kD / 8; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 slope = UnpackBf16(y[i / 2][i % 2 * 2 + half]);
        delta[half] += sums[i][2 * half] * slope.x + sums[i][2 * half + 1] * slope.y;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      delta[half] = GroupSum<4>(delta[half]) * inverse[half];
      factor[half] = -delta[half] * inverse[half];
      const std::int64_t own = token + row + lane / 4 + half * 8;
      if (lane % 4 == 0 && own < p.length) p.delta[delta_row + own] = delta[half];
    }
  }
  float d_feature[kD / 8][4];
  Multiply<kD, true>(y, shared.matrix, d_feature);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::int64_t own = min(token + row + lane / 4 + half * 8, p.length - 1);
    FinishHalf<kD>(p, shared, tiles, a, d_feature, inverse[half], factor[half], row, half, own);
    if constexpr (!kQueries) {  // d v takes the place of the features
#pragma unroll
      for (int i = 0; i < kD / 8; ++i) {
        *PairAt<kD>(tiles.x, row, half, i) = PackBf16(sums[i][2 * half], sums[i][2 * half + 1]);
      }
    }
  }
}

// Grid (groups of p.tiles tiles of rows, heads).
template <int kD, bool kQueries>
__global__ void __launch_bounds__(kRowThreads, 2) RowKernel(const RowParameters p) {
  extern __shared__ __align__(2 * kD) std::byte dynamic_shared[];
  auto& shared = *reinterpret_cast<RowStorage<kD>*>(dynamic_shared);
  const int head_index = p.first_head + blockIdx.y;
  const std::int64_t row_stride = std::int64_t{p.heads} * kD;
  const std::int64_t first = std::int64_t{blockIdx.x} * p.tiles * p.tile_rows;
  const std::int64_t start =
      head_index / p.heads * p.length * row_stride + head_index % p.heads * kD;
  const std::int64_t own = p.matrices_per_head == 1 ? 0 : first / p.rows_per_matrix;
  const std::int64_t matrix =
      (std::int64_t{blockIdx.y} * p.matrices_per_head + own) * ((kD + 1) * kD);
  CopyTile<kD, kRowThreads>(shared.matrix, p.matrices + matrix, kD, kD);
  for (int c = threadIdx.x; c < kD; c += kRowThreads) {
    shared.vector[c] = ToFloat(p.vectors[matrix + kD * kD + c]);
  }
  const int row = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
  const int tiles = static_cast<int>(
      min(std::int64_t{p.tiles}, (p.length - first + p.tile_rows - 1) / p.tile_rows));
  const auto rows_of = [&](int i) {
    return static_cast<int>(min(std::int64_t{p.tile_rows}, p.length - first - i * p.tile_rows));
  };
  const auto copy = [&](int i) {
    const std::int64_t at = start + (first + i * p.tile_rows) * row_stride;
    CopyTile<kD, kRowThreads>(shared.tiles[i % 2].x, p.x + at, row_stride, rows_of(i));
    CopyTile<kD, kRowThreads>(shared.tiles[i % 2].y, p.y + at, row_stride, rows_of(i));
  };
  copy(0);
  CopyAsyncCommit();
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    if (i + 1 < tiles) copy(i + 1);
    CopyAsyncCommit();
    CopyAsyncWait<1>();
    __syncthreads();
    if (row < rows_of(i)) {
      RowTiles<kD>& own_tiles = shared.tiles[i % 2];
      const std::int64_t token = first + i * p.tile_rows;
      RowTile<kD, kQueries>(p, shared, own_tiles, row, token, head_index * p.length);
      __syncwarp();
      const std::int64_t at = start + token * row_stride;
      StoreTileRows<kD>(own_tiles.x, row, rows_of(i), p.product + at, row_stride);
      StoreTileRows<kD>(own_tiles.y, row, rows_of(i), p.d_x + at, row_stride);
    }
    __syncthreads();  // the tiles are free
  }
}

// The last rows of states [heads, chunks, kD + 1, kD] become -sum of a_t delta_t over a chunk's
// tokens. Grid (chunks, heads); a thread has 8 channels of every kRows-th token.
template <int kD, typename Out>
__global__ void __launch_bounds__(kThreads)
    NormaliserKernel(const bf16* a, const float* delta, std::int64_t length, int heads,
                     int first_head, int chunk, Out* states) {
  constexpr int kLanes = kD / 8, kRows = kThreads / kLanes;
  __shared__ __align__(16) float partial[kRows][kD];
  const int head_index = first_head + blockIdx.y;
  const int channel = static_cast<int>(threadIdx.x) % kLanes * 8;
  const int own = static_cast<int>(threadIdx.x) / kLanes;
  const std::int64_t stride = std::int64_t{heads} * kD;
  const std::int64_t start = head_index / heads * length * stride + head_index % heads * kD;
  const std::int64_t first = std::int64_t{blockIdx.x} * chunk;
  const std::int64_t end = min(first + chunk, length);
  float sum[8] = {};
#pragma unroll 4
  for (std::int64_t t = first + own; t < end; t += kRows) {
    float x[8];
    LoadFloats<8>(a + start + t * stride + channel, x);
    const float factor = delta[head_index * length + t];
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] -= factor * x[i];
  }
  StoreFloats<8>(&partial[own][channel], sum);
  __syncthreads();
  const int c = static_cast<int>(threadIdx.x);
  if (c >= kD) return;
  float total = 0.0f;
  for (int r = 0; r < kRows; ++r) total += partial[r][c];
  states[(std::int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * ((kD + 1) * kD) + kD * kD + c] =
      FromFloat<Out>(total);
}

// sums [heads, elements] = the sum of states [heads, chunks, elements]. Grid (elements, heads).
__global__ void __launch_bounds__(kThreads)
    SumChunksKernel(const float* states, int chunks, int elements, bf16* sums) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= elements) return;
  const float* own = states + std::int64_t{blockIdx.y} * chunks * elements + i;
  float sum = 0.0f;
#pragma unroll 8
  for (int c = 0; c < chunks; ++c) sum += own[std::int64_t{c} * elements];
  sums[std::int64_t{blockIdx.y} * elements + i] = FromFloat<bf16>(sum);
}

// mask [heads, key blocks, stride]: 1 where a query block has the key block in scope; columns from
// query_blocks on are 0.
__global__ void __launch_bounds__(kThreads)
    MaskKernel(const std::uint8_t* classes, std::int64_t elements, int query_blocks, int key_blocks,
               int stride, bool only_marginal, bf16* mask) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  const int query = static_cast<int>(i % stride);
  const std::int64_t key = i / stride % key_blocks, head = i / stride / key_blocks;
  bool inside = false;
  if (query < query_blocks) {
    const auto c =
        static_cast<BlockClass>(classes[(head * query_blocks + query) * key_blocks + key]);
    inside = only_marginal ? c == BlockClass::kMarginal : c != BlockClass::kCritical;
  }
  mask[i] = FromFloat<bf16>(inside ? 1.0f : 0.0f);
}

// to [heads, kD, stride] = the matrices of states [heads, count, kD + 1, kD] side by side,
// transposed, with zeros for their last rows.
template <int kD>
__global__ void __launch_bounds__(kThreads)
    TransposeKernel(const bf16* states, std::int64_t columns, std::int64_t stride, bf16* to) {
  __shared__ bf16 tile[32][33];
  states += std::int64_t{blockIdx.z} * columns * kD;
  to += std::int64_t{blockIdx.z} * kD * stride;
  const int x = threadIdx.x % 32;
  for (int y = threadIdx.x / 32; y < 32; y += kThreads / 32) {
    const std::int64_t row = std::int64_t{blockIdx.x} * 32 + y;
    const bool there = row < columns && row % (kD + 1) != kD;
    tile[y][x] = there ? states[row * kD + blockIdx.y * 32 + x] : FromFloat<bf16>(0.0f);
  }
  __syncthreads();
  for (int y = threadIdx.x / 32; y < 32; y += kThreads / 32) {
    const std::int64_t column = std::int64_t{blockIdx.x} * 32 + x;
    if (column < stride) to[(blockIdx.y * 32 + y) * stride + column] = tile[x][y];
  }
}

// total (+)= the sum of parts [count, elements].
__global__ void __launch_bounds__(kThreads)
    SumPartsKernel(const float* parts, int count, int elements, bool accumulate, float* total) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= elements) return;
  float sum = accumulate ? total[i] : 0.0f;
  for (int c = 0; c < count; ++c) sum += parts[std::int64_t{c} * elements + i];
  total[i] = sum;
}

// One call: its working memory and its steps, for one group of heads after the other.
template <int kD>
class Run {
 public:
  Run(const Context& context, const LinearGradientArgs& args)
      : context_(context),
        args_(args),
        whole_(args.scope == LinearScope::kAll),
        length_(args.q.dim(1)),
        a_(context.Allocate(args.q.shape(), DType::kBF16)) {
    const bool rotated = args.feature == Feature::kRotatedRelu;
    features_ = {args.feature, rotated ? args.cos.template data<float>() : nullptr,
                 rotated ? args.sin.template data<float>() : nullptr};
    if (args.proj_weight.defined()) {
      weight_ = context.Allocate({kD, kD}, DType::kBF16);
      Convert(context, args.proj_weight, weight_);
    }
  }

  // `sums` of states: H and z of every query block (or one).
  void Group(const LinearStates& states) {
    const std::int64_t heads = states.heads, first = states.first_head;
    const Tensor folded = weight_.defined() ? Multiply(states.sums, false) : states.sums;
    Rows<true>(first, heads, folded, states.sums, states.states_per_head);
    Tensor slopes = SlopeSums(first, heads);
    if (weight_.defined()) WeightGradient(first, slopes, states.sums);
    if (!whole_) slopes = SumScope(first, slopes);
    const Tensor projected = weight_.defined() ? Multiply(slopes, true) : slopes;
    Rows<false>(first, heads, projected, slopes, static_cast<int>(slopes.dim(1)));
  }

 private:
  static constexpr std::int64_t kElements = std::int64_t{kD + 1} * kD;

  // x W^T, or x W with `straight`, for all rows of x [heads, count, kD + 1, kD].
  Tensor Multiply(const Tensor& x, bool straight) const {
    const Tensor out = context_.Allocate(x.shape(), DType::kBF16);
    GemmArgs product;
    product.m = x.NumElements() / kD;
    product.n = product.k = product.lda = product.ldb = product.ldo = kD;
    product.a = x.raw();
    product.b = weight_.raw();
    product.b_is_kn = straight;
    product.out = out.raw();
    context_.gemm->Run(product);
    return out;
  }

  template <bool kQueries>
  void Rows(std::int64_t first, std::int64_t heads, const Tensor& matrices, const Tensor& vectors,
            int per_head) const {
    const int rows = per_head == 1 ? static_cast<int>(length_)
                     : kQueries    ? args_.map->block_q
                                   : args_.map->block_k;
    const int tile_rows = per_head == 1 ? kTile : TileRows(rows);
    const std::int64_t in_block = Blocks(rows, tile_rows);
    // Tiles that share a matrix: all of a block's, or a few of the whole sequence.
    const std::int64_t tiles =
        per_head == 1 ? std::min<std::int64_t>(kMostTiles, in_block) : in_block;
    const RowParameters parameters{features_,
                                   (kQueries ? args_.q : args_.k).template data<bf16>(),
                                   (kQueries ? args_.d_out : args_.v).template data<bf16>(),
                                   matrices.template data<bf16>(),
                                   vectors.template data<bf16>(),
                                   (kQueries ? args_.d_q : args_.d_k).template data<bf16>(),
                                   (kQueries ? a_ : args_.d_v).template data<bf16>(),
                                   args_.delta.template data<float>(),
                                   length_,
                                   static_cast<int>(args_.q.dim(2)),
                                   static_cast<int>(first),
                                   per_head,
                                   rows,
                                   tile_rows,
                                   static_cast<int>(tiles)};
    constexpr std::size_t kBytes = sizeof(RowStorage<kD>);
    Check(cudaFuncSetAttribute(RowKernel<kD, kQueries>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kBytes)),
          "LinearGradient: shared memory");
    const dim3 grid(static_cast<unsigned>(Blocks(length_, tiles * tile_rows)),
                    static_cast<unsigned>(heads));
    RowKernel<kD, kQueries><<<grid, kRowThreads, kBytes, context_.stream>>>(parameters);
    CheckLaunch("LinearGradient: rows");
  }

  // E and e of every query block, or of all: [heads, count, kD + 1, kD] bf16. What was divided is
  // no less than zero, so that relu leaves it as it is.
  Tensor SlopeSums(std::int64_t first, std::int64_t heads) const {
    const bool rotated = args_.feature == Feature::kRotatedRelu;
    StateProblem problem;
    problem.features = features_;
    if (!rotated) problem.features.feature = Feature::kRelu;
    problem.k = a_.template data<bf16>();
    problem.v = args_.d_out.template data<bf16>();
    problem.batch = args_.q.dim(0);
    problem.length = length_;
    problem.heads = args_.q.dim(2);
    problem.head_size = kD;
    problem.first_head = static_cast<int>(first);
    const auto kernel = ChooseStateKernel(context_.compute_major);
    if (whole_) {
      const std::int64_t blocks = kernel == StateKernelKind::kHopper
                                      ? HopperStateBlocks(context_, kD)
                                      : TensorCoreStateBlocks(context_);
      const std::int64_t per_head = std::max<std::int64_t>(blocks / problem.heads, 1);
      problem.chunk = static_cast<int>(Blocks(Blocks(length_, kTile), per_head)) * kTile;
    } else {
      problem.chunk = args_.map->block_q;
    }
    const std::int64_t chunks = Blocks(length_, problem.chunk);
    problem.states =
        context_.Allocate({heads, chunks, kElements}, whole_ ? DType::kF32 : DType::kBF16);
    RunStates(context_, problem, kernel);
    if (!whole_) {
      Normaliser<bf16>(problem);
      return problem.states;
    }
    Normaliser<float>(problem);
    const Tensor sums = context_.Allocate({heads, 1, kElements}, DType::kBF16);
    const dim3 grid(static_cast<unsigned>(Blocks(kElements, kThreads)),
                    static_cast<unsigned>(heads));
    SumChunksKernel<<<grid, kThreads, 0, context_.stream>>>(
        problem.states.template data<float>(), static_cast<int>(chunks),
        static_cast<int>(kElements), sums.template data<bf16>());
    CheckLaunch("LinearGradient: sum");
    return sums;
  }

  template <typename Out>
  void Normaliser(const StateProblem& problem) const {
    const dim3 grid(static_cast<unsigned>(problem.states.dim(1)),
                    static_cast<unsigned>(problem.states.dim(0)));
    NormaliserKernel<kD, Out><<<grid, kThreads, 0, context_.stream>>>(
        problem.k, args_.delta.template data<float>(), length_, static_cast<int>(problem.heads),
        problem.first_head, problem.chunk, problem.states.template data<Out>());
    CheckLaunch("LinearGradient: normaliser");
  }

  // [heads, key blocks, elements]: sums over the query blocks that have a key block in scope.
  Tensor SumScope(std::int64_t first, const Tensor& slopes) const {
    const std::int64_t nq = args_.map->classes.dim(2), nk = args_.map->classes.dim(3);
    const std::int64_t heads = slopes.dim(0), stride = Blocks(nq, 8) * 8;
    const Tensor mask = context_.Allocate({heads, nk, stride}, DType::kBF16);
    MaskKernel<<<static_cast<unsigned>(Blocks(mask.NumElements(), kThreads)), kThreads, 0,
                 context_.stream>>>(
        args_.map->classes.template data<std::uint8_t>() + first * nq * nk, mask.NumElements(),
        static_cast<int>(nq), static_cast<int>(nk), static_cast<int>(stride),
        args_.scope == LinearScope::kMarginal, mask.template data<bf16>());
    CheckLaunch("LinearGradient: scope");
    const Tensor sums = context_.Allocate({heads, nk, kElements}, DType::kBF16);
    GemmArgs product;
    product.m = nk;
    product.n = product.ldb = product.ldo = kElements;
    product.k = nq;
    product.a = mask.raw();
    product.lda = stride;
    product.a_stride = nk * stride;
    product.b = slopes.raw();
    product.b_stride = nq * kElements;
    product.b_is_kn = true;
    product.out = sums.raw();
    product.out_stride = nk * kElements;
    product.batch = heads;
    context_.gemm->Run(product);
    return sums;
  }

  // d W += the sum over these heads of E^T H: long sums, which are cut into equal parts.
  void WeightGradient(std::int64_t first, const Tensor& slopes, const Tensor& sums) const {
    std::int64_t parts_each = kMostParts;
    while (slopes.dim(1) % parts_each != 0) --parts_each;
    const std::int64_t parts = slopes.dim(0) * parts_each;
    const std::int64_t columns = slopes.NumElements() / parts / kD;
    const std::int64_t stride = Blocks(columns, 8) * 8;
    const Tensor transposed = context_.Allocate({parts, kD, stride}, DType::kBF16);
    const dim3 grid(static_cast<unsigned>(Blocks(stride, 32)), kD / 32,
                    static_cast<unsigned>(parts));
    TransposeKernel<kD><<<grid, kThreads, 0, context_.stream>>>(
        slopes.template data<bf16>(), columns, stride, transposed.template data<bf16>());
    CheckLaunch("LinearGradient: transpose");
    const Tensor products = context_.Allocate({parts, kD, kD}, DType::kF32);
    GemmArgs product;
    product.m = product.n = product.ldb = product.ldo = kD;
    product.k = columns;
    product.out_type = DType::kF32;
    product.a = transposed.raw();
    product.lda = stride;
    product.a_stride = kD * stride;
    product.b = sums.raw();
    product.b_stride = columns * kD;
    product.b_is_kn = true;
    product.out = products.raw();
    product.out_stride = kD * kD;
    product.batch = parts;
    context_.gemm->Run(product);
    SumPartsKernel<<<kD * kD / kThreads, kThreads, 0, context_.stream>>>(
        products.template data<float>(), static_cast<int>(parts), kD * kD, first > 0,
        args_.d_proj_weight.template data<float>());
    CheckLaunch("LinearGradient: weight");
  }

  const Context& context_;
  const LinearGradientArgs& args_;
  const bool whole_;
  const std::int64_t length_;
  FeatureParameters features_;
  const Tensor a_;  // [B, L, H, kD]: features of the queries by their normalisers, unrotated
  Tensor weight_;
};

// Those of the branch without its projection, which the gradient folds in elsewhere.
LinearBranchArgs StateArgs(const LinearGradientArgs& args) {
  LinearBranchArgs states{args};
  states.proj_weight = Tensor();
  states.out = args.d_q;
  return states;
}

}  // namespace

bool TensorCoreLinearGradientFits(const LinearGradientArgs& args) {
  const auto aligned = [](const Tensor& x) {
    return reinterpret_cast<std::uintptr_t>(x.raw()) % 16 == 0;
  };
  return TensorCoreLinearBranchFits(StateArgs(args)) && aligned(args.d_out) && aligned(args.d_q) &&
         aligned(args.d_k) && aligned(args.d_v);
}

void TensorCoreLinearGradient(const Context& context, const LinearGradientArgs& args) {
  const auto kernel = ChooseStateKernel(context.compute_major);
  const auto run = [&](auto group) {
    VisitLinearStates(context, StateArgs(args), kernel,
                      [&](const LinearStates& states) { group.Group(states); });
  };
  args.q.dim(3) == 64 ? run(Run<64>(context, args)) : run(Run<128>(context, args));
}

void LinearGradient(const Context& context, const LinearGradientArgs& args) {
  TensorCoreLinearGradientFits(args) ? TensorCoreLinearGradient(context, args)
                                     : RowLinearGradient(context, args);
}

}  // namespace slalom::cuda
