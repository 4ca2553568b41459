#include "model/transformer_block.h"

#include <cmath>
#include <utility>

#include "kernels/core/error.h"

namespace slalom {
namespace {

// Rows of the modulation.
enum Row { kShiftAttention, kScaleAttention, kGateAttention, kShiftMlp, kScaleMlp, kGateMlp };
constexpr std::int64_t kModulationRows = 6;

// Query rows per head that stand for all in the measurement of the kept mass.
constexpr int kMassRows = 64;

// One sample of a map of many.
BlockMap MapOfSample(const BlockMap& map, std::int64_t sample) {
  BlockMap one = map;
  one.classes = map.classes.Slice(sample, sample + 1);
  one.critical = map.critical.Slice(sample, sample + 1);
  one.counts = map.counts.Slice(sample, sample + 1);
  return one;
}

}  // namespace

struct TransformerBlock::Heads {
  Tensor q;        // [B, L, H, D] T, normalised and rotated
  Tensor k;        // [B, L, H, D] T, normalised and rotated
  Tensor v;        // [B, L, H, D] T
  Tensor q_means;  // [B, blocks, d] f32, of q's blocks; only for maps that score them
  Tensor k_means;
  Tensor q_normed;  // [B, L, H, D] T, not rotated; only for SALAD's linear branch
  Tensor k_normed;  // [B, L, H, D] T
};

LinearWeights LoadLinear(Backend& backend, const Weights& weights, const std::string& name,
                         std::int64_t in, std::int64_t out, DType dtype, DType bias_dtype) {
  return {.weight = weights.Load(backend, name + ".weight", {out, in}, dtype),
          .bias = weights.Load(backend, name + ".bias", {out}, bias_dtype)};
}

TransformerBlock::TransformerBlock(Backend& backend, const Weights& weights,
                                   const TransformerConfig& config,
                                   std::span<const AttentionAdapter> adapters, int index,
                                   DType dtype)
    : dim_(config.dim()),
      heads_(config.num_attention_heads),
      head_dim_(config.attention_head_dim),
      ffn_dim_(config.ffn_dim),
      eps_(config.eps),
      dtype_(dtype) {
  const std::string block = "blocks." + std::to_string(index) + ".";
  const auto linear = [&](const std::string& name, std::int64_t in, std::int64_t out) {
    return LoadLinear(backend, weights, block + name, in, out, dtype, dtype);
  };
  const auto linear_to_stream = [&](const std::string& name, std::int64_t in, std::int64_t out) {
    return LoadLinear(backend, weights, block + name, in, out, dtype, DType::kF32);
  };
  const auto vector = [&](const std::string& name) {
    return weights.Load(backend, block + name, {dim_}, DType::kF32);
  };

  modulation_ =
      weights.Load(backend, block + "scale_shift_table", {1, kModulationRows, dim_}, DType::kF32)
          .Reshape({kModulationRows, dim_});
  variants_.push_back({.kind = AttentionKind::kDense,
                       .q = linear("attn1.to_q", dim_, dim_),
                       .k = linear("attn1.to_k", dim_, dim_),
                       .v = linear("attn1.to_v", dim_, dim_),
                       .o = linear_to_stream("attn1.to_out.0", dim_, dim_),
                       .cross_q = linear("attn2.to_q", dim_, dim_),
                       .cross_o = linear_to_stream("attn2.to_out.0", dim_, dim_),
                       .ffn_in = linear("ffn.net.0.proj", dim_, ffn_dim_),
                       .ffn_out = linear_to_stream("ffn.net.2", ffn_dim_, dim_)});
  self_norm_q_ = vector("attn1.norm_q.weight");
  self_norm_k_ = vector("attn1.norm_k.weight");
  cross_k_ = linear("attn2.to_k", dim_, dim_);
  cross_v_ = linear("attn2.to_v", dim_, dim_);
  cross_norm_q_ = vector("attn2.norm_q.weight");
  cross_norm_k_ = vector("attn2.norm_k.weight");
  cross_ln_weight_ = vector("norm2.weight");
  cross_ln_bias_ = vector("norm2.bias");
  for (const AttentionAdapter& adapter : adapters) {
    variants_.push_back(LoadVariant(backend, weights, adapter, index));
  }
}

TransformerBlock::Variant TransformerBlock::LoadVariant(Backend& backend, const Weights& weights,
                                                        const AttentionAdapter& adapter,
                                                        int index) const {
  Variant variant = variants_.front();
  variant.kind = adapter.kind;
  const std::string block = "blocks." + std::to_string(index) + ".";
  const auto merge = [&](const char* name, LinearWeights& linear) {
    if (!adapter.lora.contains(block + name)) return;
    linear.weight =
        LoadMerged(backend, weights, adapter, block + name, linear.weight.shape(), dtype_);
  };
  merge("attn1.to_q", variant.q);
  merge("attn1.to_k", variant.k);
  merge("attn1.to_v", variant.v);
  merge("attn1.to_out.0", variant.o);
  merge("attn2.to_q", variant.cross_q);
  merge("attn2.to_out.0", variant.cross_o);
  merge("ffn.net.0.proj", variant.ffn_in);
  merge("ffn.net.2", variant.ffn_out);

  const AdapterLayer& layer = adapter.layers.at(static_cast<std::size_t>(index));
  variant.proj_weight = layer.proj_weight;
  variant.proj_bias = layer.proj_bias;
  variant.gate_weight = layer.gate_weight;
  variant.gate_bias = layer.gate_bias;
  return variant;
}

const TransformerBlock::Variant& TransformerBlock::VariantOf(AttentionKind kind) const {
  for (const Variant& variant : variants_) {
    if (variant.kind == kind) return variant;
  }
  throw Error(ErrorCode::kFailedPrecondition, "this model has no adapter for that attention");
}

TextKeysValues TransformerBlock::PrepareText(Backend& backend, const Tensor& text) const {
  const std::int64_t rows = text.dim(0);
  Tensor k = backend.Allocate({rows, dim_}, dtype_);
  Tensor v = backend.Allocate({rows, dim_}, dtype_);
  backend.Linear({.x = text, .weight = cross_k_.weight, .bias = cross_k_.bias, .out = k});
  backend.RmsNorm({.x = k, .weight = cross_norm_k_, .eps = eps_, .out = k});
  backend.Linear({.x = text, .weight = cross_v_.weight, .bias = cross_v_.bias, .out = v});
  const Shape heads = {1, rows, heads_, head_dim_};
  return {.k = k.Reshape(heads), .v = v.Reshape(heads)};
}

void TransformerBlock::Forward(Backend& backend, const BlockContext& context,
                               const Tensor& x) const {
  const std::int64_t groups = context.modulation.dim(0);
  Tensor rows = backend.Allocate({kModulationRows, groups, dim_}, DType::kF32);
  backend.Modulation({.table = modulation_, .t = context.modulation, .out = rows});
  const auto row = [&](Row r) { return rows.Slice(r, r + 1).Reshape({groups, dim_}); };
  // What is done row by row sees the samples of one timestep as one.
  const Shape by_timestep = {groups, x.dim(0) * x.dim(1) / groups, dim_};
  const auto modulate = [&](Row scale, Row shift, const Tensor& out) {
    backend.LayerNorm({.x = x.Reshape(by_timestep),
                       .scale = row(scale),
                       .shift = row(shift),
                       .eps = eps_,
                       .out = out.Reshape(by_timestep)});
  };

  Tensor u = backend.Allocate(x.shape(), dtype_);
  modulate(kScaleAttention, kShiftAttention, u);
  const Variant& layer = VariantOf(context.attention->kind);
  Tensor attended = Attend(backend, context, layer, u);
  backend.Linear({.x = attended,
                  .weight = layer.o.weight,
                  .bias = layer.o.bias,
                  .residual = x,
                  .gate = row(kGateAttention),
                  .out = x});

  backend.LayerNorm(
      {.x = x, .weight = cross_ln_weight_, .bias = cross_ln_bias_, .eps = eps_, .out = u});
  attended = CrossAttend(backend, context, layer, u);
  backend.Linear({.x = attended,
                  .weight = layer.cross_o.weight,
                  .bias = layer.cross_o.bias,
                  .residual = x,
                  .out = x});
  attended = Tensor();  // its memory goes to the MLP

  modulate(kScaleMlp, kShiftMlp, u);
  Tensor hidden = backend.Allocate({x.dim(0), x.dim(1), ffn_dim_}, dtype_);
  backend.Linear({.x = u,
                  .weight = layer.ffn_in.weight,
                  .bias = layer.ffn_in.bias,
                  .activation = Activation::kGeluTanh,
                  .out = hidden});
  backend.Linear({.x = hidden,
                  .weight = layer.ffn_out.weight,
                  .bias = layer.ffn_out.bias,
                  .residual = x,
                  .gate = row(kGateMlp),
                  .out = x});
}

// Self-attention up to, not including, the o projection: [B, L, d] T.
Tensor TransformerBlock::Attend(Backend& backend, const BlockContext& context, const Variant& layer,
                                const Tensor& u) const {
  const Shape split = {u.dim(0), u.dim(1), heads_, head_dim_};
  const RopeTables& rope = *context.rope;
  const bool keep_unrotated = layer.kind == AttentionKind::kSalad && layer.proj_weight.defined();

  const auto project = [&](const LinearWeights& linear) {
    Tensor out = backend.Allocate(u.shape(), dtype_);
    backend.Linear({.x = u, .weight = linear.weight, .bias = linear.bias, .out = out});
    return out;
  };
  const BlockMapOptions& map = context.map;
  const bool pooled = layer.kind != AttentionKind::kDense && map.kind == BlockMapKind::kTopK;
  // Returns the rotated heads; `normed` receives what they were before, `means` those of blocks of
  // `pool` tokens, each where it is wanted.
  const auto rotate = [&](const Tensor& x, const Tensor& norm, int pool, Tensor& means,
                          Tensor& normed) {
    if (pooled) {
      means = backend.Allocate({u.dim(0), (u.dim(1) + pool - 1) / pool, u.dim(2)}, DType::kF32);
    }
    QkNormRopeArgs args = {.x = x,
                           .cos = rope.cos,
                           .sin = rope.sin,
                           .out = x.Reshape(split),
                           .means = means,
                           .pool = pool};
    if (keep_unrotated) {
      normed = args.out;
      backend.QkNormRope({.x = x, .weight = norm, .eps = eps_, .out = normed});
      args.out = backend.Allocate(split, dtype_);
    } else {
      args.weight = norm;
      args.eps = eps_;
    }
    backend.QkNormRope(args);
    return args.out;
  };

  Heads heads;
  heads.q = rotate(project(layer.q), self_norm_q_, map.block_q, heads.q_means, heads.q_normed);
  heads.k = rotate(project(layer.k), self_norm_k_, map.block_k, heads.k_means, heads.k_normed);
  heads.v = project(layer.v).Reshape(split);
  Tensor out = backend.Allocate(split, dtype_);
  if (layer.kind == AttentionKind::kDense) {
    backend.Attention({.q = heads.q,
                       .k = heads.k,
                       .v = heads.v,
                       .scale = 1.0f / std::sqrt(static_cast<float>(head_dim_)),
                       .out = out});
  } else {
    AttendSparsely(backend, context, layer, u, heads, out);
  }
  return out.Reshape(u.shape());
}

void TransformerBlock::AttendSparsely(Backend& backend, const BlockContext& context,
                                      const Variant& layer, const Tensor& u, const Heads& heads,
                                      const Tensor& out) const {
  const AttentionSetting& setting = *context.attention;
  const BlockMap map = backend.MakeBlockMap({.q = heads.q,
                                             .k = heads.k,
                                             .grid = context.rope->grid,
                                             .options = context.map,
                                             .q_means = heads.q_means,
                                             .k_means = heads.k_means});
  if (context.pair_counter.defined()) backend.CountPairs(map, context.pair_counter);
  if (context.mass_kept.defined()) {
    const std::int64_t sample = context.mass_sample;
    backend.AttentionMassKept(heads.q.Slice(sample, sample + 1), heads.k.Slice(sample, sample + 1),
                              1.0f / std::sqrt(static_cast<float>(head_dim_)),
                              MapOfSample(map, sample), kMassRows, context.mass_kept);
  }
  if (layer.kind == AttentionKind::kSla) {
    backend.SlaAttention({.q = heads.q,
                          .k = heads.k,
                          .v = heads.v,
                          .map = &map,
                          .scope = setting.scope,
                          .feature_map = setting.feature_map,
                          .proj_weight = layer.proj_weight,
                          .proj_bias = layer.proj_bias,
                          .out = out});
    return;
  }
  backend.SaladAttention({.q = heads.q,
                          .k = heads.k,
                          .v = heads.v,
                          .q_normed = heads.q_normed,
                          .k_normed = heads.k_normed,
                          .cos = context.rope->cos,
                          .sin = context.rope->sin,
                          .x = u,
                          .map = &map,
                          .map_kind = context.map.kind,
                          .grid = context.rope->grid,
                          .gate = setting.gate,
                          .proj_weight = layer.proj_weight,
                          .proj_bias = layer.proj_bias,
                          .gate_weight = layer.gate_weight,
                          .gate_bias = layer.gate_bias,
                          .out = out.Reshape(u.shape())});
}

// Attention to each sample's own prompt, up to the o projection: [B, L, d] T.
Tensor TransformerBlock::CrossAttend(Backend& backend, const BlockContext& context,
                                     const Variant& layer, const Tensor& u) const {
  const Shape split = {u.dim(0), u.dim(1), heads_, head_dim_};
  Tensor q = backend.Allocate(u.shape(), dtype_);
  backend.Linear({.x = u, .weight = layer.cross_q.weight, .bias = layer.cross_q.bias, .out = q});
  backend.RmsNorm({.x = q, .weight = cross_norm_q_, .eps = eps_, .out = q});
  const Tensor heads = q.Reshape(split);
  Tensor out = backend.Allocate(split, dtype_);
  for (std::int64_t b = 0; b < u.dim(0); ++b) {
    const TextKeysValues& text = *context.text[static_cast<std::size_t>(b)];
    backend.Attention({.q = heads.Slice(b, b + 1),
                       .k = text.k,
                       .v = text.v,
                       .scale = 1.0f / std::sqrt(static_cast<float>(head_dim_)),
                       .out = out.Slice(b, b + 1)});
  }
  return out.Reshape(u.shape());
}

}  // namespace slalom
