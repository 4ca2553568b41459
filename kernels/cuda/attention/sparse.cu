// SLA and SALAD: the sparse branch over critical blocks and the linear branch, mixed.
#include "kernels/cuda/attention/linear_branch.h"
#include "kernels/cuda/attention/problem.h"
#include "kernels/cuda/attention/salad.h"
#include "kernels/cuda/attention/sla.h"
#include "kernels/cuda/attention/sparse_parts.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

constexpr int kThreads = 256;

void CheckMap(const BlockMap* map, const Tensor& q) {
  Require(map != nullptr, "sparse attention: the map is missing");
  const std::int64_t length = q.dim(1);
  const std::int64_t nq = (length + map->block_q - 1) / map->block_q;
  const std::int64_t nk = (length + map->block_k - 1) / map->block_k;
  RequireTensor(map->classes, {q.dim(0), q.dim(2), nq, nk}, DType::kU8,
                "sparse attention: map.classes");
  Require(map->critical.defined() && map->counts.defined(),
          "sparse attention: the map has no lists");
}

void CheckQkv(const Tensor& q, const Tensor& k, const Tensor& v) {
  Require(q.defined() && q.shape().rank() == 4 && IsComputeType(q.dtype()),
          "sparse attention: q is not [B, L, H, D] of f32 or bf16");
  RequireTensor(k, q.shape(), q.dtype(), "sparse attention: k");
  RequireTensor(v, q.shape(), q.dtype(), "sparse attention: v");
}

void CheckLse(const Tensor& lse, const Tensor& q) {
  if (!lse.defined()) return;
  RequireTensor(lse, {q.dim(0), q.dim(2), q.dim(1)}, DType::kF32, "sparse attention: lse");
}

// softmax over the critical blocks, into out [B, L, H, D].
AttentionProblem SparseProblem(const Tensor& q, const Tensor& k, const Tensor& v,
                               const BlockMap& map, const Tensor& lse, const Tensor& out) {
  AttentionProblem problem = AttentionProblem::Of(q, k, v, out);
  problem.lse = lse.defined() ? lse.data<float>() : nullptr;
  problem.list = BlockList::Critical(map);
  return problem;
}

// Between (t, y, x) and, for the second half of the heads, (y, x, t). One warp per token and head.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    ReorderKernel(const T* from, T* to, TokenGrid grid, std::int64_t rows, int heads, int head_size,
                  bool back) {
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int head = static_cast<int>(row % heads);
  const std::int64_t plane = grid.height * grid.width;
  const std::int64_t length = grid.frames * plane;
  const std::int64_t token = row / heads;
  const std::int64_t position = token % length;
  std::int64_t moved = token;
  if (head >= heads / 2) {
    moved += position % grid.frames * plane + position / grid.frames - position;
  }
  const std::int64_t source = (back ? token : moved) * heads + head;
  const std::int64_t target = (back ? moved : token) * heads + head;
  for (int c = threadIdx.x % 32; c < head_size; c += 32) {
    to[target * head_size + c] = from[source * head_size + c];
  }
}

// gates[row] = sigmoid(x . w + b). One block of threads per row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    GateKernel(const T* x, int width, const float* weight, const float* bias, float* gates) {
  __shared__ float shared[32];
  const std::int64_t row = blockIdx.x;
  float sum = 0.0f;
  for (int c = threadIdx.x; c < width; c += kThreads) {
    sum += ToFloat(x[row * width + c]) * weight[c];
  }
  sum = BlockSum(sum, shared);
  if (threadIdx.x == 0) gates[row] = 1.0f / (1.0f + expf(-(sum + *bias)));
}

// Every gate of a sample becomes their mean. One block of threads per sample.
__global__ void __launch_bounds__(kThreads) MeanGateKernel(float* gates, std::int64_t length) {
  __shared__ float shared[32];
  gates += blockIdx.x * length;
  float sum = 0.0f;
  for (std::int64_t i = threadIdx.x; i < length; i += kThreads) sum += gates[i];
  const float mean = BlockSum(sum, shared) / static_cast<float>(length);
  for (std::int64_t i = threadIdx.x; i < length; i += kThreads) gates[i] = mean;
}

// out += gate * projected
template <typename T>
__global__ void __launch_bounds__(kThreads)
    MixKernel(const T* projected, const float* gates, std::int64_t elements, int width, T* out) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= elements) return;
  out[i] = FromFloat<T>(ToFloat(out[i]) + gates[i / width] * ToFloat(projected[i]));
}

template <typename T>
void RunGateAndMix(const Context& context, const SaladArgs& args, const Tensor& projected,
                   const Tensor& gates) {
  const std::int64_t batch = args.q.dim(0), length = args.q.dim(1);
  const int width = static_cast<int>(args.q.dim(2) * args.q.dim(3));
  const std::int64_t elements = batch * length * width;
  SaladGates(context, args.x, args.gate_weight, args.gate_bias, args.gate, gates);
  MixKernel<<<static_cast<unsigned>((elements + kThreads - 1) / kThreads), kThreads, 0,
              context.stream>>>(projected.data<T>(), gates.data<float>(), elements, width,
                                args.out.data<T>());
  CheckLaunch("SaladAttention: mix");
}

