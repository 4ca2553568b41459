// What keys and values are reduced to, for the scopes of all query blocks: sums per chunk of keys,
// and their sums over the scope, by a plain addition or, where it differs between query blocks, as
// a product with the scope's mask.
#include <algorithm>

#include "kernels/cuda/attention/linear_states.cuh"
#include "kernels/cuda/check.h"
#include "kernels/cuda/gemm.h"

namespace slalom::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kThreads = 256;
constexpr int kOwnRows = 4;  // of a state, that a thread of SumStatesKernel has
constexpr std::int64_t kScratchBytes = std::int64_t{512} << 20;  // for the heads taken at once

std::int64_t Blocks(std::int64_t length, std::int64_t block) {
  return (length + block - 1) / block;
}

// to = from [kD, kD] transposed.
template <int kD, typename T>
__global__ void __launch_bounds__(kThreads) TransposeKernel(const float* from, T* to) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  to[i] = FromFloat<T>(from[i % kD * kD + i / kD]);
}

// sums [heads, kD + 1, kD] = the sum of states [heads, chunks, kD + 1, kD], the first kD rows times
// `weight`, which is transposed, where there is one. Grid (groups of rows, heads); a thread has one
// column of kOwnRows rows, so that it reads an element of the weight once for all of them.
template <int kD>
__global__ void __launch_bounds__(kThreads)
    SumStatesKernel(const float* states, int chunks, const float* weight, bf16* sums) {
  constexpr int kGroups = kThreads / kD;
  constexpr int kElements = (kD + 1) * kD;
  __shared__ __align__(16) float rows[kGroups * kOwnRows][kD];
  const int group = threadIdx.x / kD, column = threadIdx.x % kD;
  const int first = (blockIdx.x * kGroups + group) * kOwnRows;
  states += static_cast<std::int64_t>(blockIdx.y) * chunks * kElements + column;
  float sum[kOwnRows] = {};
#pragma unroll 4
  for (int c = 0; c < chunks; ++c) {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      if (first + i <= kD) {
        sum[i] += states[static_cast<std::int64_t>(c) * kElements + (first + i) * kD];
      }
    }
  }
  if (weight != nullptr) {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) rows[group * kOwnRows + i][column] = sum[i];
    __syncthreads();
    float product[kOwnRows] = {};
#pragma unroll 8
    for (int c = 0; c < kD; c += 4) {
      float w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) w[j] = weight[(c + j) * kD + column];
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        float x[4];
        LoadFloats<4>(&rows[group * kOwnRows + i][c], x);
#pragma unroll
        for (int j = 0; j < 4; ++j) product[i] += w[j] * x[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      if (first + i < kD) sum[i] = product[i];  // the normaliser is not projected
    }
  }
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    if (first + i <= kD) {
      sums[static_cast<std::int64_t>(blockIdx.y) * kElements + (first + i) * kD + column] =
          FromFloat<bf16>(sum[i]);
    }
  }
}

// mask [rows, stride]: 1 where a key block is in scope; columns from key_blocks on are 0.
__global__ void __launch_bounds__(kThreads)
    MaskKernel(const std::uint8_t* classes, std::int64_t rows, int key_blocks, int stride,
               bool only_marginal, bf16* mask) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows * stride) return;
  const int column = static_cast<int>(i % stride);
  bool inside = false;
  if (column < key_blocks) {
    const auto block = static_cast<BlockClass>(classes[i / stride * key_blocks + column]);
    inside = only_marginal ? block == BlockClass::kMarginal : block != BlockClass::kCritical;
  }
  mask[i] = FromFloat<bf16>(inside ? 1.0f : 0.0f);
}

// sums [heads, query blocks, elements] = mask [heads, query blocks, key blocks] times states.
void SumScope(const Context& context, const LinearBranchInputs& inputs, std::int64_t first_head,
              const Tensor& states, const Tensor& sums) {
  const std::int64_t nq = inputs.map->classes.dim(2), nk = inputs.map->classes.dim(3);
  const std::int64_t heads = states.dim(0), elements = states.dim(2);
  const std::int64_t stride = Blocks(nk, 8) * 8;  // rows stay aligned
  const Tensor mask = context.Allocate({heads, nq, stride}, DType::kBF16);
  MaskKernel<<<static_cast<unsigned>(Blocks(mask.NumElements(), kThreads)), kThreads, 0,
               context.stream>>>(inputs.map->classes.data<std::uint8_t>() + first_head * nq * nk,
                                 heads * nq, static_cast<int>(nk), static_cast<int>(stride),
                                 inputs.scope == LinearScope::kMarginal, mask.data<bf16>());
  CheckLaunch("LinearBranch: scope");
  GemmArgs product;
  product.m = nq;
  product.n = elements;
  product.k = nk;
  product.a = mask.raw();
  product.lda = stride;
  product.a_stride = nq * stride;
  product.b = states.raw();
  product.ldb = elements;
  product.b_stride = nk * elements;
  product.b_is_kn = true;
  product.out = sums.raw();
  product.ldo = elements;
  product.out_stride = nq * elements;
  product.batch = heads;
  context.gemm->Run(product);
}

