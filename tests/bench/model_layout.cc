#include "tests/bench/model_layout.h"

#include <cmath>
#include <cstdint>
#include <span>

namespace slalom {
namespace {

constexpr double kBiasDeviation = 0.1;
constexpr double kNormDeviation = 0.1;
constexpr double kModulationDeviation = 0.3;

class Builder {
 public:
  void Add(const std::string& name, const Shape& shape, double deviation, double mean = 0.0) {
    layout_.push_back({name, shape, deviation, mean});
  }
  // A weight [out, in, kernel...]; deviation 1 / sqrt(fan in).
  void AddWeight(const std::string& name, const Shape& shape) {
    const auto fan_in = static_cast<double>(shape.NumElements() / shape[0]);
    Add(name + ".weight", shape, 1.0 / std::sqrt(fan_in));
  }
  void AddLayer(const std::string& name, const Shape& shape) {
    AddWeight(name, shape);
    Add(name + ".bias", {shape[0]}, kBiasDeviation);
  }
  void AddNorm(const std::string& name, const Shape& shape) {
    Add(name, shape, kNormDeviation, 1.0);
  }
  // WanResidualBlock.
  void AddResidual(const std::string& name, std::int64_t in, std::int64_t out) {
    AddNorm(name + ".norm1.gamma", {in, 1, 1, 1});
    AddLayer(name + ".conv1", {out, in, 3, 3, 3});
    AddNorm(name + ".norm2.gamma", {out, 1, 1, 1});
    AddLayer(name + ".conv2", {out, out, 3, 3, 3});
    if (in != out) AddLayer(name + ".conv_shortcut", {out, in, 1, 1, 1});
  }
  // WanMidBlock.
  void AddMiddle(const std::string& name, std::int64_t channels) {
    AddResidual(name + ".resnets.0", channels, channels);
    AddNorm(name + ".attentions.0.norm.gamma", {channels, 1, 1});
    AddLayer(name + ".attentions.0.to_qkv", {3 * channels, channels, 1, 1});
    AddLayer(name + ".attentions.0.proj", {channels, channels, 1, 1});
    AddResidual(name + ".resnets.1", channels, channels);
  }
  NetworkLayout Take() { return std::move(layout_); }

