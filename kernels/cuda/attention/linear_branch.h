// The linear branch of SLA and SALAD: sums of feature(K)^T V over key blocks, applied to
// feature(Q). Two ways: tensor cores, and plain f32 arithmetic for what those do not take.
#pragma once

#include "kernels/attention.h"
#include "kernels/cuda/context.h"

namespace slalom::cuda {

// The features of one token's channels. kRotatedRelu is SALAD's: relu, then rotated for the
// products but not for the normaliser.
enum class Feature { kSoftmax, kElu, kRelu, kRotatedRelu };

struct LinearBranchArgs {
  Tensor q;  // [B, L, H, D] T, what the features are taken of
  Tensor k;  // [B, L, H, D] T
  Tensor v;  // [B, L, H, D] T
  Feature feature = Feature::kSoftmax;
  Tensor cos;  // [L, D / 2] f32, with kRotatedRelu
  Tensor sin;
  LinearScope scope = LinearScope::kAll;
  const BlockMap* map = nullptr;  // unless scope is kAll
  Tensor proj_weight;             // [D, D] f32, optional: the result is projected
  Tensor proj_bias;               // [D] f32, with proj_weight
  bool accumulate = false;        // add to what out holds
  Tensor out;                     // [B, L, H, D] T
};

// D is a multiple of 8 up to 384. Chooses the way.
void LinearBranch(const Context& context, const LinearBranchArgs& args);

// bf16 with D 64 or 128, 16-byte aligned, and for scopes other than kAll blocks in multiples of 64.
bool TensorCoreLinearBranchFits(const LinearBranchArgs& args);
void TensorCoreLinearBranch(const Context& context, const LinearBranchArgs& args);

}  // namespace slalom::cuda
