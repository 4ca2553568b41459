// What a model folder says about itself: the JSON files of the diffusers layout as checked structs.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "model/pipeline.h"

namespace slalom {

// transformer/config.json. Defaults are those of Wan2.1-T2V-1.3B; the original Wan key names are
// read as well (dim, num_heads, in_dim, out_dim, ...).
struct TransformerConfig {
  int num_attention_heads = 12;
  int attention_head_dim = 128;
  int num_layers = 30;
  int ffn_dim = 8960;
  int in_channels = 16;
  int out_channels = 16;
  int text_dim = 4096;
  int text_len = 512;
  int freq_dim = 256;
  std::array<int, 3> patch_size = {1, 2, 2};
  bool cross_attn_norm = true;
  bool qk_norm = true;
  float eps = 1e-6f;
  int rope_max_seq_len = 1024;

  int dim() const { return num_attention_heads * attention_head_dim; }
};

// vae/config.json (AutoencoderKLWan, Wan2.1).
struct VaeConfig {
  int base_dim = 96;
  int z_dim = 16;
  std::vector<int> dim_mult = {1, 2, 4, 4};
  int num_res_blocks = 2;
  std::vector<bool> temporal_downsample = {false, true, true};  // on disk: temperal_downsample
  std::vector<float> latents_mean;                              // [z_dim]
  std::vector<float> latents_std;                               // [z_dim]

  // Pixels per latent position, in space and in time: 8 and 4 for Wan2.1.
  int spatial_scale() const { return 1 << (dim_mult.size() - 1); }
  int temporal_scale() const;
};

// text_encoder/config.json (UMT5EncoderModel).
struct TextEncoderConfig {
  int vocab_size = 256384;
  int d_model = 4096;
  int d_kv = 64;
  int num_heads = 64;
  int d_ff = 10240;
  int num_layers = 24;
  int relative_attention_num_buckets = 32;
  int relative_attention_max_distance = 128;
  float layer_norm_epsilon = 1e-6f;
};

// scheduler/scheduler_config.json: what diffusers calls a scheduler is our sampler.
struct SamplerConfig {
  SamplerKind kind = SamplerKind::kUniPc;
  double flow_shift = 3.0;
  int num_train_timesteps = 1000;
};

// slalom.json, "defaults": what a request gets for the fields that it leaves unset.
struct ClipDefaults {
  int width = 832;
  int height = 480;
  int num_frames = 81;
  int fps = 16;
  int steps = 50;
  double guidance_scale = 5.0;
  double flow_shift = 3.0;  // else the sampler config's
  SamplerKind sampler = SamplerKind::kUniPc;
  std::optional<AttentionKind> attention;  // else the first that has a trained adapter, else dense
};

// slalom.json, "limits".
struct ClipLimits {
  int max_width = 1280;
  int max_height = 1280;
  int max_frames = 161;
  std::int64_t max_pixels = std::int64_t{1280} * 720 * 81;  // width * height * frames
  int max_steps = 100;
  int max_prompt_bytes = 8192;
};

struct ModelConfig {
  std::string folder;
  std::string name;  // slalom.json's, else the folder's last component
  TransformerConfig transformer;
  VaeConfig vae;
  TextEncoderConfig text_encoder;
  SamplerConfig sampler;
  ClipDefaults defaults;
  ClipLimits limits;
};

// Reads <folder>/{model_index,slalom}.json (both optional) and <folder>/{transformer,vae,
// text_encoder}/config.json, scheduler/scheduler_config.json. Throws Error: kNotFound when the
// folder or a config is not there, kDataLoss when a file is not JSON, kInvalidArgument when a value
// has the wrong type, is out of range or asks for something that Wan2.1 text-to-video lacks. The
// message names the file and the key.
ModelConfig LoadModelConfig(const std::string& folder);

// The single files; the same errors.
TransformerConfig LoadTransformerConfig(const std::string& path);
VaeConfig LoadVaeConfig(const std::string& path);
TextEncoderConfig LoadTextEncoderConfig(const std::string& path);
SamplerConfig LoadSamplerConfig(const std::string& path);

// "unipc", "euler", "rcm".
const char* SamplerName(SamplerKind kind);

}  // namespace slalom