void SaladSparseBranch(const Context& context, const SaladArgs& args) {
  const Shape by_head = args.q.shape();
  const Tensor out = args.out.Reshape(by_head);
  if (args.map_kind != BlockMapKind::kWindow) {
    RunAttention(context, SparseProblem(args.q, args.k, args.v, *args.map, args.lse, out));
    return;
  }
  Require(args.grid.size() == args.q.dim(1), "SaladAttention: grid does not hold q's tokens");
  const auto reordered = [&](const Tensor& x) {
    return ReorderTokens(context, x, args.grid, false, context.Allocate(by_head, x.dtype()));
  };
  const Tensor result = context.Allocate(by_head, args.q.dtype());
  const Tensor q = reordered(args.q), k = reordered(args.k), v = reordered(args.v);
  RunAttention(context, SparseProblem(q, k, v, *args.map, args.lse, result));
  ReorderTokens(context, result, args.grid, true, out);
}

void CheckSalad(const SaladArgs& args) {
  CheckSparseInputs(args.q, args.k, args.v, args.map);
  const std::int64_t batch = args.q.dim(0), length = args.q.dim(1);
  const std::int64_t head_size = args.q.dim(3), width = args.q.dim(2) * head_size;
  const DType type = args.q.dtype();
  RequireTensor(args.out, {batch, length, width}, type, "SaladAttention: out");
  CheckLse(args.lse, args.q);
  if (args.gate_out.defined()) {
    RequireTensor(args.gate_out, {batch, length}, DType::kF32, "SaladAttention: gate_out");
  }
  if (!args.proj_weight.defined()) return;
  RequireTensor(args.q_normed, args.q.shape(), type, "SaladAttention: q_normed");
  RequireTensor(args.k_normed, args.q.shape(), type, "SaladAttention: k_normed");
  RequireTensor(args.cos, {length, head_size / 2}, DType::kF32, "SaladAttention: cos");
  RequireTensor(args.sin, {length, head_size / 2}, DType::kF32, "SaladAttention: sin");
  RequireTensor(args.x, {batch, length, width}, type, "SaladAttention: x");
  RequireTensor(args.proj_weight, {width, width}, type, "SaladAttention: proj_weight");
  RequireTensor(args.proj_bias, {width}, DType::kF32, "SaladAttention: proj_bias");
  RequireTensor(args.gate_weight, {1, width}, DType::kF32, "SaladAttention: gate_weight");
  RequireTensor(args.gate_bias, {1}, DType::kF32, "SaladAttention: gate_bias");
}

void CheckSla(const SlaArgs& args) {
  CheckSparseInputs(args.q, args.k, args.v, args.map);
  RequireTensor(args.out, args.q.shape(), args.q.dtype(), "SlaAttention: out");
  CheckLse(args.lse, args.q);
  if (!args.proj_weight.defined()) return;
  const std::int64_t head_size = args.q.dim(3);
  RequireTensor(args.proj_weight, {head_size, head_size}, DType::kF32, "SlaAttention: proj_weight");
  RequireTensor(args.proj_bias, {head_size}, DType::kF32, "SlaAttention: proj_bias");
}

LinearBranchArgs SlaLinearArgs(const SlaArgs& args) {
  LinearBranchArgs linear{SlaLinear(args)};
  linear.proj_bias = args.proj_bias;
  linear.accumulate = true;
  linear.out = args.out;
  return linear;
}

}  // namespace

Feature FeatureOf(FeatureMap map) {
  switch (map) {
    case FeatureMap::kElu:
      return Feature::kElu;
    case FeatureMap::kRelu:
      return Feature::kRelu;
    case FeatureMap::kSoftmax:
      break;
  }
  return Feature::kSoftmax;
}

void CheckSparseInputs(const Tensor& q, const Tensor& k, const Tensor& v, const BlockMap* map) {
  CheckQkv(q, k, v);
  CheckMap(map, q);
}

Tensor ReorderTokens(const Context& context, const Tensor& x, const TokenGrid& grid, bool back,
                     const Tensor& out) {
  const std::int64_t rows = x.dim(0) * x.dim(1) * x.dim(2);
  const auto blocks = static_cast<unsigned>((rows + kThreads / 32 - 1) / (kThreads / 32));
  const int heads = static_cast<int>(x.dim(2)), head_size = static_cast<int>(x.dim(3));
  if (x.dtype() == DType::kBF16) {
    ReorderKernel<<<blocks, kThreads, 0, context.stream>>>(x.data<bf16>(), out.data<bf16>(), grid,
                                                           rows, heads, head_size, back);
  } else {
    ReorderKernel<<<blocks, kThreads, 0, context.stream>>>(x.data<float>(), out.data<float>(), grid,
                                                           rows, heads, head_size, back);
  }
  CheckLaunch("sparse attention: order of tokens");
  return out;
}

