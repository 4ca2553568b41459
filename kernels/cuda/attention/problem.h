// One softmax attention as the kernels see it: dense, or over a list of key blocks per query block.
#pragma once

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/core/dtype.h"
#include "kernels/cuda/context.h"

namespace slalom::cuda {

// What blocks are multiples of, for kernels with wgmma and with mma.sync.
inline constexpr int kHopperBlock = 64;
inline constexpr int kTensorCoreBlock = 16;

// Which key blocks each query block attends to; all of them when `indices` is null.
struct BlockList {
  const std::int32_t* indices = nullptr;  // [B, H, query_blocks, capacity], ascending
  const std::int32_t* counts = nullptr;   // [B, H, query_blocks]
  std::int64_t query_blocks = 0;
  std::int64_t capacity = 0;
  int block_q = 0;
  int block_k = 0;

  // The map's critical key blocks; `map` has to outlive the list.
  static BlockList Critical(const BlockMap& map) {
    return {map.critical.data<std::int32_t>(),
            map.counts.data<std::int32_t>(),
            map.classes.dim(2),
            map.critical.dim(3),
            map.block_q,
            map.block_k};
  }
  // Whether blocks of both sides are made of whole units of so many rows.
  bool MadeOf(int unit) const { return block_q % unit == 0 && block_k % unit == 0; }
};

struct AttentionProblem {
  DType dtype = DType::kBF16;
  const void* q = nullptr;               // [B, Lq, H, D]
  const void* k = nullptr;               // [B, Lk, H, D]
  const void* v = nullptr;               // [B, Lk, H, D]
  void* out = nullptr;                   // [B, Lq, H, D]; rows without a key are zero
  float* lse = nullptr;                  // [B, H, Lq] or null; -infinity in rows without a key
  const float* relative_bias = nullptr;  // [H, Lq + Lk - 1] or null
  std::int64_t batch = 0, heads = 0, q_length = 0, k_length = 0;
  int head_size = 0;
  float scale = 1.0f;
  BlockList list;

  // Dense, of tensors [B, L, H, D] that outlive it, with 1 / sqrt(D) as scale.
  static AttentionProblem Of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out);
};

enum class AttentionKernel {
  kHopper,      // TMA and wgmma, sm_90
  kTensorCore,  // mma.sync, sm_80 and newer
  kProduct,     // two matrix products with a softmax between them: dense only
  kRow,         // one warp per query row: anything
};

// The fastest kernel that can do this; a pure function. `aligned` says that q, k, v and out may be
// accessed 16 bytes at a time.
AttentionKernel ChooseAttentionKernel(const AttentionProblem& problem, bool aligned,
                                      int compute_major);

// The same for this problem and this device.
AttentionKernel ChooseAttentionKernel(const Context& context, const AttentionProblem& problem);

void RunAttention(const Context& context, const AttentionProblem& problem);
void RunAttention(const Context& context, const AttentionProblem& problem, AttentionKernel kernel);

// The kernels. Each requires what ChooseAttentionKernel checks.
void HopperAttention(const Context& context, const AttentionProblem& problem);
void TensorCoreAttention(const Context& context, const AttentionProblem& problem);
void ProductAttention(const Context& context, const AttentionProblem& problem);
void RowAttention(const Context& context, const AttentionProblem& problem);

}  // namespace slalom::cuda
