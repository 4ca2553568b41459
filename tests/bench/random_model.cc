#include "tests/bench/random_model.h"

#include <bit>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string_view>

#include "kernels/core/error.h"
#include "tests/bench/model_layout.h"
#include "tests/bench/random_shards.h"

namespace slalom {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

void WriteText(const fs::path& path, std::string_view text) {
  fs::create_directories(path.parent_path());
  std::ofstream stream(path, std::ios::binary);
  stream << text;
  if (!stream.flush()) throw Error(ErrorCode::kUnavailable, path.string() + ": cannot write");
}

void WriteJson(const fs::path& path, const json& object) { WriteText(path, object.dump(2) + "\n"); }

json ToJson(const TransformerConfig& config) {
  json object = {{"_class_name", "WanTransformer3DModel"},
                 {"added_kv_proj_dim", nullptr},
                 {"attention_head_dim", config.attention_head_dim},
                 {"cross_attn_norm", config.cross_attn_norm},
                 {"eps", 1e-6},
                 {"ffn_dim", config.ffn_dim},
                 {"freq_dim", config.freq_dim},
                 {"image_dim", nullptr},
                 {"in_channels", config.in_channels},
                 {"num_attention_heads", config.num_attention_heads},
                 {"num_layers", config.num_layers},
                 {"out_channels", config.out_channels},
                 {"patch_size", config.patch_size},
                 {"qk_norm", "rms_norm_across_heads"},
                 {"rope_max_seq_len", config.rope_max_seq_len},
                 {"text_dim", config.text_dim}};
  // Ours; diffusers warns about keys that it does not know.
  if (config.text_len != TransformerConfig{}.text_len) object["text_len"] = config.text_len;
  return object;
}

json ToJson(const TextEncoderConfig& config) {
  return {{"architectures", {"UMT5EncoderModel"}},
          {"d_ff", config.d_ff},
          {"d_kv", config.d_kv},
          {"d_model", config.d_model},
          {"dense_act_fn", "gelu_new"},
          {"dropout_rate", 0.0},
          {"eos_token_id", 1},
          {"feed_forward_proj", "gated-gelu"},
          {"is_encoder_decoder", true},
          {"is_gated_act", true},
          {"layer_norm_epsilon", 1e-6},
          {"model_type", "umt5"},
          {"num_heads", config.num_heads},
          {"num_layers", config.num_layers},
          {"pad_token_id", 0},
          {"relative_attention_max_distance", config.relative_attention_max_distance},
          {"relative_attention_num_buckets", config.relative_attention_num_buckets},
          {"scalable_attention", true},
          {"vocab_size", config.vocab_size}};
}

json ToJson(const VaeConfig& config) {
  json object = {{"_class_name", "AutoencoderKLWan"},
                 {"attn_scales", json::array()},
                 {"base_dim", config.base_dim},
                 {"dim_mult", config.dim_mult},
                 {"dropout", 0.0},
                 {"num_res_blocks", config.num_res_blocks},
                 {"temperal_downsample", config.temporal_downsample},
                 {"z_dim", config.z_dim}};
  // Left out, Wan2.1's own 16 means and deviations hold.
  if (!config.latents_mean.empty()) object["latents_mean"] = config.latents_mean;
  if (!config.latents_std.empty()) object["latents_std"] = config.latents_std;
  return object;
}

// --- a SentencePiece model: protocol buffers, written by hand ---

void AppendVarint(std::string& out, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(0x80 | (value & 0x7f));
  out += static_cast<char>(value);
}
void AppendNumber(std::string& out, int field, std::uint64_t value) {
  AppendVarint(out, static_cast<std::uint64_t>(field) << 3);
  AppendVarint(out, value);
}
void AppendBytes(std::string& out, int field, std::string_view bytes) {
  AppendVarint(out, static_cast<std::uint64_t>(field) << 3 | 2);
  AppendVarint(out, bytes.size());
  out += bytes;
}
void AppendFloat(std::string& out, int field, float value) {
  AppendVarint(out, static_cast<std::uint64_t>(field) << 3 | 5);
  const auto bits = std::bit_cast<std::uint32_t>(value);
  for (int shift = 0; shift < 32; shift += 8) out += static_cast<char>(bits >> shift & 0xff);
}

enum PieceType { kNormal = 1, kUnknown = 2, kControl = 3 };

void AppendPiece(std::string& model, std::string_view text, float score, PieceType type) {
  std::string piece;
  AppendBytes(piece, 1, text);
  AppendFloat(piece, 2, score);
  AppendNumber(piece, 3, type);
  AppendBytes(model, 1, piece);
}

// sentencepiece.ModelProto, UMT5's special ids in front of single characters.
std::string CharacterTokenizer() {
  std::string model;
  AppendPiece(model, "<pad>", 0, kControl);
  AppendPiece(model, "</s>", 0, kControl);
  AppendPiece(model, "<s>", 0, kControl);
  AppendPiece(model, "<unk>", 0, kUnknown);
  AppendPiece(model, "\u2581", -2, kNormal);  // stands for a space
  for (char c = '!'; c <= '~'; ++c) AppendPiece(model, std::string_view(&c, 1), -4, kNormal);
  std::string trainer;
  AppendNumber(trainer, 3, 1);   // model_type: unigram
  AppendNumber(trainer, 40, 3);  // unk_id
  AppendNumber(trainer, 41, 2);  // bos_id
  AppendNumber(trainer, 42, 1);  // eos_id
  AppendNumber(trainer, 43, 0);  // pad_id
  AppendBytes(model, 2, trainer);
  return model;
}

void WriteSmallFiles(const fs::path& root, const RandomModelOptions& options) {
  WriteJson(root / "model_index.json", {{"_class_name", "WanPipeline"},
                                        {"_diffusers_version", "0.33.0"},
                                        {"scheduler", {"diffusers", "UniPCMultistepScheduler"}},
                                        {"text_encoder", {"transformers", "UMT5EncoderModel"}},
                                        {"tokenizer", {"transformers", "T5TokenizerFast"}},
                                        {"transformer", {"diffusers", "WanTransformer3DModel"}},
                                        {"vae", {"diffusers", "AutoencoderKLWan"}}});
  WriteJson(root / "scheduler" / "scheduler_config.json",
            {{"_class_name", "UniPCMultistepScheduler"},
             {"flow_shift", options.flow_shift},
             {"num_train_timesteps", 1000},
             {"predict_x0", true},
             {"prediction_type", "flow_prediction"},
             {"solver_order", 2},
             {"solver_type", "bh2"},
             {"use_flow_sigmas", true}});
  WriteText(root / "tokenizer" / "spiece.model", CharacterTokenizer());
  WriteJson(root / "transformer" / "config.json", ToJson(options.transformer));
  WriteJson(root / "text_encoder" / "config.json", ToJson(options.text_encoder));
  WriteJson(root / "vae" / "config.json", ToJson(options.vae));
}

// A stale single file would hide new shards.
void RemoveWeights(const fs::path& folder) {
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().filename().string().find(".safetensors") != std::string::npos) {
      fs::remove(entry.path());
    }
  }
}

}  // namespace

