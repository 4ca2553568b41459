#include <algorithm>

#include "kernels/cuda/attention/linear_branch.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTokens = 32;       // held in shared memory at once
constexpr int kPairsPerLane = 6;  // head sizes up to 384
constexpr int kMaxHeadSize = 64 * kPairsPerLane;
constexpr int kWholeChunk = 256;  // keys per partial sum when every key is in scope
constexpr float kEpsilon = 1e-5f;

// One head of one sample.
template <typename T>
struct HeadView {
  const T* rows;  // token 0
  std::int64_t stride;
  __device__ const T* Row(std::int64_t token) const { return rows + token * stride; }
};

struct FeatureParameters {
  Feature feature;
  int head_size;
  const float* cos;
  const float* sin;
};

// The features of a token, spread over a warp: pair i of a lane holds channels 2 * (32 i + lane)
// and the next. `product` is what meets V, `normaliser` what meets ones.
struct TokenFeatures {
  float product[kPairsPerLane][2];
  float normaliser[kPairsPerLane][2];

  template <typename T>
  __device__ void Load(const FeatureParameters& p, const T* row, std::int64_t token) {
    const int lane = threadIdx.x % 32;
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPairsPerLane; ++i) {
      const int c = 2 * (32 * i + lane);
      const bool there = c < p.head_size;
      for (int j = 0; j < 2; ++j) {
        product[i][j] = there ? ToFloat(row[c + j]) : 0.0f;
        if (there) max = fmaxf(max, product[i][j]);
      }
    }
    if (p.feature == Feature::kSoftmax) {
      Softmax(p, GroupMax<32>(max));
    } else {
#pragma unroll
      for (int i = 0; i < kPairsPerLane; ++i) {
        for (int j = 0; j < 2; ++j) product[i][j] = Map(p.feature, product[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPairsPerLane; ++i) {
      normaliser[i][0] = product[i][0];
      normaliser[i][1] = product[i][1];
    }
    if (p.feature == Feature::kRotatedRelu) Rotate(p, token);
  }

 private:
  __device__ static float Map(Feature feature, float x) {
    return feature == Feature::kElu ? (x > 0.0f ? x + 1.0f : expf(x)) : fmaxf(x, 0.0f);
  }
  __device__ void Softmax(const FeatureParameters& p, float max) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairsPerLane; ++i) {
      const bool there = 2 * (32 * i + static_cast<int>(threadIdx.x % 32)) < p.head_size;
      for (int j = 0; j < 2; ++j) {
        product[i][j] = there ? expf(product[i][j] - max) : 0.0f;
        sum += product[i][j];
      }
    }
    sum = GroupSum<32>(sum);
#pragma unroll
    for (int i = 0; i < kPairsPerLane; ++i) {
      for (int j = 0; j < 2; ++j) product[i][j] /= sum;
    }
  }
  __device__ void Rotate(const FeatureParameters& p, std::int64_t token) {
#pragma unroll
    for (int i = 0; i < kPairsPerLane; ++i) {
      const int pair = 32 * i + threadIdx.x % 32;
      if (2 * pair >= p.head_size) continue;
      const float c = p.cos[token * (p.head_size / 2) + pair];
      const float s = p.sin[token * (p.head_size / 2) + pair];
      const float even = product[i][0], odd = product[i][1];
      product[i][0] = even * c - odd * s;
      product[i][1] = even * s + odd * c;
    }
  }
};

