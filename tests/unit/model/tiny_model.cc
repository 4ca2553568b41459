#include "tests/unit/model/tiny_model.h"

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "kernels/core/random.h"
#include "kernels/core/tensor.h"
#include "model/safetensors_writer.h"

namespace slalom {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int kVocabulary = 768;
constexpr int kLatentChannels = 16;
constexpr int kFreqDim = 32;
constexpr int kTextHeads = 2;
constexpr int kTextHeadDim = 16;
constexpr int kTextFfn = 48;
constexpr int kTextLayers = 2;

// Named random tensors of one network.
class Tensors {
 public:
  explicit Tensors(std::uint64_t seed) : seed_(seed) {}

  // mean + deviation * N(0, 1).
  void Add(const std::string& name, const Shape& shape, double deviation, double mean = 0.0) {
    Tensor tensor = Tensor::Host(shape, DType::kF32);
    const std::span<float> values(tensor.data<float>(),
                                  static_cast<std::size_t>(tensor.NumElements()));
    FillNormal(seed_, stream_++, 0, values);
    for (float& value : values) value = static_cast<float>(mean + deviation * value);
    tensors_[name] = tensor;
  }

  // Weight [out, in, kernel...] that keeps the size of its input, and a small bias.
  void AddLayer(const std::string& name, std::vector<std::int64_t> weight, bool bias = true) {
    const Shape shape{std::span<const std::int64_t>(weight)};
    const auto fan_in = static_cast<double>(shape.NumElements() / shape[0]);
    Add(name + ".weight", shape, 1.0 / std::sqrt(fan_in));
    if (bias) Add(name + ".bias", {weight[0]}, 0.1);
  }

  void AddNorm(const std::string& name, const Shape& shape) { Add(name, shape, 0.1, 1.0); }

  void Write(const fs::path& path) const { WriteSafetensors(path.string(), tensors_); }