TransformerConfig PublishedTransformer(const std::string& size) {
  TransformerConfig config;
  if (size == "1.3b") return config;
  if (size != "14b") {
    throw Error(ErrorCode::kInvalidArgument, "size: is " + size + ", must be 1.3b or 14b");
  }
  config.num_attention_heads = 40;
  config.num_layers = 40;
  config.ffn_dim = 13824;
  return config;
}

void WriteRandomModel(const std::string& folder, const RandomModelOptions& options) {
  const fs::path root(folder);
  WriteSmallFiles(root, options);
  const auto write = [&](const char* name, const char* stem, const NetworkLayout& layout,
                         DType dtype) {
    RemoveWeights(root / name);
    WriteRandomShards((root / name).string(), stem, layout,
                      {.dtype = dtype,
                       .seed = options.seed,
                       .shard_bytes = options.shard_bytes,
                       .threads = options.threads});
  };
  constexpr char kDiffusersStem[] = "diffusion_pytorch_model";
  if (options.write_transformer) {
    write("transformer", kDiffusersStem, TransformerLayout(options.transformer),
          options.transformer_dtype);
  }
  if (options.write_text_encoder) {
    write("text_encoder", "model", TextEncoderLayout(options.text_encoder),
          options.text_encoder_dtype);
  }
  if (options.write_vae) {
    write("vae", kDiffusersStem, VaeLayout(options.vae), options.vae_dtype);
  }
}

}  // namespace slalom