// state [chunks, D + 1, D]: rows 0 .. D - 1 of a chunk are the sum of feature(k)^T v over its keys,
// row D is the sum of the normalisers. One block of threads per chunk of keys.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    StateKernel(const FeatureParameters p, HeadView<T> k, HeadView<T> v, std::int64_t length,
                int chunk, float* state) {
  extern __shared__ float shared[];
  const int d = p.head_size;
  float* features = shared;                // [kTokens][d]
  float* values = features + kTokens * d;  // [kTokens][d]
  float* totals = values + kTokens * d;    // [kWarps][d]
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * chunk;
  const std::int64_t end = min(first + chunk, length);
  state += static_cast<std::int64_t>(blockIdx.x) * (d + 1) * d;
  const int tiles_per_row = d / 8;
  const int tiles = tiles_per_row * tiles_per_row;

  for (int round = 0; round < tiles; round += kThreads) {
    const int tile = round + threadIdx.x;
    const int row = tile / tiles_per_row * 8;
    const int column = tile % tiles_per_row * 8;
    float sum[8][8] = {};
    float total[kPairsPerLane][2] = {};
    for (std::int64_t start = first; start < end; start += kTokens) {
      const int tokens = static_cast<int>(min(static_cast<std::int64_t>(kTokens), end - start));
      for (int t = warp; t < tokens; t += kWarps) {
        TokenFeatures token;
        token.Load(p, k.Row(start + t), start + t);
#pragma unroll
        for (int i = 0; i < kPairsPerLane; ++i) {
          const int c = 2 * (32 * i + lane);
          for (int j = 0; j < 2; ++j) {
            total[i][j] += token.normaliser[i][j];
            if (c < d) {
              features[t * d + c + j] = token.product[i][j];
              values[t * d + c + j] = ToFloat(v.Row(start + t)[c + j]);
            }
          }
        }
      }
      __syncthreads();
      if (tile < tiles) {
        for (int t = 0; t < tokens; ++t) {
          float a[8], b[8];
          LoadFloats<8>(features + t * d + row, a);
          LoadFloats<8>(values + t * d + column, b);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[i][j] += a[i] * b[j];
          }
        }
      }
      __syncthreads();
    }
    if (tile < tiles) {
#pragma unroll
      for (int i = 0; i < 8; ++i) StoreFloats<8>(state + (row + i) * d + column, sum[i]);
    }
    if (round > 0) continue;
#pragma unroll
    for (int i = 0; i < kPairsPerLane; ++i) {
      const int c = 2 * (32 * i + lane);
      for (int j = 0; j < 2; ++j) {
        if (c < d) totals[warp * d + c + j] = total[i][j];
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < d; c += kThreads) {
      float normaliser = 0.0f;
      for (int w = 0; w < kWarps; ++w) normaliser += totals[w * d + c];
      state[d * d + c] = normaliser;
    }
  }
}

// total = the sum of all chunks' states.
__global__ void __launch_bounds__(kThreads)
    SumStatesKernel(const float* states, std::int64_t chunks, std::int64_t elements, float* total) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= elements) return;
  float sum = 0.0f;
  for (std::int64_t c = 0; c < chunks; ++c) sum += states[c * elements + i];
  total[i] = sum;
}

__global__ void __launch_bounds__(kThreads)
    ScopeKernel(const std::uint8_t* classes, std::int64_t elements, bool only_marginal,
                float* mask) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= elements) return;
  const auto block = static_cast<BlockClass>(classes[i]);
  const bool inside =
      only_marginal ? block == BlockClass::kMarginal : block != BlockClass::kCritical;
  mask[i] = inside ? 1.0f : 0.0f;
}

__global__ void __launch_bounds__(kThreads)
    TransposeKernel(const float* from, int size, float* to) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < size * size) to[i % size * size + i / size] = from[i];
}

struct ApplyParameters {
  FeatureParameters features;
  std::int64_t length;
  int block_q;                // tokens that share a state
  std::int64_t state_stride;  // elements; 0 when all share one
  const float* state;         // [.., D + 1, D]
  const float* weight;        // [D, D], transposed, or null
  const float* bias;
  bool accumulate;
};

// Four tokens times four channels of x [kTokens, d] (shared memory) times m [d, d].
__device__ inline void MultiplyTile(const float* x, const float* m, int d, int token, int column,
                                    float (&sum)[4][4]) {
  for (int c = 0; c < d; ++c) {
    const float4 row =
        *reinterpret_cast<const float4*>(m + static_cast<std::int64_t>(c) * d + column);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float value = x[(token + t) * d + c];
      sum[t][0] += value * row.x;
      sum[t][1] += value * row.y;
      sum[t][2] += value * row.z;
      sum[t][3] += value * row.w;
    }
  }
}