void AverageSamples(const Context& context, const Tensor& values) {
  MeanGateKernel<<<static_cast<unsigned>(values.dim(0)), kThreads, 0, context.stream>>>(
      values.data<float>(), values.dim(1));
  CheckLaunch("sparse attention: mean gate");
}

void SaladGates(const Context& context, const Tensor& x, const Tensor& weight, const Tensor& bias,
                SaladGate gate, const Tensor& gates) {
  const auto rows = static_cast<unsigned>(gates.NumElements());
  const int width = static_cast<int>(weight.NumElements());
  if (x.dtype() == DType::kBF16) {
    GateKernel<<<rows, kThreads, 0, context.stream>>>(x.data<bf16>(), width, weight.data<float>(),
                                                      bias.data<float>(), gates.data<float>());
  } else {
    GateKernel<<<rows, kThreads, 0, context.stream>>>(x.data<float>(), width, weight.data<float>(),
                                                      bias.data<float>(), gates.data<float>());
  }
  CheckLaunch("sparse attention: gates");
  if (gate == SaladGate::kSample) AverageSamples(context, gates);
}

SlaWay ChooseSlaWay(AttentionKernel sparse, bool sums_fit, Feature feature) {
  const bool fits =
      sparse == AttentionKernel::kHopper && sums_fit && feature != Feature::kRotatedRelu;
  return fits ? SlaWay::kFused : SlaWay::kSeparate;
}

void SlaAttention(const Context& context, const SlaArgs& args) {
  CheckSla(args);
  if (args.q.NumElements() == 0) return;
  const AttentionProblem problem =
      SparseProblem(args.q, args.k, args.v, *args.map, args.lse, args.out);
  if (!args.proj_weight.defined()) return RunAttention(context, problem);
  const LinearBranchArgs linear = SlaLinearArgs(args);
  SlaAttention(context, args,
               ChooseSlaWay(ChooseAttentionKernel(context, problem),
                            TensorCoreLinearBranchFits(linear), linear.feature));
}

void SlaAttention(const Context& context, const SlaArgs& args, SlaWay way) {
  CheckSla(args);
  Require(args.proj_weight.defined(), "SlaAttention: there is no linear branch");
  const AttentionProblem problem =
      SparseProblem(args.q, args.k, args.v, *args.map, args.lse, args.out);
  const LinearBranchArgs linear = SlaLinearArgs(args);
  if (way == SlaWay::kSeparate) {
    RunAttention(context, problem);
    return LinearBranch(context, linear);
  }
  VisitLinearStates(
      context, linear, ChooseStateKernel(context.compute_major), [&](const LinearStates& states) {
        HopperSla(context, problem, states, linear.feature, args.proj_bias.data<float>());
      });
}

SaladWay ChooseSaladWay(const SaladArgs& args) {
  const auto aligned = [](const Tensor& x) {
    return reinterpret_cast<std::uintptr_t>(x.raw()) % 16 == 0;
  };
  const Tensor out = args.out.Reshape(args.q.shape());
  const bool fits = TensorCoreLinearBranchFits(SaladLinearArgs(args, out)) && aligned(args.x) &&
                    aligned(args.gate_weight);
  return fits ? SaladWay::kFolded : SaladWay::kPlain;
}

void SaladAttention(const Context& context, const SaladArgs& args) {
  CheckSalad(args);
  if (args.q.NumElements() == 0) return;
  if (args.proj_weight.defined()) return SaladAttention(context, args, ChooseSaladWay(args));
  SaladSparseBranch(context, args);
  if (!args.gate_out.defined()) return;
  Check(cudaMemsetAsync(args.gate_out.raw(), 0, args.gate_out.NumBytes(), context.stream),
        "SaladAttention: gate_out");
}

void SaladAttention(const Context& context, const SaladArgs& args, SaladWay way) {
  CheckSalad(args);
  Require(args.proj_weight.defined(), "SaladAttention: there is no linear branch");
  SaladSparseBranch(context, args);
  if (way == SaladWay::kFolded) return AddSaladBranch(context, args);
  const SaladBranch branch = ProjectedSaladBranch(context, args);
  const Tensor gates = args.gate_out.defined()
                           ? args.gate_out
                           : context.Allocate({args.q.dim(0), args.q.dim(1)}, DType::kF32);
  args.q.dtype() == DType::kBF16 ? RunGateAndMix<bf16>(context, args, branch.projected, gates)
                                 : RunGateAndMix<float>(context, args, branch.projected, gates);
}

}  // namespace slalom::cuda
