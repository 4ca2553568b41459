// Gradients of both branches with one warp per row, over all pairs of rows that count: for any
// type, head size and blocks, and what the fast kernels are held against.
#include "kernels/cuda/attention/backward.h"
#include "kernels/cuda/attention/features.cuh"
#include "kernels/cuda/check.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPairs = 6;  // head sizes up to 384

unsigned Blocks(std::int64_t items, std::int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// One token's channels over a warp: pair i of a lane is channels 2 * (32 i + lane) and the next.
struct Row {
  float x[kPairs][2] = {};

  __device__ static int Channel(int i) { return 2 * (32 * i + static_cast<int>(threadIdx.x) % 32); }

  template <typename T>
  __device__ void Load(const T* from, int size) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const bool there = Channel(i) < size;
      for (int j = 0; j < 2; ++j) x[i][j] = there ? ToFloat(from[Channel(i) + j]) : 0.0f;
    }
  }
  template <typename T>
  __device__ void Store(T* to, int size, bool accumulate) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (Channel(i) >= size) break;
      for (int j = 0; j < 2; ++j) {
        T& at = to[Channel(i) + j];
        at = FromFloat<T>(accumulate ? ToFloat(at) + x[i][j] : x[i][j]);
      }
    }
  }
  __device__ float Dot(const Row& other) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) sum += x[i][0] * other.x[i][0] + x[i][1] * other.x[i][1];
    return GroupSum<32>(sum);
  }
  __device__ void Add(float factor, const Row& other) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      for (int j = 0; j < 2; ++j) x[i][j] += factor * other.x[i][j];
    }
  }
  __device__ void Scale(float factor) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      for (int j = 0; j < 2; ++j) x[i][j] *= factor;
    }
  }
  // Turns every pair by the token's angle, or back.
  __device__ void Rotate(const FeatureParameters& p, std::int64_t token, int size, bool back) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (Channel(i) >= size) break;
      const std::int64_t angle = token * (size / 2) + Channel(i) / 2;
      RotatePair(p.cos[angle], back ? -p.sin[angle] : p.sin[angle], x[i][0], x[i][1]);
    }
  }
};

// The row that a warp has, of [B, L, H, D].
struct Place {
  std::int64_t token, head_index, start;  // start: element of token 0 of this head and sample
  std::int64_t stride;
  __device__ Place(std::int64_t row, std::int64_t length, int heads, int size)
      : token(row % length),
        head_index(row / length),
        start((row / length / heads * length * heads + row / length % heads) * size),
        stride(std::int64_t{heads} * size) {}
  __device__ std::int64_t At(std::int64_t other) const { return start + other * stride; }
};

template <typename T>
struct SparseParameters {
  const T *q, *k, *v, *d_out;
  const float *lse, *delta;
  T *d_q, *d_k, *d_v;
  bool accumulate;
  std::int64_t length, rows;
  int heads, size;
  float scale;
  BlockList keys, queries;
};

// visit(token) for the tokens of all blocks that are listed for the row's own block.
template <typename Visit>
__device__ void VisitListed(const BlockList& list, const Place& place, std::int64_t length,
                            const Visit& visit) {
  const std::int64_t row = place.head_index * list.query_blocks + place.token / list.block_q;
  const std::int32_t* indices = list.indices + row * list.capacity;
  for (int i = 0; i < list.counts[row]; ++i) {
    const std::int64_t first = static_cast<std::int64_t>(indices[i]) * list.block_k;
    const std::int64_t end = min(first + list.block_k, length);
    for (std::int64_t token = first; token < end; ++token) visit(token);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) SparseQueryKernel(const SparseParameters<T> p) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const Place place(row, p.length, p.heads, p.size);
  Row q, d_out, sum;
  q.Load(p.q + place.At(place.token), p.size);
  d_out.Load(p.d_out + place.At(place.token), p.size);
  const float lse = p.lse[row], delta = p.delta[row];
  VisitListed(p.keys, place, p.length, [&](std::int64_t key) {
    Row k, v;
    k.Load(p.k + place.At(key), p.size);
    v.Load(p.v + place.At(key), p.size);
    sum.Add(expf(p.scale * q.Dot(k) - lse) * (d_out.Dot(v) - delta), k);
  });
  sum.Scale(p.scale);
  sum.Store(p.d_q + place.At(place.token), p.size, p.accumulate);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) SparseKeyKernel(const SparseParameters<T> p) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const Place place(row, p.length, p.heads, p.size);
  Row k, v, d_k, d_v;
  k.Load(p.k + place.At(place.token), p.size);
  v.Load(p.v + place.At(place.token), p.size);
  const float* lse = p.lse + place.head_index * p.length;
  const float* delta = p.delta + place.head_index * p.length;
  VisitListed(p.queries, place, p.length, [&](std::int64_t query) {
    Row q, d_out;
    q.Load(p.q + place.At(query), p.size);
    d_out.Load(p.d_out + place.At(query), p.size);
    const float probability = expf(p.scale * k.Dot(q) - lse[query]);
    d_v.Add(probability, d_out);
    d_k.Add(probability * (v.Dot(d_out) - delta[query]), q);
  });
  d_k.Scale(p.scale);
  d_k.Store(p.d_k + place.At(place.token), p.size, p.accumulate);
  d_v.Store(p.d_v + place.At(place.token), p.size, p.accumulate);
}