// One block of threads per kTokens queries of a query block: grid (pieces of a block, blocks).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    ApplyKernel(const ApplyParameters p, HeadView<T> q, T* out, std::int64_t out_stride) {
  extern __shared__ float shared[];
  const int d = p.features.head_size;
  float* features = shared;                // [kTokens][d]
  float* linear = features + kTokens * d;  // [kTokens][d]
  float* inverse = linear + kTokens * d;   // [kTokens]
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const std::int64_t block_first = static_cast<std::int64_t>(blockIdx.y) * p.block_q;
  const std::int64_t first = block_first + static_cast<std::int64_t>(blockIdx.x) * kTokens;
  const std::int64_t end = min(min(first + kTokens, block_first + p.block_q), p.length);
  const float* state = p.state + blockIdx.y * p.state_stride;
  const float* normaliser = state + static_cast<std::int64_t>(d) * d;

  for (int t = warp; t < kTokens; t += kWarps) {
    const bool there = first + t < end;
    TokenFeatures token;
    token.Load(p.features, q.Row(there ? first + t : end - 1), there ? first + t : end - 1);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairsPerLane; ++i) {
      const int c = 2 * (32 * i + lane);
      if (c >= d) continue;
      for (int j = 0; j < 2; ++j) {
        sum += token.normaliser[i][j] * normaliser[c + j];
        features[t * d + c + j] = token.product[i][j];
      }
    }
    sum = GroupSum<32>(sum);
    if (lane == 0) inverse[t] = 1.0f / (sum + kEpsilon);
  }
  __syncthreads();

  const int columns = d / 4;
  const int items = columns * (kTokens / 4);
  for (int item = threadIdx.x; item < items; item += kThreads) {
    const int column = item % columns * 4;
    const int token = item / columns * 4;
    float sum[4][4] = {};
    MultiplyTile(features, state, d, token, column, sum);
    for (int t = 0; t < 4; ++t) {
      for (int j = 0; j < 4; ++j)
        linear[(token + t) * d + column + j] = sum[t][j] * inverse[token + t];
    }
  }
  __syncthreads();

  for (int item = threadIdx.x; item < items; item += kThreads) {
    const int column = item % columns * 4;
    const int token = item / columns * 4;
    float sum[4][4] = {};
    if (p.weight != nullptr) {
      MultiplyTile(linear, p.weight, d, token, column, sum);
    } else {
      for (int t = 0; t < 4; ++t) {
        for (int j = 0; j < 4; ++j) sum[t][j] = linear[(token + t) * d + column + j];
      }
    }
    for (int t = 0; t < 4; ++t) {
      if (first + token + t >= end) break;
      T* to = out + (first + token + t) * out_stride + column;
      for (int j = 0; j < 4; ++j) {
        float y = sum[t][j];
        if (p.weight != nullptr) y += p.bias[column + j];
        if (p.accumulate) y += ToFloat(to[j]);
        to[j] = FromFloat<T>(y);
      }
    }
  }
}

std::int64_t Blocks(std::int64_t length, std::int64_t block) {
  return (length + block - 1) / block;
}

// The sums per query block: states [Nq, D + 1, D] from the key blocks' own [Nk, D + 1, D].
void SumScope(const Context& context, const LinearBranchArgs& args, std::int64_t head_index,
              const Tensor& states, const Tensor& mask, const Tensor& sums) {
  const BlockMap& map = *args.map;
  const std::int64_t nq = map.classes.dim(2), nk = map.classes.dim(3);
  ScopeKernel<<<static_cast<unsigned>(Blocks(nq * nk, kThreads)), kThreads, 0, context.stream>>>(
      map.classes.data<std::uint8_t>() + head_index * nq * nk, nq * nk,
      args.scope == LinearScope::kMarginal, mask.data<float>());
  CheckLaunch("LinearBranch: scope");
  GemmArgs product;
  product.m = nq;
  product.n = states.NumElements() / nk;
  product.k = nk;
  product.in_type = DType::kF32;
  product.out_type = DType::kF32;
  product.a = mask.raw();
  product.lda = nk;
  product.b = states.raw();
  product.ldb = product.n;
  product.b_is_kn = true;
  product.out = sums.raw();
  product.ldo = product.n;
  context.gemm->Run(product);
}

