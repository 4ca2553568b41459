#include "model/text_encoder.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/core/error.h"
#include "model/host_floats.h"

namespace slalom {
namespace {

// The bucket of a relative position key - query: half of the buckets for each direction; in each,
// the first half is exact and the rest grows logarithmically up to max_distance. Mirrors
// UMT5Attention._relative_position_bucket.
int RelativeBucket(int relative, const TextEncoderConfig& config) {
  const int buckets = config.relative_attention_num_buckets / 2;
  const int exact = buckets / 2;
  const int base = relative > 0 ? buckets : 0;
  const int distance = std::abs(relative);
  if (distance < exact) return base + distance;
  const double fraction =
      std::log(static_cast<double>(distance) / exact) /
      std::log(static_cast<double>(config.relative_attention_max_distance) / exact);
  // A distance on a bucket's edge gives an integer that rounding may leave just below itself; with
  // the published sizes (8 * 16^(j/8)) the margin of any other distance is far larger than this.
  const int bucket = exact + static_cast<int>(fraction * (buckets - exact) + 1e-9);
  return base + std::min(bucket, buckets - 1);
}

}  // namespace

// What one Forward works on; the buffers serve all layers.
struct TextEncoder::Scratch {
  std::int64_t n = 0;
  Tensor x;              // [n, d] f32: the residual stream
  Tensor normed;         // [n, d] T
  Tensor q, k, v;        // [n, H * d_kv] T
  Tensor attended;       // [n, H * d_kv] T
  Tensor hidden;         // [n, 2 * d_ff] T
  Tensor gated;          // [n, d_ff] T
  Tensor relative_bias;  // [H, 2n - 1] f32
};

TextEncoder::TextEncoder(Backend& backend, const Weights& weights, const TextEncoderConfig& config,
                         DType dtype)
    : config_(config), dtype_(dtype) {
  const std::int64_t d = config.d_model;
  const std::int64_t inner = std::int64_t{config.num_heads} * config.d_kv;
  const std::int64_t ff = config.d_ff;
  const char* embedding =
      weights.Has("shared.weight") ? "shared.weight" : "encoder.embed_tokens.weight";
  embedding_ = weights.Load(backend, embedding, {config.vocab_size, d}, dtype);
  final_norm_ = weights.Load(backend, "encoder.final_layer_norm.weight", {d}, DType::kF32);

  for (int i = 0; i < config.num_layers; ++i) {
    const std::string block = "encoder.block." + std::to_string(i) + ".layer.";
    const std::string attention = block + "0.SelfAttention.";
    const std::string dense = block + "1.DenseReluDense.";
    Layer layer;
    layer.attention_norm = weights.Load(backend, block + "0.layer_norm.weight", {d}, DType::kF32);
    layer.q = weights.Load(backend, attention + "q.weight", {inner, d}, dtype);
    layer.k = weights.Load(backend, attention + "k.weight", {inner, d}, dtype);
    layer.v = weights.Load(backend, attention + "v.weight", {inner, d}, dtype);
    layer.o = weights.Load(backend, attention + "o.weight", {d, inner}, dtype);
    layer.bias = LoadBiasTable(weights, attention + "relative_attention_bias.weight");
    layer.feed_forward_norm =
        weights.Load(backend, block + "1.layer_norm.weight", {d}, DType::kF32);
    layer.wi = backend.Allocate({2 * ff, d}, dtype);
    for (int half = 0; half < 2; ++half) {
      const std::string name = dense + "wi_" + std::to_string(half) + ".weight";
      weights.LoadInto(backend, name, layer.wi.Slice(half * ff, (half + 1) * ff));
    }
    layer.wo = weights.Load(backend, dense + "wo.weight", {d, ff}, dtype);
    layers_.push_back(std::move(layer));
  }
}

std::vector<float> TextEncoder::LoadBiasTable(const Weights& weights,
                                              const std::string& name) const {
  const std::int64_t buckets = config_.relative_attention_num_buckets;
  const Tensor table = weights.Get(name);  // [buckets, H]
  if (!(table.shape() == Shape{buckets, config_.num_heads})) {
    throw Error(ErrorCode::kInvalidArgument, weights.path() + ": tensor '" + name +
                                                 "' has the shape " + ToString(table.shape()) +
                                                 ", expected " +
                                                 ToString(Shape{buckets, config_.num_heads}));
  }
  return ToFloats(table);
}

Tensor TextEncoder::Forward(Backend& backend, std::span<const std::int32_t> ids) const {
  if (ids.empty()) throw Error(ErrorCode::kInvalidArgument, "the text has no tokens");
  for (std::int32_t id : ids) {
    if (id < 0 || id >= config_.vocab_size) {
      throw Error(ErrorCode::kInvalidArgument, "token id " + std::to_string(id) +
                                                   " is outside the vocabulary of " +
                                                   std::to_string(config_.vocab_size));
    }
  }
  const auto n = static_cast<std::int64_t>(ids.size());
  const std::int64_t d = config_.d_model;
  Scratch scratch = MakeScratch(backend, n);

  Tensor host_ids = Tensor::Host({n}, DType::kI32);
  std::ranges::copy(ids, host_ids.data<std::int32_t>());
  Tensor device_ids = backend.Allocate({n}, DType::kI32);
  backend.Copy(host_ids, device_ids);
  backend.Embedding(device_ids, embedding_, scratch.normed);
  backend.Copy(scratch.normed, scratch.x);

  for (const Layer& layer : layers_) {
    Attend(backend, layer, scratch);
    FeedForward(backend, layer, scratch);
  }
  Tensor out = backend.Allocate({n, d}, dtype_);
  backend.RmsNorm(
      {.x = scratch.x, .weight = final_norm_, .eps = config_.layer_norm_epsilon, .out = out});
  return out;
}

TextEncoder::Scratch TextEncoder::MakeScratch(Backend& backend, std::int64_t n) const {
  const std::int64_t inner = std::int64_t{config_.num_heads} * config_.d_kv;
  Scratch scratch;
  scratch.n = n;
  scratch.x = backend.Allocate({n, config_.d_model}, DType::kF32);
  scratch.normed = backend.Allocate({n, config_.d_model}, dtype_);
  for (Tensor* tensor : {&scratch.q, &scratch.k, &scratch.v, &scratch.attended}) {
    *tensor = backend.Allocate({n, inner}, dtype_);
  }
  scratch.hidden = backend.Allocate({n, 2 * std::int64_t{config_.d_ff}}, dtype_);
  scratch.gated = backend.Allocate({n, config_.d_ff}, dtype_);
  scratch.relative_bias = backend.Allocate({config_.num_heads, 2 * n - 1}, DType::kF32);
  return scratch;
}

// x += O softmax(q k^T + bias) v, of the normalised x.
void TextEncoder::Attend(Backend& backend, const Layer& layer, Scratch& scratch) const {
  const std::int64_t n = scratch.n;
  const std::int64_t heads = config_.num_heads;
  Tensor bias = Tensor::Host({heads, 2 * n - 1}, DType::kF32);
  for (std::int64_t i = 0; i < 2 * n - 1; ++i) {
    const int bucket = RelativeBucket(static_cast<int>(i - (n - 1)), config_);
    for (std::int64_t h = 0; h < heads; ++h) {
      bias.data<float>()[h * (2 * n - 1) + i] =
          layer.bias[static_cast<std::size_t>(bucket * heads + h)];
    }
  }
  backend.Copy(bias, scratch.relative_bias);

  backend.RmsNorm({.x = scratch.x,
                   .weight = layer.attention_norm,
                   .eps = config_.layer_norm_epsilon,
                   .out = scratch.normed});
  backend.Linear({.x = scratch.normed, .weight = layer.q, .out = scratch.q});
  backend.Linear({.x = scratch.normed, .weight = layer.k, .out = scratch.k});
  backend.Linear({.x = scratch.normed, .weight = layer.v, .out = scratch.v});
  const Shape by_head{1, n, heads, config_.d_kv};
  backend.Attention({.q = scratch.q.Reshape(by_head),
                     .k = scratch.k.Reshape(by_head),
                     .v = scratch.v.Reshape(by_head),
                     .scale = 1.0f,  // UMT5 does not scale its scores
                     .relative_bias = scratch.relative_bias,
                     .out = scratch.attended.Reshape(by_head)});
  backend.Linear(
      {.x = scratch.attended, .weight = layer.o, .residual = scratch.x, .out = scratch.x});
}

// x += wo (gelu_tanh(wi_0 n) * wi_1 n), n the normalised x.
void TextEncoder::FeedForward(Backend& backend, const Layer& layer, Scratch& scratch) const {
  backend.RmsNorm({.x = scratch.x,
                   .weight = layer.feed_forward_norm,
                   .eps = config_.layer_norm_epsilon,
                   .out = scratch.normed});
  backend.Linear({.x = scratch.normed, .weight = layer.wi, .out = scratch.hidden});
  backend.GatedGelu(scratch.hidden, scratch.gated);
  backend.Linear({.x = scratch.gated, .weight = layer.wo, .residual = scratch.x, .out = scratch.x});
}

}  // namespace slalom
