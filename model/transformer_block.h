// One block of Wan's diffusion transformer: self-attention, cross-attention to the text, MLP.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/backend.h"
#include "kernels/core/tensor.h"
#include "model/adapter.h"
#include "model/config.h"
#include "model/rope.h"
#include "model/weights.h"

namespace slalom {

// How self-attention runs in one forward pass; the same for every block.
struct AttentionSetting {
  AttentionKind kind = AttentionKind::kDense;
  // The rest is the adapter's, unused when dense.
  BlockMapOptions map;
  std::vector<double> layer_topk;  // each block's own topk; empty: the map's in all
  LinearScope scope = LinearScope::kMarginal;
  FeatureMap feature_map = FeatureMap::kSoftmax;
  SaladGate gate = SaladGate::kToken;
  TokenTile tile;  // RopeTables of a forward pass have to be made for it

  BlockMapOptions MapOf(std::size_t block) const {
    BlockMapOptions own = map;
    if (!layer_topk.empty()) own.topk = layer_topk.at(block);
    return own;
  }
  double LargestTopK() const {
    return layer_topk.empty() ? map.topk : *std::ranges::max_element(layer_topk);
  }
};

struct LinearWeights {
  Tensor weight;  // [N, K] T (f32 where a comment says so)
  Tensor bias;    // [N] f32, or T where the result is T
};

// One block's keys and values of one prompt: they stay the same for all steps.
struct TextKeysValues {
  Tensor k;  // [1, text_len, H, D] T, RMS-normalised
  Tensor v;  // [1, text_len, H, D] T
};

// What a forward pass hands to its blocks.
struct BlockContext {
  // The timesteps' part. Neighbouring samples may share one: G divides B.
  Tensor modulation;  // [G, 6, d] f32
  const RopeTables* rope = nullptr;
  std::vector<const TextKeysValues*> text;  // one per sample, this block's
  const AttentionSetting* attention = nullptr;
  BlockMapOptions map;  // of this block
  // Sparse attention only, both optional.
  Tensor pair_counter;  // [2] i64, see Backend::CountPairs
  Tensor mass_kept;     // [1] f32, see Backend::AttentionMassKept
  int mass_sample = 0;  // whose mass
};

// Mirrors WanTransformerBlock (diffusers) and WanAttentionBlock (Wan2.1). Owns its weights;
// Forward is const; calls are made by the backend's one thread.
//
// The residual stream is f32 whatever T is, as in Wan's own code: 3 roundings to bf16 per block
// would be the largest error of a bf16 pass, and f32 adds about 1 % to a step's memory traffic.
class TransformerBlock {
 public:
  // Reads "blocks.<index>.*"; `adapters`, whose layers are on the device already, add their
  // variants.
  TransformerBlock(Backend& backend, const Weights& weights, const TransformerConfig& config,
                   std::span<const AttentionAdapter> adapters, int index, DType dtype);

  // `text` [text_len, d] T, after the text MLP.
  TextKeysValues PrepareText(Backend& backend, const Tensor& text) const;

  // Replaces x [B, L, d] f32 by the block's output.
  void Forward(Backend& backend, const BlockContext& context, const Tensor& x) const;

 private:
  // What belongs to one kind of self-attention. A Linear without a LoRA is that of the dense kind,
  // in the same memory.
  struct Variant {
    AttentionKind kind = AttentionKind::kDense;
    LinearWeights q, k, v, o;        // [d, d]
    LinearWeights cross_q, cross_o;  // [d, d]
    LinearWeights ffn_in;            // [ffn, d]
    LinearWeights ffn_out;           // [d, ffn]
    Tensor proj_weight;              // SLA [D, D] f32; SALAD [d, d] T; undefined: no linear branch
    Tensor proj_bias;                // SLA [D] f32; SALAD [d] f32
    Tensor gate_weight;              // SALAD [1, d] f32
    Tensor gate_bias;                // SALAD [1] f32
  };
  struct Heads;

  Variant LoadVariant(Backend& backend, const Weights& weights, const AttentionAdapter& adapter,
                      int index) const;
  Tensor Attend(Backend& backend, const BlockContext& context, const Variant& layer,
                const Tensor& u) const;
  void AttendSparsely(Backend& backend, const BlockContext& context, const Variant& layer,
                      const Tensor& u, const Heads& heads, const Tensor& out) const;
  Tensor CrossAttend(Backend& backend, const BlockContext& context, const Variant& layer,
                     const Tensor& u) const;
  const Variant& VariantOf(AttentionKind kind) const;

  std::int64_t dim_;
  std::int64_t heads_;
  std::int64_t head_dim_;
  std::int64_t ffn_dim_;
  float eps_;
  DType dtype_;

  Tensor modulation_;              // [6, d] f32
  std::vector<Variant> variants_;  // dense first
  Tensor self_norm_q_;             // [d] f32, over all heads together
  Tensor self_norm_k_;             // [d] f32
  LinearWeights cross_k_, cross_v_;
  Tensor cross_norm_q_;     // [d] f32
  Tensor cross_norm_k_;     // [d] f32
  Tensor cross_ln_weight_;  // [d] f32: "norm2" on disk; Wan's own name is norm3
  Tensor cross_ln_bias_;    // [d] f32
};

// "<name>.weight" [out, in] in `dtype` and "<name>.bias" [out] in `bias_dtype`: that of the result,
// so that nothing is converted at every call.
LinearWeights LoadLinear(Backend& backend, const Weights& weights, const std::string& name,
                         std::int64_t in, std::int64_t out, DType dtype, DType bias_dtype);

}  // namespace slalom
