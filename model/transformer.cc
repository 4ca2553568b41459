#include "model/transformer.h"

#include <cmath>
#include <map>
#include <string>
#include <utility>

#include "kernels/core/error.h"

namespace slalom {
namespace {

constexpr std::int64_t kPatch = 4;  // 1 x 2 x 2 latent positions make a token
constexpr std::int64_t kModulationRows = 6;

// Diffusers stores the Conv3d's weight [d, C, 1, 2, 2]; some conversions flatten it.
Tensor LoadPatchWeight(Backend& backend, const Weights& weights, std::int64_t dim,
                       std::int64_t channels, DType dtype) {
  const std::string name = "patch_embedding.weight";
  const bool flat = weights.Has(name) && weights.Get(name).shape().rank() == 2;
  const Shape stored = flat ? Shape{dim, channels * kPatch} : Shape{dim, channels, 1, 2, 2};
  return weights.Load(backend, name, stored, dtype).Reshape({dim, channels * kPatch});
}

// Moves the adapters' layers to the device, in the types that the operations want. Layers that
// share host memory, as those of an untrained adapter do, share device memory.
std::vector<AttentionAdapter> Upload(Backend& backend, std::vector<AttentionAdapter> adapters,
                                     DType dtype) {
  std::map<std::pair<const void*, DType>, Tensor> uploaded;
  const auto upload = [&](Tensor& tensor, DType type) {
    if (!tensor.defined()) return;
    Tensor& copy = uploaded[{tensor.raw(), type}];
    if (!copy.defined()) {
      copy = backend.Allocate(tensor.shape(), type);
      backend.Copy(tensor, copy);
    }
    tensor = copy;
  };
  for (AttentionAdapter& adapter : adapters) {
    const bool salad = adapter.kind == AttentionKind::kSalad;
    // Until all are uploaded the host tensors stay: their addresses are the keys.
    const std::vector<AdapterLayer> host = adapter.layers;
    for (AdapterLayer& layer : adapter.layers) {
      upload(layer.proj_weight, salad ? dtype : DType::kF32);
      upload(layer.proj_bias, DType::kF32);
      upload(layer.gate_weight, DType::kF32);
      upload(layer.gate_bias, DType::kF32);
    }
    uploaded.clear();
  }
  return adapters;
}

// Token i of every sample is token order[i] of `tokens` [B, L, C].
Tensor Reordered(Backend& backend, const Tensor& tokens, const Tensor& order) {
  Tensor out = backend.Allocate(tokens.shape(), tokens.dtype());
  const Shape one = {tokens.dim(1), tokens.dim(2)};
  for (std::int64_t b = 0; b < tokens.dim(0); ++b) {
    backend.Embedding(order, tokens.Slice(b, b + 1).Reshape(one), out.Slice(b, b + 1).Reshape(one));
  }
  return out;
}

void RequireWanNorms(const TransformerConfig& config) {
  if (config.qk_norm && config.cross_attn_norm) return;
  throw Error(ErrorCode::kInvalidArgument,
              "transformer: qk_norm and cross_attn_norm must be on, as in every Wan2.1 model");
}

}  // namespace

Transformer::Transformer(Backend& backend, const Weights& weights, const TransformerConfig& config,
                         std::vector<AttentionAdapter> adapters, DType dtype)
    : config_(config), dtype_(dtype) {
  RequireWanNorms(config);
  adapters_ = Upload(backend, std::move(adapters), dtype);
  const std::int64_t dim = config.dim();
  const auto linear = [&](const std::string& name, std::int64_t in, std::int64_t out, DType type) {
    return LoadLinear(backend, weights, name, in, out, type, type);
  };
  patch_ = {.weight = LoadPatchWeight(backend, weights, dim, config.in_channels, dtype),
            .bias = weights.Load(backend, "patch_embedding.bias", {dim}, DType::kF32)};
  text_in_ = linear("condition_embedder.text_embedder.linear_1", config.text_dim, dim, dtype);
  text_out_ = linear("condition_embedder.text_embedder.linear_2", dim, dim, dtype);
  time_in_ = linear("condition_embedder.time_embedder.linear_1", config.freq_dim, dim, DType::kF32);
  time_out_ = linear("condition_embedder.time_embedder.linear_2", dim, dim, DType::kF32);
  time_proj_ = linear("condition_embedder.time_proj", dim, kModulationRows * dim, DType::kF32);
  for (int i = 0; i < config.num_layers; ++i) {
    blocks_.emplace_back(backend, weights, config, adapters_, i, dtype);
  }
  head_modulation_ =
      weights.Load(backend, "scale_shift_table", {1, 2, dim}, DType::kF32).Reshape({2, dim});
  head_ = LoadLinear(backend, weights, "proj_out", dim, kPatch * config.out_channels, dtype,
                     DType::kF32);
}

TextContext Transformer::PrepareText(Backend& backend, const Tensor& embeddings) const {
  const std::int64_t rows = config_.text_len;
  if (embeddings.dim(0) > rows || embeddings.dim(1) != config_.text_dim) {
    throw Error(ErrorCode::kInternal,
                "text embeddings of the shape " + ToString(embeddings.shape()));
  }
  Tensor padded = backend.Allocate({rows, config_.text_dim}, dtype_);
  backend.Zero(padded);
  if (embeddings.dim(0) > 0) backend.Copy(embeddings, padded.Slice(0, embeddings.dim(0)));
  Tensor hidden = backend.Allocate({rows, config_.dim()}, dtype_);
  backend.Linear({.x = padded,
                  .weight = text_in_.weight,
                  .bias = text_in_.bias,
                  .activation = Activation::kGeluTanh,
                  .out = hidden});
  Tensor text = backend.Allocate({rows, config_.dim()}, dtype_);
  backend.Linear({.x = hidden, .weight = text_out_.weight, .bias = text_out_.bias, .out = text});

  TextContext context;
  for (const TransformerBlock& block : blocks_) {
    context.blocks.push_back(block.PrepareText(backend, text));
  }
  return context;
}

AttentionSetting Transformer::Setting(AttentionKind kind, double topk) const {
  if (kind == AttentionKind::kDense) return {};
  for (const AttentionAdapter& adapter : adapters_) {
    if (adapter.kind != kind) continue;
    AttentionSetting setting = {.kind = kind,
                                .map = adapter.map,
                                .scope = adapter.scope,
                                .feature_map = adapter.feature_map,
                                .gate = adapter.gate,
                                .tile = adapter.tile};
    if (topk > 0 && std::abs(topk - adapter.map.topk) > kSameTopK) {
      setting.map.topk = topk;
    } else {
      setting.layer_topk = adapter.layer_topk;
    }
    return setting;
  }
  throw Error(ErrorCode::kFailedPrecondition, "this model has no adapter for that attention");
}

TokenGrid Transformer::GridOf(const Tensor& latent) const {
  return {.frames = latent.dim(-3), .height = latent.dim(-2) / 2, .width = latent.dim(-1) / 2};
}

Transformer::TimeEmbedding Transformer::EmbedTime(Backend& backend, const Tensor& timesteps) const {
  const std::int64_t groups = timesteps.dim(0);
  const std::int64_t dim = config_.dim();
  Tensor waves = backend.Allocate({groups, config_.freq_dim}, DType::kF32);
  Tensor hidden = backend.Allocate({groups, dim}, DType::kF32);
  TimeEmbedding time = {
      .raw = backend.Allocate({groups, dim}, DType::kF32),
      .modulation = backend.Allocate({groups, kModulationRows, dim}, DType::kF32)};
  backend.TimestepEmbedding(timesteps, waves);
  backend.Linear({.x = waves,
                  .weight = time_in_.weight,
                  .bias = time_in_.bias,
                  .activation = Activation::kSilu,
                  .out = hidden});
  backend.Linear(
      {.x = hidden, .weight = time_out_.weight, .bias = time_out_.bias, .out = time.raw});
  // The blocks see SiLU of it; the head sees it as it is.
  backend.Activate(Activation::kSilu, time.raw, hidden);
  backend.Linear({.x = hidden,
                  .weight = time_proj_.weight,
                  .bias = time_proj_.bias,
                  .out = time.modulation.Reshape({groups, kModulationRows * dim})});
  return time;
}

void Transformer::Forward(Backend& backend, const Args& args) const {
  const TokenGrid grid = GridOf(args.latent);
  const std::int64_t batch = args.latent.dim(0);
  const std::int64_t length = grid.size();
  const std::int64_t dim = config_.dim();
  const std::int64_t groups = args.timesteps.dim(0);
  if (static_cast<std::int64_t>(args.text.size()) != batch || groups < 1 || batch % groups != 0 ||
      args.rope->cos.dim(0) != length) {
    throw Error(ErrorCode::kInternal, "a transformer batch of " + std::to_string(batch) +
                                          " samples with other texts, timesteps or token grid");
  }

  Tensor x = backend.Allocate({batch, length, dim}, DType::kF32);
  {
    Tensor patches = backend.Allocate({batch, length, config_.in_channels * kPatch}, dtype_);
    backend.Patchify({.latent = args.latent, .tokens = patches});
    if (args.rope->order.defined()) patches = Reordered(backend, patches, args.rope->order);
    backend.Linear({.x = patches, .weight = patch_.weight, .bias = patch_.bias, .out = x});
  }
  const TimeEmbedding time = EmbedTime(backend, args.timesteps);

  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    const auto row = static_cast<std::int64_t>(i);
    BlockContext context = {.modulation = time.modulation,
                            .rope = args.rope,
                            .attention = args.attention,
                            .map = args.attention->MapOf(i),
                            .mass_sample = args.mass_sample};
    for (const TextContext* text : args.text) context.text.push_back(&text->blocks[i]);
    if (args.pair_counters.defined()) {
      context.pair_counter = args.pair_counters.Slice(row, row + 1).Reshape({2});
    }
    if (args.mass_kept.defined()) context.mass_kept = args.mass_kept.Slice(row, row + 1);
    blocks_[i].Forward(backend, context, x);
    if (args.observer) args.observer(static_cast<int>(i), x);
  }

  Tensor modulation = backend.Allocate({2, groups, dim}, DType::kF32);
  backend.Modulation({.table = head_modulation_, .t = time.raw, .out = modulation});
  Tensor normed = backend.Allocate(x.shape(), dtype_);
  const Shape by_timestep = {groups, batch * length / groups, dim};
  backend.LayerNorm({.x = x.Reshape(by_timestep),
                     .scale = modulation.Slice(1, 2).Reshape({groups, dim}),
                     .shift = modulation.Slice(0, 1).Reshape({groups, dim}),
                     .eps = config_.eps,
                     .out = normed.Reshape(by_timestep)});
  x = Tensor();
  Tensor patches = backend.Allocate({batch, length, config_.out_channels * kPatch}, DType::kF32);
  backend.Linear({.x = normed, .weight = head_.weight, .bias = head_.bias, .out = patches});
  if (args.rope->place.defined()) patches = Reordered(backend, patches, args.rope->place);
  backend.Unpatchify({.tokens = patches, .latent = args.velocity});
}

}  // namespace slalom
