// What forward and backward of SLA and SALAD share.
#pragma once

#include "kernels/backend.h"
#include "kernels/cuda/attention/linear_branch.h"
#include "kernels/cuda/context.h"

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

}  // namespace slalom::cuda