// Every key in scope: one sum per head, which the projection, transposed, is folded into.
template <int kD>
void SumAll(const Context& context, const LinearBranchInputs& inputs, StateKernelKind kernel,
            StateProblem& problem, const Tensor& weight, const Tensor& sums) {
  // One wave of blocks for one sample's heads. It must not depend on how many samples there are.
  const std::int64_t blocks = kernel == StateKernelKind::kHopper ? HopperStateBlocks(context, kD)
                                                                 : TensorCoreStateBlocks(context);
  const std::int64_t length = inputs.q.dim(1), tiles = Blocks(length, kTile);
  const std::int64_t blocks_per_head = std::max<std::int64_t>(blocks / inputs.q.dim(2), 1);
  problem.chunk = static_cast<int>(Blocks(tiles, blocks_per_head)) * kTile;
  const std::int64_t chunks = Blocks(length, problem.chunk);
  problem.states = context.Allocate({sums.dim(0), chunks, sums.dim(2)}, DType::kF32);
  RunStates(context, problem, kernel);
  const dim3 grid(static_cast<unsigned>(Blocks(kD + 1, kThreads / kD * kOwnRows)),
                  static_cast<unsigned>(sums.dim(0)));
  SumStatesKernel<kD><<<grid, kThreads, 0, context.stream>>>(
      problem.states.data<float>(), static_cast<int>(chunks),
      weight.defined() ? weight.data<float>() : nullptr, sums.data<bf16>());
  CheckLaunch("LinearBranch: sum");
}

template <int kD, typename T>
Tensor Transpose(const Context& context, const Tensor& weight, DType type) {
  const Tensor transposed = context.Allocate({kD, kD}, type);
  TransposeKernel<kD, T><<<kD * kD / kThreads, kThreads, 0, context.stream>>>(weight.data<float>(),
                                                                              transposed.data<T>());
  CheckLaunch("LinearBranch: weight");
  return transposed;
}

template <int kD>
void Visit(const Context& context, const LinearBranchInputs& inputs, StateKernelKind kernel,
           const std::function<void(const LinearStates&)>& visit) {
  const bool whole = inputs.scope == LinearScope::kAll;
  const std::int64_t heads = inputs.q.dim(0) * inputs.q.dim(2),
                     elements = std::int64_t{kD + 1} * kD;
  const std::int64_t query_states = whole ? 1 : inputs.map->classes.dim(2);
  const std::int64_t key_states = whole ? 0 : inputs.map->classes.dim(3);
  std::int64_t at_once = heads;
  if (!whole) {
    const std::int64_t bytes = (query_states + key_states) * elements * 2;
    at_once = std::clamp<std::int64_t>(kScratchBytes / bytes, 1, heads);
  }
  Tensor folded;
  LinearStates states;
  states.states_per_head = static_cast<int>(query_states);
  if (inputs.proj_weight.defined()) {
    if (whole) {
      folded = Transpose<kD, float>(context, inputs.proj_weight, DType::kF32);
    } else {
      states.weight = Transpose<kD, bf16>(context, inputs.proj_weight, DType::kBF16);
    }
  }
  const bool rotated = inputs.feature == Feature::kRotatedRelu;
  StateProblem problem;
  problem.features = {inputs.feature, rotated ? inputs.cos.data<float>() : nullptr,
                      rotated ? inputs.sin.data<float>() : nullptr};
  problem.k = inputs.k.data<bf16>();
  problem.v = inputs.v.data<bf16>();
  problem.batch = inputs.q.dim(0);
  problem.length = inputs.q.dim(1);
  problem.heads = inputs.q.dim(2);
  problem.head_size = kD;
  for (std::int64_t first = 0; first < heads; first += at_once) {
    const std::int64_t count = std::min(at_once, heads - first);
    problem.first_head = states.first_head = static_cast<int>(first);
    states.heads = static_cast<int>(count);
    states.sums = context.Allocate({count, query_states, elements}, DType::kBF16);
    if (whole) {
      SumAll<kD>(context, inputs, kernel, problem, folded, states.sums);
    } else {
      problem.chunk = inputs.map->block_k;
      problem.states = context.Allocate({count, key_states, elements}, DType::kBF16);
      RunStates(context, problem, kernel);
      SumScope(context, inputs, first, problem.states, states.sums);
    }
    problem.states = Tensor();  // its memory serves the next heads
    visit(states);
  }
}

}  // namespace

void RunStates(const Context& context, const StateProblem& problem, StateKernelKind kernel) {
  const bool whole_tiles = problem.chunk % kTile == 0;
  kernel == StateKernelKind::kHopper&& whole_tiles ? HopperStates(context, problem)
                                                   : TensorCoreStates(context, problem);
}

StateKernelKind ChooseStateKernel(int compute_major) {
  return compute_major == kHopperMajor ? StateKernelKind::kHopper : StateKernelKind::kTensorCore;
}

void VisitLinearStates(const Context& context, const LinearBranchInputs& inputs,
                       StateKernelKind kernel,
                       const std::function<void(const LinearStates&)>& visit) {
  inputs.q.dim(3) == 64 ? Visit<64>(context, inputs, kernel, visit)
                        : Visit<128>(context, inputs, kernel, visit);
}

}  // namespace slalom::cuda
