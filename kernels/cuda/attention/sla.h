// SLA on the device: which of the two ways, and the fused one.
#pragma once

#include "kernels/backend.h"
#include "kernels/cuda/attention/linear_branch.h"
#include "kernels/cuda/attention/problem.h"

namespace slalom::cuda {

enum class SlaWay {
  kSeparate,  // the sparse branch, then the linear one adds to its output: anything
  kFused,     // one kernel for both, after the sums of feature(K)^T V
};

// The faster way that can do this; a pure function. `sparse` is what the sparse branch runs as,
// `sums_fit` what TensorCoreLinearBranchFits says.
SlaWay ChooseSlaWay(AttentionKernel sparse, bool sums_fit, Feature feature);

void SlaAttention(const Context& context, const SlaArgs& args, SlaWay way);

// Both branches of `states.heads` heads from states.first_head on, into problem.out. Requires what
// ChooseSlaWay checks.
void HopperSla(const Context& context, const AttentionProblem& problem, const LinearStates& states,
               Feature feature, const float* bias);

}  // namespace slalom::cuda
