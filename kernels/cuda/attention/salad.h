// SALAD on the device: which of the two ways its linear branch takes, and the folded one.
#pragma once

#include "kernels/backend.h"
#include "kernels/cuda/attention/linear_branch.h"
#include "kernels/cuda/context.h"

namespace slalom::cuda {

enum class SaladWay {
  kPlain,   // linear branch, projection, gate and sum, each a pass: anything
  kFolded,  // the projection is folded into the sums over the keys; see AddSaladBranch
};

// The faster way that can do this; a pure function.
SaladWay ChooseSaladWay(const SaladArgs& args);

void SaladAttention(const Context& context, const SaladArgs& args, SaladWay way);

// args.out, which holds the sparse branch's output, += gate * (linear branch, projected). With H
// the heads' sums of feature(k)^T v,
//
//   gate * (O_l W^T + b) = [gate * feature(q) / normaliser, gate] [H W^T; b],
//
// so that once H W^T is made a token costs one pass, which turns its queries into scaled features,
// and the product that the projection is anyway. Requires what ChooseSaladWay checks.
void AddSaladBranch(const Context& context, const SaladArgs& args);

}  // namespace slalom::cuda