template <typename T>
void RunSparse(const Context& context, const SparseGradientProblem& problem) {
  const std::int64_t rows = problem.batch * problem.heads * problem.length;
  const SparseParameters<T> parameters{static_cast<const T*>(problem.q),
                                       static_cast<const T*>(problem.k),
                                       static_cast<const T*>(problem.v),
                                       static_cast<const T*>(problem.d_out),
                                       problem.lse,
                                       problem.delta,
                                       static_cast<T*>(problem.d_q),
                                       static_cast<T*>(problem.d_k),
                                       static_cast<T*>(problem.d_v),
                                       problem.accumulate,
                                       problem.length,
                                       rows,
                                       static_cast<int>(problem.heads),
                                       problem.head_size,
                                       problem.scale,
                                       problem.keys,
                                       problem.queries};
  const unsigned blocks = Blocks(rows, kWarps);
  SparseQueryKernel<T><<<blocks, kThreads, 0, context.stream>>>(parameters);
  SparseKeyKernel<T><<<blocks, kThreads, 0, context.stream>>>(parameters);
  CheckLaunch("RowSparseGradient");
}

// --- the linear branch ---

template <typename T>
struct LinearParameters {
  FeatureParameters features;
  const T *q, *k, *v, *d_out;
  const float* weight;          // [D, D] or null
  const std::uint8_t* classes;  // [B, H, Nq, Nk], unless every key is in scope
  bool whole, only_marginal;
  int block_q, block_k, query_blocks, key_blocks;
  std::int64_t length, rows;
  int heads, size;
  T *d_q, *d_k, *d_v;
  float* delta;                                          // [B, H, L]
  float *q_feature, *q_divisor, *k_feature, *k_divisor;  // [B, L, H, D]
  float *slopes, *out;                                   // [B, L, H, D]: of the unprojected branch
  float* divisor;                                        // [B, H, L]

  __device__ bool InScope(std::int64_t head_index, std::int64_t query, std::int64_t key) const {
    if (whole) return true;
    const std::int64_t row = head_index * query_blocks + query / block_q;
    const auto c = static_cast<BlockClass>(classes[row * key_blocks + key / block_k]);
    return only_marginal ? c == BlockClass::kMarginal : c != BlockClass::kCritical;
  }
};

__device__ inline void MapRow(Feature feature, int size, Row& row) {
  if (feature == Feature::kSoftmax) {
    float max = -INFINITY, sum = 0.0f;
    for (int i = 0; i < kPairs; ++i) {
      if (Row::Channel(i) < size) max = fmaxf(max, fmaxf(row.x[i][0], row.x[i][1]));
    }
    max = GroupMax<32>(max);
    for (int i = 0; i < kPairs; ++i) {
      for (int j = 0; j < 2; ++j) {
        row.x[i][j] = Row::Channel(i) < size ? expf(row.x[i][j] - max) : 0.0f;
        sum += row.x[i][j];
      }
    }
    row.Scale(1.0f / GroupSum<32>(sum));
    return;
  }
  for (int i = 0; i < kPairs; ++i) {
    for (int j = 0; j < 2; ++j) {
      float& x = row.x[i][j];
      if (Row::Channel(i) >= size) continue;
      x = feature == Feature::kElu ? (x > 0.0f ? x + 1.0f : expf(x)) : fmaxf(x, 0.0f);
    }
  }
}

