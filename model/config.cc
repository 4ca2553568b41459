#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "kernels/core/error.h"
#include "model/config_reader.h"
#include "model/json_file.h"

namespace slalom {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// Means and deviations of Wan2.1's latent channels.
const std::vector<float>& WanLatentsMean() {
  static const std::vector<float> mean = {
      -0.7571f, -0.7089f, -0.9113f, 0.1075f,  -0.1745f, 0.9653f,  -0.1517f, 1.5508f,
      0.4134f,  -0.0715f, 0.5517f,  -0.3632f, -0.1922f, -0.9497f, 0.2503f,  -0.2921f};
  return mean;
}
const std::vector<float>& WanLatentsStd() {
  static const std::vector<float> deviation = {2.8184f, 1.4541f, 2.3275f, 2.6558f, 1.2196f, 1.7708f,
                                               2.6052f, 2.0743f, 3.2687f, 2.1526f, 2.8652f, 1.5579f,
                                               1.6382f, 1.1253f, 2.8251f, 1.9160f};
  return deviation;
}

bool ReadQkNorm(const ConfigReader& reader, const json& object) {
  const auto it = object.find("qk_norm");
  if (it == object.end()) return true;
  if (it->is_null()) return false;
  if (it->is_boolean()) return it->get<bool>();
  if (*it == "rms_norm_across_heads") return true;
  reader.Fail("qk_norm", "is " + it->dump() + "; only \"rms_norm_across_heads\" is supported");
}

ClipLimits ReadLimits(const ConfigReader& reader) {
  reader.RequireKnown(
      {"max_width", "max_height", "max_frames", "max_pixels", "max_steps", "max_prompt_bytes"});
  ClipLimits limits;
  limits.max_width = reader.Int({"max_width"}, limits.max_width, 16, 16384);
  limits.max_height = reader.Int({"max_height"}, limits.max_height, 16, 16384);
  limits.max_frames = reader.Int({"max_frames"}, limits.max_frames, 1, 4097);
  limits.max_pixels = reader.Integer({"max_pixels"}, limits.max_pixels, 256, std::int64_t{1} << 40);
  limits.max_steps = reader.Int({"max_steps"}, limits.max_steps, 1, 1000);
  limits.max_prompt_bytes = reader.Int({"max_prompt_bytes"}, limits.max_prompt_bytes, 1, 1 << 15);
  return limits;
}

ClipDefaults ReadDefaults(const ConfigReader& reader, const ModelConfig& model) {
  reader.RequireKnown({"width", "height", "num_frames", "fps", "steps", "guidance_scale",
                       "flow_shift", "sampler", "attention"});
  ClipDefaults defaults;
  const int multiple = model.vae.spatial_scale() * model.transformer.patch_size[1];
  const auto side = [&](const char* key, int fallback, int max) {
    const int value = reader.Int({key}, std::min(fallback, max / multiple * multiple), 1, max);
    if (value % multiple != 0) {
      reader.Fail(key, "is " + std::to_string(value) + ", expected a multiple of " +
                           std::to_string(multiple));
    }
    return value;
  };
  defaults.width = side("width", defaults.width, model.limits.max_width);
  defaults.height = side("height", defaults.height, model.limits.max_height);
  const int stride = model.vae.temporal_scale();
  const int most = (model.limits.max_frames - 1) / stride * stride + 1;
  defaults.num_frames =
      reader.Int({"num_frames"}, std::min(defaults.num_frames, most), 1, model.limits.max_frames);
  if ((defaults.num_frames - 1) % stride != 0) {
    reader.Fail("num_frames", "is " + std::to_string(defaults.num_frames) + ", expected " +
                                  std::to_string(stride) + "n + 1");
  }
  const std::int64_t pixels = std::int64_t{defaults.width} * defaults.height * defaults.num_frames;
  if (pixels > model.limits.max_pixels) {
    reader.Fail("width * height * num_frames", "is " + std::to_string(pixels) +
                                                   ", above the limit max_pixels " +
                                                   std::to_string(model.limits.max_pixels));
  }
  defaults.fps = reader.Int({"fps"}, defaults.fps, 1, 120);
  defaults.steps = reader.Int({"steps"}, std::min(defaults.steps, model.limits.max_steps), 1,
                              model.limits.max_steps);
  defaults.guidance_scale = reader.Double({"guidance_scale"}, defaults.guidance_scale, 0, 100);
  defaults.flow_shift = reader.Double({"flow_shift"}, model.sampler.flow_shift, 0.01, 100);
  defaults.sampler = reader.Choice(
      "sampler", model.sampler.kind,
      {{"unipc", SamplerKind::kUniPc}, {"euler", SamplerKind::kEuler}, {"rcm", SamplerKind::kRcm}});
  using Attention = std::optional<AttentionKind>;
  defaults.attention = reader.Choice("attention", Attention(),
                                     {{"dense", Attention(AttentionKind::kDense)},
                                      {"sla", Attention(AttentionKind::kSla)},
                                      {"salad", Attention(AttentionKind::kSalad)}});
  return defaults;
}

// slalom.json, and what it defaults to. Needs the networks' configs.
void ReadOwnConfig(const std::string& path, ModelConfig& model) {
  json object = json::object();
  std::error_code ignored;
  if (fs::exists(path, ignored)) object = ReadJsonFile(path);
  const ConfigReader reader(object, path);
  reader.RequireKnown({"name", "defaults", "limits"});
  model.name = reader.String({"name"}, model.name);
  if (model.name.empty()) reader.Fail("name", "is empty");
  const auto section = [&](const char* key) {
    const json* value = reader.Find({key});
    if (value == nullptr) return json::object();
    if (!value->is_object()) reader.Fail(key, "is " + value->dump() + ", expected an object");
    return *value;
  };
  const json limits = section("limits");
  const json defaults = section("defaults");
  model.limits = ReadLimits(ConfigReader(limits, path + ": limits"));
  model.defaults = ReadDefaults(ConfigReader(defaults, path + ": defaults"), model);
}

// What the networks must agree upon.
void CheckTogether(const ModelConfig& model) {
  const auto require = [&](const char* what, int a, int b) {
    if (a == b) return;
    throw Error(ErrorCode::kInvalidArgument, model.folder + ": " + what + " differ: " +
                                                 std::to_string(a) + " and " + std::to_string(b));
  };
  require("the transformer's in_channels and the VAE's z_dim", model.transformer.in_channels,
          model.vae.z_dim);
  require("the transformer's out_channels and the VAE's z_dim", model.transformer.out_channels,
          model.vae.z_dim);
  require("the transformer's text_dim and the text encoder's d_model", model.transformer.text_dim,
          model.text_encoder.d_model);
}

}  // namespace

