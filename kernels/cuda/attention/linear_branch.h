// The linear branch of SLA and SALAD: sums of feature(K)^T V over key blocks, applied to
// feature(Q). Two ways: tensor cores, and plain f32 arithmetic for what those do not take.
#pragma once

#include <functional>

#include "kernels/attention.h"
#include "kernels/cuda/context.h"

namespace slalom::cuda {

// The features of one token's channels. kRotatedRelu is SALAD's: relu, then rotated for the
// products but not for the normaliser.
enum class Feature { kSoftmax, kElu, kRelu, kRotatedRelu };

// What the branch is a function of, forward and backward.
struct LinearBranchInputs {
  Tensor q;  // [B, L, H, D] T, what the features are taken of
  Tensor k;  // [B, L, H, D] T
  Tensor v;  // [B, L, H, D] T
  Feature feature = Feature::kSoftmax;
  Tensor cos;  // [L, D / 2] f32, with kRotatedRelu
  Tensor sin;
  LinearScope scope = LinearScope::kAll;
  const BlockMap* map = nullptr;  // unless scope is kAll
  Tensor proj_weight;             // [D, D] f32, optional: the result is projected
};

struct LinearBranchArgs : LinearBranchInputs {
  Tensor proj_bias;         // [D] f32, with proj_weight
  bool accumulate = false;  // add to what out holds
  Tensor out;               // [B, L, H, D] T
};

// D is a multiple of 8 up to 384. Chooses the way.
void LinearBranch(const Context& context, const LinearBranchArgs& args);

// What keys and values are reduced to: for some heads, sums over the scope of every query block.
struct LinearStates {
  // [heads, states_per_head, D + 1, D] bf16: rows 0 .. D - 1 are the sum of feature(k)^T v, row D
  // is the sum of the normalisers.
  Tensor sums;
  int states_per_head = 1;  // one per query block, or one when every key is in scope
  int first_head = 0;       // of all samples' heads
  int heads = 0;
  // [D, D] bf16, proj_weight transposed. Undefined where the sums hold it already (as they do when
  // every key is in scope), and without a projection.
  Tensor weight;
};

// Which kernel makes the sums of feature(K)^T V.
enum class StateKernelKind {
  kTensorCore,  // mma.sync, sm_80 and newer
  kHopper,      // TMA and wgmma
};

// A pure function, for what TensorCoreLinearBranchFits.
StateKernelKind ChooseStateKernel(int compute_major);

// Calls `visit` for one group of heads after the other, as many at once as memory is spent on. For
// what TensorCoreLinearBranchFits.
void VisitLinearStates(const Context& context, const LinearBranchInputs& inputs,
                       StateKernelKind kernel,
                       const std::function<void(const LinearStates&)>& visit);

// bf16 with D 64 or 128, 16-byte aligned, and for scopes other than kAll blocks in multiples of 16.
bool TensorCoreLinearBranchFits(const LinearBranchArgs& args);
void TensorCoreLinearBranch(const Context& context, const LinearBranchArgs& args,
                            StateKernelKind kernel);

}  // namespace slalom::cuda
