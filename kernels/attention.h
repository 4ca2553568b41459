// The vocabulary of sparse attention: which blocks, which branches, how they are mixed. Plain data
// shared by the model (adapters), the backends and the tests. Maths: SLA (arXiv 2509.24006) and
// SALAD (arXiv 2601.16515).
#pragma once

#include <cstdint>

#include "kernels/core/tensor.h"

namespace slalom {

enum class AttentionKind { kDense, kSla, kSalad };

// Which key blocks the linear branch of SLA sums over, seen from one query block.
enum class LinearScope {
  kMarginal,     // neither critical nor negligible (the paper)
  kNonCritical,  // all but the critical (branch SLA-1 of the released code)
  kAll,          // every key (branch main, TurboDiffusion)
};

enum class FeatureMap { kSoftmax, kElu, kRelu };  // softmax over channels; elu(x) + 1; relu(x)

enum class BlockMapKind {
  kTopK,    // the largest pooled scores of each query block
  kWindow,  // SALAD's spatial-temporal sliding window
};

enum class SaladGate { kToken, kSample };  // per token; or averaged over a sample's tokens

enum class BlockClass : std::uint8_t { kNegligible = 0, kCritical = 1, kMarginal = 2 };

struct TokenGrid {
  std::int64_t frames = 0;
  std::int64_t height = 0;
  std::int64_t width = 0;
  std::int64_t size() const { return frames * height * width; }
};

// How a block map is made.
struct BlockMapOptions {
  BlockMapKind kind = BlockMapKind::kTopK;
  double topk = 0.05;       // share of key blocks that are critical, in (0, 1]
  double negligible = 0.1;  // share of key blocks that are dropped, in [0, 1)
  int block_q = 64;
  int block_k = 64;
};

// The classes of all block pairs of one attention call.
struct BlockMap {
  int block_q = 64;
  int block_k = 64;
  Tensor classes;   // [B, H, Nq, Nk] u8, BlockClass
  Tensor critical;  // [B, H, Nq, M] i32: indices of the critical key blocks, ascending; M >= counts
  Tensor counts;    // [B, H, Nq] i32: how many of them
  // Set by kWindow maps (size() > 0): for the heads [H / 2, H) the blocks divide the tokens in the
  // order (y, x, t) of this grid instead of (t, y, x).
  TokenGrid grid;
};

// max(1, floor(topk * key_blocks)), at most key_blocks.
std::int64_t CriticalBlocks(double topk, std::int64_t key_blocks);
// floor(negligible * key_blocks), at most what the critical ones leave.
std::int64_t NegligibleBlocks(double negligible, std::int64_t key_blocks, std::int64_t critical);

}  // namespace slalom