int VaeConfig::temporal_scale() const { return 1 << std::ranges::count(temporal_downsample, true); }

const char* SamplerName(SamplerKind kind) {
  switch (kind) {
    case SamplerKind::kUniPc:
      return "unipc";
    case SamplerKind::kEuler:
      return "euler";
    case SamplerKind::kRcm:
      return "rcm";
  }
  return "unknown";
}

TransformerConfig LoadTransformerConfig(const std::string& path) {
  const json object = ReadJsonFile(path);
  const ConfigReader reader(object, path);
  reader.Require("_class_name", {"WanTransformer3DModel", "WanModel"});
  reader.Require("model_type", {"t2v"});
  reader.Require("patch_size", {json::array({1, 2, 2})});
  reader.RequireAbsent({"added_kv_proj_dim", "image_dim", "pos_embed_seq_len"},
                       "image conditioning is not supported");
  TransformerConfig config;
  config.num_attention_heads = reader.Int({"num_attention_heads", "num_heads"}, 12, 1, 256);
  if (reader.Find({"dim"}) != nullptr) {
    const int dim = reader.Int({"dim"}, 0, 1, 65536);
    if (dim % config.num_attention_heads != 0) {
      reader.Fail("dim", "is " + std::to_string(dim) + ", not a multiple of num_heads");
    }
    config.attention_head_dim = dim / config.num_attention_heads;
  }
  config.attention_head_dim = reader.Int({"attention_head_dim"}, config.attention_head_dim, 8, 256);
  if (config.attention_head_dim % 8 != 0 || config.attention_head_dim > 256) {
    reader.Fail("attention_head_dim", "is " + std::to_string(config.attention_head_dim) +
                                          ", expected a multiple of 8 up to 256");
  }
  config.num_layers = reader.Int({"num_layers"}, config.num_layers, 1, 256);
  config.ffn_dim = reader.Int({"ffn_dim"}, config.ffn_dim, 1, 1 << 18);
  config.in_channels = reader.Int({"in_channels", "in_dim"}, config.in_channels, 1, 256);
  config.out_channels = reader.Int({"out_channels", "out_dim"}, config.out_channels, 1, 256);
  config.text_dim = reader.Int({"text_dim"}, config.text_dim, 1, 65536);
  config.text_len = reader.Int({"text_len"}, config.text_len, 2, 8192);
  config.freq_dim = reader.Int({"freq_dim"}, config.freq_dim, 2, 65536);
  if (config.freq_dim % 2 != 0) reader.Fail("freq_dim", "is odd");
  config.cross_attn_norm = reader.Bool({"cross_attn_norm"}, true);
  config.qk_norm = ReadQkNorm(reader, object);
  config.eps = static_cast<float>(reader.Double({"eps"}, config.eps, 1e-12, 1e-1));
  config.rope_max_seq_len = reader.Int({"rope_max_seq_len"}, config.rope_max_seq_len, 1, 1 << 16);
  return config;
}