// d x, given phi(x) and d phi(x): whether x was positive shows in its feature.
__device__ inline void FeatureGradient(Feature feature, const Row& phi, Row& d) {
  const float mean = feature == Feature::kSoftmax ? phi.Dot(d) : 0.0f;
  for (int i = 0; i < kPairs; ++i) {
    for (int j = 0; j < 2; ++j) {
      const float f = phi.x[i][j];
      if (feature == Feature::kSoftmax) {
        d.x[i][j] = f * (d.x[i][j] - mean);
      } else if (feature == Feature::kElu) {
        d.x[i][j] *= fminf(f, 1.0f);
      } else if (f <= 0.0f) {
        d.x[i][j] = 0.0f;
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    FeatureKernel(const LinearParameters<T> p, const T* x, float* feature, float* divisor) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const Place place(row, p.length, p.heads, p.size);
  const std::int64_t at = place.At(place.token);
  Row own;
  own.Load(x + at, p.size);
  MapRow(p.features.feature, p.size, own);
  own.Store(divisor + at, p.size, false);
  if (p.features.feature == Feature::kRotatedRelu) {
    own.Rotate(p.features, place.token, p.size, false);
  }
  own.Store(feature + at, p.size, false);
}

// slopes = d_out weight, or d_out. A thread per element.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    SlopeKernel(const LinearParameters<T> p, std::int64_t elements) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= elements) return;
  float sum = 0.0f;
  if (p.weight == nullptr) {
    sum = ToFloat(p.d_out[i]);
  } else {
    const int c = static_cast<int>(i % p.size);
    for (int e = 0; e < p.size; ++e) sum += ToFloat(p.d_out[i - c + e]) * p.weight[e * p.size + c];
  }
  p.slopes[i] = sum;
}

// A key's features, as they meet V and as they meet ones, and its value.
struct KeyRows {
  Row feature, divisor, v;

  template <typename T>
  __device__ KeyRows(const LinearParameters<T>& p, std::int64_t at) {
    feature.Load(p.k_feature + at, p.size);
    divisor.Load(p.k_divisor + at, p.size);
    v.Load(p.v + at, p.size);
  }
};

// d x of one token, to `d_x`, from the gradients of its features as they meet the other side's and
// of those in the normaliser.
template <typename T>
__device__ inline void StoreGradient(const LinearParameters<T>& p, const Place& place,
                                     const Row& divisor, Row d_feature, const Row& d_divisor,
                                     T* d_x) {
  if (p.features.feature == Feature::kRotatedRelu) {
    d_feature.Rotate(p.features, place.token, p.size, true);
  }
  d_feature.Add(1.0f, d_divisor);
  FeatureGradient(p.features.feature, divisor, d_feature);
  d_feature.Store(d_x + place.At(place.token), p.size, false);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) LinearQueryKernel(const LinearParameters<T> p) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const Place place(row, p.length, p.heads, p.size);
  const std::int64_t at = place.At(place.token);
  Row feature, own_divisor, slope, out;
  feature.Load(p.q_feature + at, p.size);
  own_divisor.Load(p.q_divisor + at, p.size);
  slope.Load(p.slopes + at, p.size);
  float divisor = kNormaliserEpsilon;
  for (std::int64_t key = 0; key < p.length; ++key) {
    if (!p.InScope(place.head_index, place.token, key)) continue;
    const KeyRows k(p, place.At(key));
    divisor += own_divisor.Dot(k.divisor);
    out.Add(feature.Dot(k.feature), k.v);
  }
  out.Scale(1.0f / divisor);
  out.Store(p.out + at, p.size, false);
  const float delta = out.Dot(slope);
  if (threadIdx.x % 32 == 0) {
    p.divisor[row] = divisor;
    p.delta[row] = delta;
  }
  Row d_feature, d_divisor;
  for (std::int64_t key = 0; key < p.length; ++key) {
    if (!p.InScope(place.head_index, place.token, key)) continue;
    const KeyRows k(p, place.At(key));
    d_feature.Add(slope.Dot(k.v) / divisor, k.feature);
    d_divisor.Add(-delta / divisor, k.divisor);
  }
  StoreGradient(p, place, own_divisor, d_feature, d_divisor, p.d_q);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) LinearKeyKernel(const LinearParameters<T> p) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const Place place(row, p.length, p.heads, p.size);
  const std::int64_t at = place.At(place.token);
  const float* divisors = p.divisor + place.head_index * p.length;
  const float* deltas = p.delta + place.head_index * p.length;
  const KeyRows own(p, at);
  Row d_feature, d_divisor, d_v;
  for (std::int64_t query = 0; query < p.length; ++query) {
    if (!p.InScope(place.head_index, query, place.token)) continue;
    Row q_feature, q_divisor, slope;
    q_feature.Load(p.q_feature + place.At(query), p.size);
    q_divisor.Load(p.q_divisor + place.At(query), p.size);
    slope.Load(p.slopes + place.At(query), p.size);
    const float inverse = 1.0f / divisors[query];
    d_v.Add(inverse * own.feature.Dot(q_feature), slope);
    d_feature.Add(inverse * own.v.Dot(slope), q_feature);
    d_divisor.Add(-inverse * deltas[query], q_divisor);
  }
  StoreGradient(p, place, own.divisor, d_feature, d_divisor, p.d_k);
  d_v.Store(p.d_v + at, p.size, false);
}

