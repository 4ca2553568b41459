// What forward and backward of SLA and SALAD share.
#pragma once

#include "kernels/backend.h"
#include "kernels/cuda/attention/linear_branch.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/ops.h"

namespace slalom::cuda {

Feature FeatureOf(FeatureMap map);

// Throws Error(kInternal) when q, k, v are not [B, L, H, D] of one compute type, or when the map is
// not one of them.
void CheckSparseInputs(const Tensor& q, const Tensor& k, const Tensor& v, const BlockMap* map);

// x [B, L, H, D] with the tokens of heads [H / 2, H) in the order (y, x, t) of the grid; or `back`
// from there. Returns out.
Tensor ReorderTokens(const Context& context, const Tensor& x, const TokenGrid& grid, bool back,
                     const Tensor& out);

// gates [B, L] f32 = sigmoid(x . weight + bias); or their mean over each sample.
void SaladGates(const Context& context, const Tensor& x, const Tensor& weight, const Tensor& bias,
                SaladGate gate, const Tensor& gates);
// Every value of a sample becomes their mean; values [B, L] f32.
void AverageSamples(const Context& context, const Tensor& values);

// What the linear branches read. Args is the struct of either direction.
template <class Args>
LinearBranchInputs SlaLinear(const Args& args) {
  LinearBranchInputs linear;
  linear.q = args.q;
  linear.k = args.k;
  linear.v = args.v;
  linear.feature = FeatureOf(args.feature_map);
  linear.scope = args.scope;
  linear.map = args.map;
  linear.proj_weight = args.proj_weight;
  return linear;
}
template <class Args>
LinearBranchInputs SaladLinear(const Args& args) {
  LinearBranchInputs linear;
  linear.q = args.q_normed;
  linear.k = args.k_normed;
  linear.v = args.v;
  linear.feature = Feature::kRotatedRelu;
  linear.cos = args.cos;
  linear.sin = args.sin;
  return linear;
}

// SALAD's linear branch, as LinearBranch takes it.
template <class Args>
LinearBranchArgs SaladLinearArgs(const Args& args, const Tensor& out) {
  LinearBranchArgs linear{SaladLinear(args)};
  linear.out = out;
  return linear;
}

struct SaladBranch {
  Tensor own;        // [B, L, H, D]
  Tensor projected;  // [B, L, H * D]
};

// The linear branch and what the projection makes of it, in scratch memory.
template <class Args>
SaladBranch ProjectedSaladBranch(const Context& context, const Args& args) {
  const SaladBranch branch{context.Allocate(args.q.shape(), args.q.dtype()),
                           context.Allocate(args.out.shape(), args.q.dtype())};
  LinearBranch(context, SaladLinearArgs(args, branch.own));
  LinearArgs projection;
  projection.x = branch.own.Reshape(args.out.shape());
  projection.weight = args.proj_weight;
  projection.bias = args.proj_bias;
  projection.out = branch.projected;
  Linear(context, projection);
  return branch;
}

}  // namespace slalom::cuda