VaeConfig LoadVaeConfig(const std::string& path) {
  const json object = ReadJsonFile(path);
  const ConfigReader reader(object, path);
  reader.Require("_class_name", {"AutoencoderKLWan"});
  reader.Require("attn_scales", {json::array()});
  reader.Require("is_residual", {false});
  reader.Require("in_channels", {3});
  reader.Require("out_channels", {3});
  reader.RequireAbsent({"patch_size"}, "only the Wan2.1 VAE is supported");
  VaeConfig config;
  config.base_dim = reader.Int({"base_dim", "dim"}, config.base_dim, 1, 1024);
  config.z_dim = reader.Int({"z_dim"}, config.z_dim, 1, 256);
  config.dim_mult = reader.Ints("dim_mult", config.dim_mult, 1, 64);
  if (config.dim_mult.empty() || config.dim_mult.size() > 6) {
    reader.Fail("dim_mult", "needs one to six entries");
  }
  config.num_res_blocks = reader.Int({"num_res_blocks"}, config.num_res_blocks, 1, 16);
  config.temporal_downsample = reader.Bools("temperal_downsample", config.temporal_downsample);
  if (config.temporal_downsample.size() + 1 != config.dim_mult.size()) {
    reader.Fail("temperal_downsample", "needs one entry less than dim_mult");
  }
  const bool wan = config.z_dim == static_cast<int>(WanLatentsMean().size());
  config.latents_mean =
      reader.Floats("latents_mean", wan ? WanLatentsMean() : std::vector<float>{});
  config.latents_std = reader.Floats("latents_std", wan ? WanLatentsStd() : std::vector<float>{});
  const auto check = [&](const char* key, const std::vector<float>& values, bool positive) {
    if (static_cast<int>(values.size()) != config.z_dim) {
      reader.Fail(key, "needs z_dim = " + std::to_string(config.z_dim) + " entries");
    }
    for (float value : values) {
      if (!std::isfinite(value) || (positive && value <= 0)) reader.Fail(key, "is out of range");
    }
  };
  check("latents_mean", config.latents_mean, false);
  check("latents_std", config.latents_std, true);
  return config;
}