template <typename T>
void Run(const Context& context, const LinearBranchArgs& args) {
  const std::int64_t batch = args.q.dim(0), length = args.q.dim(1), heads = args.q.dim(2);
  const int d = static_cast<int>(args.q.dim(3));
  const std::int64_t elements = static_cast<std::int64_t>(d + 1) * d;
  const bool whole = args.scope == LinearScope::kAll;
  const int chunk = whole ? kWholeChunk : args.map->block_k;
  const int block_q = whole ? kWholeChunk : args.map->block_q;
  const std::int64_t nk = Blocks(length, chunk);
  const std::int64_t nq = Blocks(length, block_q);
  const Tensor states = context.Allocate({nk, elements}, DType::kF32);
  const Tensor sums = context.Allocate({whole ? 1 : nq, elements}, DType::kF32);
  const Tensor mask = whole ? Tensor() : context.Allocate({nq, nk}, DType::kF32);
  Tensor weight;
  if (args.proj_weight.defined()) {
    weight = context.Allocate({d, d}, DType::kF32);
    TransposeKernel<<<static_cast<unsigned>(Blocks(std::int64_t{d} * d, kThreads)), kThreads, 0,
                      context.stream>>>(args.proj_weight.data<float>(), d, weight.data<float>());
    CheckLaunch("LinearBranch: weight");
  }
  const std::size_t state_bytes = sizeof(float) * d * (2 * kTokens + kWarps);
  const std::size_t apply_bytes = sizeof(float) * (2 * kTokens * d + kTokens);
  Check(cudaFuncSetAttribute(StateKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(state_bytes)),
        "LinearBranch: shared memory");
  Check(cudaFuncSetAttribute(ApplyKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(apply_bytes)),
        "LinearBranch: shared memory");
  const bool rotated = args.feature == Feature::kRotatedRelu;
  const FeatureParameters features{args.feature, d, rotated ? args.cos.data<float>() : nullptr,
                                   rotated ? args.sin.data<float>() : nullptr};
  const std::int64_t stride = heads * d;
  for (std::int64_t head_index = 0; head_index < batch * heads; ++head_index) {
    const std::int64_t start = head_index / heads * length * stride + head_index % heads * d;
    const auto view = [&](const Tensor& x) { return HeadView<T>{x.data<T>() + start, stride}; };
    StateKernel<T><<<static_cast<unsigned>(nk), kThreads, state_bytes, context.stream>>>(
        features, view(args.k), view(args.v), length, chunk, states.data<float>());
    CheckLaunch("LinearBranch: states");
    if (whole) {
      SumStatesKernel<<<static_cast<unsigned>(Blocks(elements, kThreads)), kThreads, 0,
                        context.stream>>>(states.data<float>(), nk, elements, sums.data<float>());
      CheckLaunch("LinearBranch: sum");
    } else {
      SumScope(context, args, head_index, states, mask, sums);
    }
    const ApplyParameters parameters{features,
                                     length,
                                     block_q,
                                     whole ? 0 : elements,
                                     sums.data<float>(),
                                     weight.defined() ? weight.data<float>() : nullptr,
                                     weight.defined() ? args.proj_bias.data<float>() : nullptr,
                                     args.accumulate};
    const dim3 grid(static_cast<unsigned>(Blocks(block_q, kTokens)), static_cast<unsigned>(nq));
    ApplyKernel<T><<<grid, kThreads, apply_bytes, context.stream>>>(
        parameters, view(args.q), args.out.data<T>() + start, stride);
    CheckLaunch("LinearBranch: apply");
  }
}

}  // namespace

void LinearBranch(const Context& context, const LinearBranchArgs& args) {
  Require(args.q.dim(3) % 8 == 0 && args.q.dim(3) <= kMaxHeadSize,
          "LinearBranch: the head size is not a multiple of 8 up to 384");
  if (args.q.NumElements() == 0) return;
  if (TensorCoreLinearBranchFits(args)) {
    return TensorCoreLinearBranch(context, args, ChooseStateKernel(context.compute_major));
  }
  args.q.dtype() == DType::kBF16 ? Run<bf16>(context, args) : Run<float>(context, args);
}

}  // namespace slalom::cuda
