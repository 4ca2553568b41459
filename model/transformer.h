// Wan's diffusion transformer: noisy latent, timestep and text -> flow velocity.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/tensor.h"
#include "model/adapter.h"
#include "model/config.h"
#include "model/rope.h"
#include "model/transformer_block.h"
#include "model/weights.h"

namespace slalom {

// Everything that the transformer derives from one prompt, once for all steps. Immutable; may be
// shared between clips.
struct TextContext {
  std::vector<TextKeysValues> blocks;  // one per block
};

// Mirrors diffusers' WanTransformer3DModel (text-to-video). Owns its weights; const; calls are made
// by the backend's one thread.
//
// Every sample of a batch has its own timestep and text, and its result has the same bits whoever
// its batch-mates are: rows of a Linear don't depend on the others (a promise of Backend), all
// other operations work sample by sample.
class Transformer {
 public:
  // `dtype` is T. Throws Error when a tensor is missing or has another shape.
  Transformer(Backend& backend, const Weights& weights, const TransformerConfig& config,
              std::vector<AttentionAdapter> adapters, DType dtype);

  // The context of `embeddings` [n, text_dim], n <= text_len, from the text encoder. Rows are
  // filled up with zeros to text_len in front of the text MLP, and attended to: so it was trained.
  TextContext PrepareText(Backend& backend, const Tensor& embeddings) const;

  // How `kind` runs here: its adapter's setting, with `topk` in every layer instead of the adapter's
  // when it is positive and another. Throws Error(kFailedPrecondition) when there is no such adapter.
  AttentionSetting Setting(AttentionKind kind, double topk = 0) const;

  struct Args {
    Tensor latent;  // [B, in_channels, F, 2h, 2w] f32
    // Sample i's is timesteps[i / (B / G)]: G divides B, and neighbours that share one also share
    // what is derived from it.
    Tensor timesteps;                          // [G] f32
    std::span<const TextContext* const> text;  // [B]
    const RopeTables* rope = nullptr;          // of the grid F, h, w and of the setting's tile
    const AttentionSetting* attention = nullptr;
    Tensor velocity;  // out: [B, out_channels, F, 2h, 2w] f32

    // Measurements, optional, sparse attention only.
    Tensor pair_counters;  // [layers, 2] i64, added to: critical block pairs, all block pairs
    Tensor mass_kept;      // [layers] f32: share of the softmax mass in critical blocks ...
    int mass_sample = 0;   // ... of this sample
    // Called with every block's output [B, L, d] f32; for diagnosis.
    std::function<void(int layer, const Tensor& x)> observer;
  };
  void Forward(Backend& backend, const Args& args) const;

  // The tokens of a latent [.., F, H, W].
  TokenGrid GridOf(const Tensor& latent) const;

  const TransformerConfig& config() const { return config_; }
  const std::vector<AttentionAdapter>& adapters() const { return adapters_; }

 private:
  struct TimeEmbedding {
    Tensor raw;         // [G, d] f32, for the head
    Tensor modulation;  // [G, 6, d] f32, for the blocks
  };
  TimeEmbedding EmbedTime(Backend& backend, const Tensor& timesteps) const;

  TransformerConfig config_;
  DType dtype_;
  std::vector<AttentionAdapter> adapters_;
  LinearWeights patch_;               // [d, 4 * in_channels]
  LinearWeights text_in_, text_out_;  // [d, text_dim], [d, d]
  // The time path is f32 throughout, as in Wan: it is tiny, and every block depends on it.
  LinearWeights time_in_, time_out_;  // [d, freq_dim], [d, d] f32
  LinearWeights time_proj_;           // [6 d, d] f32
  std::vector<TransformerBlock> blocks_;
  Tensor head_modulation_;  // [2, d] f32
  LinearWeights head_;      // [4 * out_channels, d]
};

}  // namespace slalom
