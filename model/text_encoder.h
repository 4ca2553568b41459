// The UMT5 encoder: token ids -> one embedding per token.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/tensor.h"
#include "model/config.h"
#include "model/weights.h"

namespace slalom {

// Mirrors transformers' UMT5EncoderModel (no score scaling, one relative-position table per layer,
// gated tanh-GELU). Owns its weights, in `dtype` on the backend's device; the norms are f32, and so
// is the residual stream whatever the dtype: 2 x 24 bf16 roundings of it would cost accuracy.
// Forward is const; calls are made by the backend's one thread.
class TextEncoder {
 public:
  // `dtype` is T: f32 or bf16. Throws Error when a tensor is missing or has another shape.
  TextEncoder(Backend& backend, const Weights& weights, const TextEncoderConfig& config,
              DType dtype);

  // The embeddings of `ids`, padding excluded: masked keys take no part in attention, so running
  // the valid length alone gives the same rows. Throws Error(kInvalidArgument) when ids is empty or
  // holds an id outside the vocabulary.
  Tensor Forward(Backend& backend, std::span<const std::int32_t> ids) const;  // [n, d_model] T

  const TextEncoderConfig& config() const { return config_; }

 private:
  struct Layer {
    Tensor attention_norm;     // [d] f32
    Tensor q, k, v;            // [H * d_kv, d] T
    Tensor o;                  // [d, H * d_kv] T
    std::vector<float> bias;   // [buckets, H], host
    Tensor feed_forward_norm;  // [d] f32
    Tensor wi;                 // [2 * d_ff, d] T: wi_0 (the GELU's), then wi_1
    Tensor wo;                 // [d, d_ff] T
  };
  struct Scratch;

  std::vector<float> LoadBiasTable(const Weights& weights, const std::string& name) const;
  Scratch MakeScratch(Backend& backend, std::int64_t n) const;
  void Attend(Backend& backend, const Layer& layer, Scratch& scratch) const;
  void FeedForward(Backend& backend, const Layer& layer, Scratch& scratch) const;

  TextEncoderConfig config_;
  DType dtype_;
  Tensor embedding_;   // [vocab, d] T
  Tensor final_norm_;  // [d] f32
  std::vector<Layer> layers_;
};

}  // namespace slalom