 private:
  NetworkLayout layout_;
};

// WanEncoder3d: one flat list of blocks, from full size down.
void AddVaeEncoder(const VaeConfig& config, Builder& builder) {
  std::int64_t channels = config.base_dim;
  builder.AddLayer("encoder.conv_in", {channels, 3, 3, 3, 3});
  int index = 0;
  const auto next = [&] { return "encoder.down_blocks." + std::to_string(index++); };
  for (std::size_t level = 0; level < config.dim_mult.size(); ++level) {
    const std::int64_t out = std::int64_t{config.base_dim} * config.dim_mult[level];
    for (int i = 0; i < config.num_res_blocks; ++i) {
      builder.AddResidual(next(), channels, out);
      channels = out;
    }
    if (level + 1 == config.dim_mult.size()) break;
    const std::string down = next();
    builder.AddLayer(down + ".resample.1", {channels, channels, 3, 3});
    if (config.temporal_downsample[level]) {
      builder.AddLayer(down + ".time_conv", {channels, channels, 3, 1, 1});
    }
  }
  builder.AddMiddle("encoder.mid_block", channels);
  builder.AddNorm("encoder.norm_out.gamma", {channels, 1, 1, 1});
  builder.AddLayer("encoder.conv_out", {2 * config.z_dim, channels, 3, 3, 3});
  builder.AddLayer("quant_conv", {2 * config.z_dim, 2 * config.z_dim, 1, 1, 1});
}

// WanDecoder3d, from the coarsest level up.
void AddVaeDecoder(const VaeConfig& config, Builder& builder) {
  const std::size_t levels = config.dim_mult.size();
  const auto width = [&](std::size_t level) {
    return std::int64_t{config.base_dim} * config.dim_mult[levels - 1 - level];
  };
  std::int64_t channels = width(0);
  builder.AddLayer("post_quant_conv", {config.z_dim, config.z_dim, 1, 1, 1});
  builder.AddLayer("decoder.conv_in", {channels, config.z_dim, 3, 3, 3});
  builder.AddMiddle("decoder.mid_block", channels);
  for (std::size_t level = 0; level < levels; ++level) {
    const std::string block = "decoder.up_blocks." + std::to_string(level);
    for (int i = 0; i <= config.num_res_blocks; ++i) {
      builder.AddResidual(block + ".resnets." + std::to_string(i), channels, width(level));
      channels = width(level);
    }
    if (level + 1 == levels) break;
    if (config.temporal_downsample[levels - 2 - level]) {
      builder.AddLayer(block + ".upsamplers.0.time_conv", {2 * channels, channels, 3, 1, 1});
    }
    builder.AddLayer(block + ".upsamplers.0.resample.1", {channels / 2, channels, 3, 3});
    channels /= 2;
  }
  builder.AddNorm("decoder.norm_out.gamma", {channels, 1, 1, 1});
  builder.AddLayer("decoder.conv_out", {3, channels, 3, 3, 3});
}

}  // namespace

NetworkLayout TransformerLayout(const TransformerConfig& config) {
  const std::int64_t d = config.dim();
  Builder builder;
  builder.Add("scale_shift_table", {1, 2, d}, kModulationDeviation);
  builder.AddLayer("patch_embedding", {d, config.in_channels, 1, 2, 2});
  const std::string condition = "condition_embedder.";
  builder.AddLayer(condition + "time_embedder.linear_1", {d, config.freq_dim});
  builder.AddLayer(condition + "time_embedder.linear_2", {d, d});
  builder.AddLayer(condition + "time_proj", {6 * d, d});
  builder.AddLayer(condition + "text_embedder.linear_1", {d, config.text_dim});
  builder.AddLayer(condition + "text_embedder.linear_2", {d, d});
  for (int i = 0; i < config.num_layers; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    builder.Add(block + "scale_shift_table", {1, 6, d}, kModulationDeviation);
    for (const char* attention : {"attn1.", "attn2."}) {
      for (const char* leaf : {"to_q", "to_k", "to_v", "to_out.0"}) {
        builder.AddLayer(block + attention + leaf, {d, d});
      }
      builder.AddNorm(block + attention + "norm_q.weight", {d});
      builder.AddNorm(block + attention + "norm_k.weight", {d});
    }
    builder.AddNorm(block + "norm2.weight", {d});
    builder.Add(block + "norm2.bias", {d}, kBiasDeviation);
    builder.AddLayer(block + "ffn.net.0.proj", {config.ffn_dim, d});
    builder.AddLayer(block + "ffn.net.2", {d, config.ffn_dim});
  }
  builder.AddLayer("proj_out", {4 * std::int64_t{config.out_channels}, d});
  return builder.Take();
}

NetworkLayout TextEncoderLayout(const TextEncoderConfig& config) {
  const std::int64_t d = config.d_model;
  const std::int64_t inner = std::int64_t{config.num_heads} * config.d_kv;
  Builder builder;
  builder.Add("shared.weight", {config.vocab_size, d}, 1.0);
  for (int i = 0; i < config.num_layers; ++i) {
    const std::string attention = "encoder.block." + std::to_string(i) + ".layer.0.";
    // T5 does not divide its scores by sqrt(d_kv); its initialisation of q makes up for it.
    builder.Add(attention + "SelfAttention.q.weight", {inner, d},
                1.0 / std::sqrt(static_cast<double>(d * config.d_kv)));
    builder.AddWeight(attention + "SelfAttention.k", {inner, d});
    builder.AddWeight(attention + "SelfAttention.v", {inner, d});
    builder.AddWeight(attention + "SelfAttention.o", {d, inner});
    builder.Add(attention + "SelfAttention.relative_attention_bias.weight",
                {config.relative_attention_num_buckets, config.num_heads}, 0.5);
    builder.AddNorm(attention + "layer_norm.weight", {d});
    const std::string dense = "encoder.block." + std::to_string(i) + ".layer.1.";
    builder.AddWeight(dense + "DenseReluDense.wi_0", {config.d_ff, d});
    builder.AddWeight(dense + "DenseReluDense.wi_1", {config.d_ff, d});
    builder.AddWeight(dense + "DenseReluDense.wo", {d, config.d_ff});
    builder.AddNorm(dense + "layer_norm.weight", {d});
  }
  builder.AddNorm("encoder.final_layer_norm.weight", {d});
  return builder.Take();
}

NetworkLayout VaeLayout(const VaeConfig& config) {
  Builder builder;
  AddVaeEncoder(config, builder);
  AddVaeDecoder(config, builder);
  return builder.Take();
}

}  // namespace slalom
