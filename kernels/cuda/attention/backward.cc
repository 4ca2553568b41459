// The gradients of SLA: which kernels, in which order.
#include "kernels/cuda/attention/backward.h"

#include <cmath>

#include "kernels/cuda/attention/sparse_parts.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/ops.h"

namespace slalom::cuda {
namespace {

bool Aligned(const SparseGradientProblem& problem) {
  for (const void* pointer :
       {problem.q, problem.k, problem.v, problem.d_out, static_cast<const void*>(problem.d_q),
        static_cast<const void*>(problem.d_k), static_cast<const void*>(problem.d_v)}) {
    if (reinterpret_cast<std::uintptr_t>(pointer) % 16 != 0) return false;
  }
  return true;
}

void CheckSla(const SlaBackwardArgs& args) {
  CheckSparseInputs(args.q, args.k, args.v, args.map);
  const DType type = args.q.dtype();
  const Shape& shape = args.q.shape();
  const Shape rows{shape[0], shape[2], shape[1]};
  RequireTensor(args.out, shape, type, "SlaAttentionBackward: out");
  RequireTensor(args.lse, rows, DType::kF32, "SlaAttentionBackward: lse");
  RequireTensor(args.d_out, shape, type, "SlaAttentionBackward: d_out");
  RequireTensor(args.d_q, shape, type, "SlaAttentionBackward: d_q");
  RequireTensor(args.d_k, shape, type, "SlaAttentionBackward: d_k");
  RequireTensor(args.d_v, shape, type, "SlaAttentionBackward: d_v");
  if (!args.proj_weight.defined()) return;
  const Shape square{shape[3], shape[3]}, row{shape[3]};
  RequireTensor(args.proj_weight, square, DType::kF32, "SlaAttentionBackward: proj_weight");
  RequireTensor(args.proj_bias, row, DType::kF32, "SlaAttentionBackward: proj_bias");
  RequireTensor(args.d_proj_weight, square, DType::kF32, "SlaAttentionBackward: d_proj_weight");
  RequireTensor(args.d_proj_bias, row, DType::kF32, "SlaAttentionBackward: d_proj_bias");
}

// What the linear branch gives; it is done first, and the sparse branch adds to it.
void LinearPart(const Context& context, const SlaBackwardArgs& args, const Tensor& delta) {
  LinearGradientArgs linear{SlaLinear(args)};
  linear.d_out = args.d_out;
  linear.d_q = args.d_q;
  linear.d_k = args.d_k;
  linear.d_v = args.d_v;
  linear.delta = delta;
  linear.d_proj_weight = args.d_proj_weight;
  LinearGradient(context, linear);
  SumColumns(context, args.d_out, Tensor(), args.d_proj_bias);
}

}  // namespace

GradientKernel ChooseGradientKernel(const SparseGradientProblem& problem, bool aligned,
                                    int compute_major) {
  const bool tensor_cores = problem.dtype == DType::kBF16 && aligned &&
                            problem.keys.MadeOf(kTensorCoreBlock) &&
                            (problem.head_size == 64 || problem.head_size == 128);
  if (!tensor_cores) return GradientKernel::kRow;
  const bool hopper = compute_major == kHopperMajor && problem.keys.MadeOf(kHopperBlock);
  return hopper ? GradientKernel::kHopper : GradientKernel::kTensorCore;
}

void SparseGradient(const Context& context, const SparseGradientProblem& problem) {
  SparseGradient(context, problem,
                 ChooseGradientKernel(problem, Aligned(problem), context.compute_major));
}

void SparseGradient(const Context& context, const SparseGradientProblem& problem,
                    GradientKernel kernel) {
  switch (kernel) {
    case GradientKernel::kHopper:
      return HopperSparseGradient(context, problem);
    case GradientKernel::kTensorCore:
      return TensorCoreSparseGradient(context, problem);
    case GradientKernel::kRow:
      return RowSparseGradient(context, problem);
  }
}

SparseGradientProblem MakeSparseGradient(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const Tensor& d_out, const BlockMap& map,
                                         const QueryLists& queries) {
  SparseGradientProblem problem;
  problem.dtype = q.dtype();
  problem.q = q.raw();
  problem.k = k.raw();
  problem.v = v.raw();
  problem.d_out = d_out.raw();
  problem.batch = q.dim(0);
  problem.length = q.dim(1);
  problem.heads = q.dim(2);
  problem.head_size = static_cast<int>(q.dim(3));
  problem.scale = 1.0f / std::sqrt(static_cast<float>(problem.head_size));
  problem.keys = BlockList::Critical(map);
  problem.queries = queries.list;
  return problem;
}

void SlaAttentionBackward(const Context& context, const SlaBackwardArgs& args) {
  CheckSla(args);
  const bool linear = args.proj_weight.defined();
  if (args.q.NumElements() == 0) {
    if (!linear) return;
    for (const Tensor& x : {args.d_proj_weight, args.d_proj_bias}) {
      Check(cudaMemsetAsync(x.raw(), 0, x.NumBytes(), context.stream), "SlaAttentionBackward");
    }
    return;
  }
  const Tensor delta = context.Allocate(args.lse.shape(), DType::kF32);
  if (linear) LinearPart(context, args, delta);
  DeltaArgs rows;
  rows.out = args.out;
  rows.d_out = args.d_out;
  rows.delta = delta;
  if (linear) {
    rows.bias = args.proj_bias;
    rows.linear_delta = delta;
  }
  SparseDelta(context, rows);
  const QueryLists queries = MakeQueryLists(context, *args.map);
  SparseGradientProblem sparse =
      MakeSparseGradient(args.q, args.k, args.v, args.d_out, *args.map, queries);
  sparse.lse = args.lse.data<float>();
  sparse.delta = delta.data<float>();
  sparse.d_q = args.d_q.raw();
  sparse.d_k = args.d_k.raw();
  sparse.d_v = args.d_v.raw();
  sparse.accumulate = linear;
  SparseGradient(context, sparse);
}

}  // namespace slalom::cuda
