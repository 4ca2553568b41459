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

// means [B, blocks, width] f32: of x's rows [B, L, width], `block` at a time. Row r of a block is
// added to partial sum r % 8, and those in order: whoever pools otherwise does it so too.
void PoolBlocks(const Context& context, const Tensor& x, int block, const Tensor& means);

enum class PoolingWay {
  kSeparate,  // PoolBlocks reads what was written
  kFused,     // in the kernel that writes q or k, bf16 only
};

// The faster way for rows of that many columns; a pure function. `vectors` says that they may be
// accessed 16 bytes at a time.
PoolingWay ChoosePooling(std::int64_t columns, bool vectors);

enum class MassWay {
  kPlain,       // f32 arithmetic: anything
  kTensorCore,  // mma.sync
};

// The faster way that can do this; a pure function. `aligned` says that q and k may be accessed 16
// bytes at a time.
MassWay ChooseMassWay(DType type, std::int64_t head_size, int block_k, bool aligned);

void AttentionMassKept(const Context& context, const Tensor& q, const Tensor& k, float scale,
                       const BlockMap& map, int rows, const Tensor& out, MassWay way);

// Classes, lists and counts of `map` from means q [B, Nq, H * D] and k [B, Nk, H * D], f32.
// Requires what ChooseRankWay checks.
void ScoreAndRank(const Context& context, const Tensor& q, const Tensor& k, std::int64_t heads,
                  std::int64_t negligible, const BlockMap& map);

}  // namespace slalom::cuda
