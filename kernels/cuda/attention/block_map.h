// How block maps are made from pooled queries and keys.
#pragma once

#include "kernels/backend.h"
#include "kernels/cuda/context.h"

namespace slalom::cuda {

enum class RankWay {
  kLibrary,  // scores as a library product, then one warp per row ranks them: any size
  kOwn,      // one kernel that keeps the scores in shared memory
};

// The faster way that can do this; a pure function.
RankWay ChooseRankWay(std::int64_t head_size, std::int64_t key_blocks, int compute_major);

BlockMap MakeBlockMap(const Context& context, const BlockMapArgs& args, RankWay way);

// Classes, lists and counts of `map` from means q [B, Nq, H * D] and k [B, Nk, H * D], f32.
// Requires what ChooseRankWay checks.
void ScoreAndRank(const Context& context, const Tensor& q, const Tensor& k, std::int64_t heads,
                  std::int64_t negligible, const BlockMap& map);

}  // namespace slalom::cuda