// d_weight[e, c] = the sum of d_out[., e] out[., c] over all tokens and heads. A block per element.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    WeightKernel(const LinearParameters<T> p, float* d_weight) {
  __shared__ float shared[32];
  const int e = static_cast<int>(blockIdx.x) / p.size, c = static_cast<int>(blockIdx.x) % p.size;
  float sum = 0.0f;
  for (std::int64_t r = threadIdx.x; r < p.rows; r += kThreads) {
    sum += ToFloat(p.d_out[r * p.size + e]) * p.out[r * p.size + c];
  }
  sum = BlockSum(sum, shared);
  if (threadIdx.x == 0) d_weight[blockIdx.x] = sum;
}

template <typename T>
void RunLinear(const Context& context, const LinearGradientArgs& args) {
  const std::int64_t rows = args.delta.NumElements();
  const bool rotated = args.feature == Feature::kRotatedRelu;
  const bool whole = args.scope == LinearScope::kAll;
  const Tensor scratch = context.Allocate({6, args.q.NumElements()}, DType::kF32);
  const Tensor divisor = context.Allocate(args.delta.shape(), DType::kF32);
  LinearParameters<T> p{};
  p.features = {args.feature, rotated ? args.cos.data<float>() : nullptr,
                rotated ? args.sin.data<float>() : nullptr};
  p.q = args.q.data<T>();
  p.k = args.k.data<T>();
  p.v = args.v.data<T>();
  p.d_out = args.d_out.data<T>();
  p.weight = args.proj_weight.defined() ? args.proj_weight.data<float>() : nullptr;
  p.whole = whole;
  p.only_marginal = args.scope == LinearScope::kMarginal;
  if (!whole) {
    p.classes = args.map->classes.data<std::uint8_t>();
    p.block_q = args.map->block_q;
    p.block_k = args.map->block_k;
    p.query_blocks = static_cast<int>(args.map->classes.dim(2));
    p.key_blocks = static_cast<int>(args.map->classes.dim(3));
  }
  p.length = args.q.dim(1);
  p.rows = rows;
  p.heads = static_cast<int>(args.q.dim(2));
  p.size = static_cast<int>(args.q.dim(3));
  p.d_q = args.d_q.data<T>();
  p.d_k = args.d_k.data<T>();
  p.d_v = args.d_v.data<T>();
  p.delta = args.delta.data<float>();
  float** const arrays[] = {&p.q_feature, &p.q_divisor, &p.k_feature,
                            &p.k_divisor, &p.slopes,    &p.out};
  for (std::int64_t i = 0; i < 6; ++i) {
    *arrays[i] = scratch.data<float>() + i * args.q.NumElements();
  }
  p.divisor = divisor.data<float>();
  const unsigned blocks = Blocks(rows, kWarps);
  const std::int64_t elements = args.q.NumElements();
  FeatureKernel<T><<<blocks, kThreads, 0, context.stream>>>(p, p.q, p.q_feature, p.q_divisor);
  FeatureKernel<T><<<blocks, kThreads, 0, context.stream>>>(p, p.k, p.k_feature, p.k_divisor);
  SlopeKernel<T><<<Blocks(elements, kThreads), kThreads, 0, context.stream>>>(p, elements);
  LinearQueryKernel<T><<<blocks, kThreads, 0, context.stream>>>(p);
  LinearKeyKernel<T><<<blocks, kThreads, 0, context.stream>>>(p);
  if (p.weight != nullptr) {
    WeightKernel<T><<<static_cast<unsigned>(p.size * p.size), kThreads, 0, context.stream>>>(
        p, args.d_proj_weight.data<float>());
  }
  CheckLaunch("RowLinearGradient");
}

}  // namespace

void RowSparseGradient(const Context& context, const SparseGradientProblem& problem) {
  problem.dtype == DType::kBF16 ? RunSparse<bf16>(context, problem)
                                : RunSparse<float>(context, problem);
}

void RowLinearGradient(const Context& context, const LinearGradientArgs& args) {
  args.q.dtype() == DType::kBF16 ? RunLinear<bf16>(context, args) : RunLinear<float>(context, args);
}

}  // namespace slalom::cuda