TextEncoderConfig LoadTextEncoderConfig(const std::string& path) {
  const json object = ReadJsonFile(path);
  const ConfigReader reader(object, path);
  reader.Require("model_type", {"umt5"});
  reader.Require("feed_forward_proj", {"gated-gelu"});
  reader.Require("dense_act_fn", {"gelu_new"});
  reader.Require("is_gated_act", {true});
  TextEncoderConfig config;
  config.vocab_size = reader.Int({"vocab_size"}, config.vocab_size, 4, 1 << 24);
  config.d_model = reader.Int({"d_model"}, config.d_model, 1, 65536);
  config.d_kv = reader.Int({"d_kv"}, config.d_kv, 8, 256);
  if (config.d_kv % 8 != 0) reader.Fail("d_kv", "is not a multiple of 8");
  config.num_heads = reader.Int({"num_heads"}, config.num_heads, 1, 256);
  config.d_ff = reader.Int({"d_ff"}, config.d_ff, 1, 1 << 18);
  config.num_layers = reader.Int({"num_layers"}, config.num_layers, 1, 256);
  config.relative_attention_num_buckets =
      reader.Int({"relative_attention_num_buckets"}, 32, 4, 4096);
  if (config.relative_attention_num_buckets % 4 != 0) {
    reader.Fail("relative_attention_num_buckets", "is not a multiple of 4");
  }
  config.relative_attention_max_distance =
      reader.Int({"relative_attention_max_distance"}, 128,
                 config.relative_attention_num_buckets / 4 + 1, 1 << 20);
  config.layer_norm_epsilon = static_cast<float>(
      reader.Double({"layer_norm_epsilon"}, config.layer_norm_epsilon, 1e-12, 1e-1));
  return config;
}

SamplerConfig LoadSamplerConfig(const std::string& path) {
  const json object = ReadJsonFile(path);
  const ConfigReader reader(object, path);
  reader.Require("_class_name", {"UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"});
  reader.Require("prediction_type", {"flow_prediction"});
  reader.Require("use_flow_sigmas", {true});
  reader.Require("predict_x0", {true});
  reader.Require("solver_order", {2});
  reader.Require("solver_type", {"bh2"});
  reader.Require("use_dynamic_shifting", {false});
  reader.Require("num_train_timesteps", {1000});
  SamplerConfig config;
  if (reader.String({"_class_name"}, "") == "FlowMatchEulerDiscreteScheduler") {
    config.kind = SamplerKind::kEuler;
  }
  config.flow_shift = reader.Double({"flow_shift", "shift"}, config.flow_shift, 0.01, 100);
  return config;
}

ModelConfig LoadModelConfig(const std::string& folder) {
  const fs::path root(folder);
  std::error_code ignored;
  if (!fs::is_directory(root, ignored)) {
    throw Error(ErrorCode::kNotFound, folder + ": no such model folder");
  }
  const fs::path index = root / "model_index.json";
  if (fs::exists(index, ignored)) {
    const json object = ReadJsonFile(index.string());
    ConfigReader(object, index.string()).Require("_class_name", {"WanPipeline"});
  }
  ModelConfig model;
  model.folder = folder;
  model.transformer = LoadTransformerConfig((root / "transformer" / "config.json").string());
  model.vae = LoadVaeConfig((root / "vae" / "config.json").string());
  model.text_encoder = LoadTextEncoderConfig((root / "text_encoder" / "config.json").string());
  model.sampler = LoadSamplerConfig((root / "scheduler" / "scheduler_config.json").string());
  CheckTogether(model);
  // "models/demo/" has no file name; canonical() also resolves "." and "..".
  model.name = fs::weakly_canonical(root, ignored).filename().string();
  if (model.name.empty()) model.name = "model";
  ReadOwnConfig((root / "slalom.json").string(), model);
  return model;
}

}  // namespace slalom