 private:
  std::uint64_t seed_;
  std::uint64_t stream_ = 0;
  std::map<std::string, Tensor> tensors_;
};

void WriteJson(const fs::path& path, const json& object) {
  fs::create_directories(path.parent_path());
  std::ofstream(path) << object.dump(2) << "\n";
}

void WriteTransformer(const fs::path& folder, const TinyModelOptions& options) {
  WriteJson(folder / "config.json", {{"_class_name", "WanTransformer3DModel"},
                                     {"num_attention_heads", options.heads},
                                     {"attention_head_dim", options.head_dim},
                                     {"num_layers", options.layers},
                                     {"ffn_dim", options.ffn_dim},
                                     {"in_channels", kLatentChannels},
                                     {"out_channels", kLatentChannels},
                                     {"text_dim", options.text_dim},
                                     {"text_len", options.text_len},
                                     {"freq_dim", kFreqDim},
                                     {"patch_size", {1, 2, 2}},
                                     {"cross_attn_norm", true},
                                     {"qk_norm", "rms_norm_across_heads"},
                                     {"eps", 1e-6}});
  const std::int64_t d = std::int64_t{options.heads} * options.head_dim;
  Tensors tensors(options.seed);
  tensors.AddLayer("patch_embedding", {d, kLatentChannels, 1, 2, 2});
  const std::string condition = "condition_embedder.";
  tensors.AddLayer(condition + "text_embedder.linear_1", {d, options.text_dim});
  tensors.AddLayer(condition + "text_embedder.linear_2", {d, d});
  tensors.AddLayer(condition + "time_embedder.linear_1", {d, kFreqDim});
  tensors.AddLayer(condition + "time_embedder.linear_2", {d, d});
  tensors.AddLayer(condition + "time_proj", {6 * d, d});
  for (int i = 0; i < options.layers; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    tensors.Add(block + "scale_shift_table", {1, 6, d}, 0.3);
    for (const char* attention : {"attn1.", "attn2."}) {
      for (const char* leaf : {"to_q", "to_k", "to_v", "to_out.0"}) {
        tensors.AddLayer(block + attention + leaf, {d, d});
      }
      tensors.AddNorm(block + attention + "norm_q.weight", {d});
      tensors.AddNorm(block + attention + "norm_k.weight", {d});
    }
    tensors.AddNorm(block + "norm2.weight", {d});
    tensors.Add(block + "norm2.bias", {d}, 0.1);
    tensors.AddLayer(block + "ffn.net.0.proj", {options.ffn_dim, d});
    tensors.AddLayer(block + "ffn.net.2", {d, options.ffn_dim});
  }
  tensors.Add("scale_shift_table", {1, 2, d}, 0.3);
  tensors.AddLayer("proj_out", {4 * kLatentChannels, d});
  tensors.Write(folder / "diffusion_pytorch_model.safetensors");
}

void AddResidual(Tensors& tensors, const std::string& name, std::int64_t in, std::int64_t out) {
  tensors.AddNorm(name + ".norm1.gamma", {in, 1, 1, 1});
  tensors.AddLayer(name + ".conv1", {out, in, 3, 3, 3});
  tensors.AddNorm(name + ".norm2.gamma", {out, 1, 1, 1});
  tensors.AddLayer(name + ".conv2", {out, out, 3, 3, 3});
  if (in != out) tensors.AddLayer(name + ".conv_shortcut", {out, in, 1, 1, 1});
}

void WriteVae(const fs::path& folder, const TinyModelOptions& options) {
  const std::vector<std::int64_t> multipliers = {1, 2, 4, 4};
  const std::vector<bool> doubles_frames = {true, true, false};  // from the coarsest level on
  WriteJson(folder / "config.json", {{"_class_name", "AutoencoderKLWan"},
                                     {"base_dim", options.vae_base_dim},
                                     {"z_dim", kLatentChannels},
                                     {"dim_mult", multipliers},
                                     {"num_res_blocks", options.vae_res_blocks},
                                     {"attn_scales", json::array()},
                                     {"temperal_downsample", {false, true, true}}});
  const auto width = [&](std::size_t level) {
    return options.vae_base_dim * multipliers[multipliers.size() - 1 - level];
  };
  Tensors tensors(options.seed + 1);
  std::int64_t channels = width(0);
  tensors.AddLayer("post_quant_conv", {kLatentChannels, kLatentChannels, 1, 1, 1});
  tensors.AddLayer("decoder.conv_in", {channels, kLatentChannels, 3, 3, 3});
  const std::string middle = "decoder.mid_block.";
  AddResidual(tensors, middle + "resnets.0", channels, channels);
  tensors.AddNorm(middle + "attentions.0.norm.gamma", {channels, 1, 1});
  tensors.AddLayer(middle + "attentions.0.to_qkv", {3 * channels, channels, 1, 1});
  tensors.AddLayer(middle + "attentions.0.proj", {channels, channels, 1, 1});
  AddResidual(tensors, middle + "resnets.1", channels, channels);
  for (std::size_t level = 0; level < multipliers.size(); ++level) {
    const std::string block = "decoder.up_blocks." + std::to_string(level);
    for (int i = 0; i <= options.vae_res_blocks; ++i) {
      AddResidual(tensors, block + ".resnets." + std::to_string(i), channels, width(level));
      channels = width(level);
    }
    if (level == doubles_frames.size()) break;
    if (doubles_frames[level]) {
      tensors.AddLayer(block + ".upsamplers.0.time_conv", {2 * channels, channels, 3, 1, 1});
    }
    tensors.AddLayer(block + ".upsamplers.0.resample.1", {channels / 2, channels, 3, 3});
    channels /= 2;
  }
  tensors.AddNorm("decoder.norm_out.gamma", {channels, 1, 1, 1});
  tensors.AddLayer("decoder.conv_out", {3, channels, 3, 3, 3});
  tensors.Write(folder / "diffusion_pytorch_model.safetensors");
}

void WriteTextEncoder(const fs::path& folder, const TinyModelOptions& options) {
  WriteJson(folder / "config.json", {{"model_type", "umt5"},
                                     {"vocab_size", kVocabulary},
                                     {"d_model", options.text_dim},
                                     {"d_kv", kTextHeadDim},
                                     {"num_heads", kTextHeads},
                                     {"d_ff", kTextFfn},
                                     {"num_layers", kTextLayers},
                                     {"feed_forward_proj", "gated-gelu"}});
  const std::int64_t d = options.text_dim;
  constexpr std::int64_t kInner = kTextHeads * kTextHeadDim;
  Tensors tensors(options.seed + 2);
  tensors.Add("shared.weight", {kVocabulary, d}, 1.0);
  for (int i = 0; i < kTextLayers; ++i) {
    const std::string layer = "encoder.block." + std::to_string(i) + ".layer.";
    for (const char* leaf : {"q", "k", "v"}) {
      tensors.AddLayer(layer + "0.SelfAttention." + leaf, {kInner, d}, /*bias=*/false);
    }
    tensors.AddLayer(layer + "0.SelfAttention.o", {d, kInner}, /*bias=*/false);
    tensors.Add(layer + "0.SelfAttention.relative_attention_bias.weight", {32, kTextHeads}, 0.5);
    tensors.AddNorm(layer + "0.layer_norm.weight", {d});
    for (const char* leaf : {"wi_0", "wi_1"}) {
      tensors.AddLayer(layer + "1.DenseReluDense." + leaf, {kTextFfn, d}, /*bias=*/false);
    }
    tensors.AddLayer(layer + "1.DenseReluDense.wo", {d, kTextFfn}, /*bias=*/false);
    tensors.AddNorm(layer + "1.layer_norm.weight", {d});
  }
  tensors.AddNorm("encoder.final_layer_norm.weight", {d});
  tensors.Write(folder / "model.safetensors");
}

}  // namespace

void WriteTinyModel(const std::string& folder, const TinyModelOptions& options) {
  const fs::path root(folder);
  WriteJson(root / "model_index.json", {{"_class_name", "WanPipeline"}});
  WriteTransformer(root / "transformer", options);
  WriteVae(root / "vae", options);
  WriteTextEncoder(root / "text_encoder", options);
  fs::create_directories(root / "tokenizer");
  fs::copy_file(SLALOM_TINY_SPIECE_MODEL, root / "tokenizer" / "spiece.model",
                fs::copy_options::overwrite_existing);
  WriteJson(root / "scheduler" / "scheduler_config.json",
            {{"_class_name", "UniPCMultistepScheduler"},
             {"prediction_type", "flow_prediction"},
             {"use_flow_sigmas", true},
             {"flow_shift", 3.0}});
  WriteJson(root / "slalom.json", {{"name", "tiny"},
                                   {"defaults",
                                    {{"width", options.width},
                                     {"height", options.height},
                                     {"num_frames", options.num_frames},
                                     {"steps", options.steps},
                                     {"guidance_scale", 3.0}}},
                                   {"limits",
                                    {{"max_width", 512},
                                     {"max_height", 512},
                                     {"max_frames", 65},
                                     {"max_pixels", 512 * 512 * 65},
                                     {"max_steps", 50},
                                     {"max_prompt_bytes", 512}}}});
}

}  // namespace slalom
