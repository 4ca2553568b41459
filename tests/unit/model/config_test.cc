#include "model/config.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <initializer_list>
#include <string>

#include "tests/unit/model/expect_error.h"
#include "tests/unit/model/temp_folder.h"

namespace slalom {
namespace {

// What the published Wan2.1-T2V-1.3B-Diffusers folder holds, in the words of its keys.
constexpr char kTransformer[] = R"({
  "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0.dev0",
  "added_kv_proj_dim": null, "attention_head_dim": 128, "cross_attn_norm": true, "eps": 1e-06,
  "ffn_dim": 8960, "freq_dim": 256, "image_dim": null, "in_channels": 16,
  "num_attention_heads": 12, "num_layers": 30, "out_channels": 16, "patch_size": [1, 2, 2],
  "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": 4096})";
constexpr char kVae[] = R"({
  "_class_name": "AutoencoderKLWan", "attn_scales": [], "base_dim": 96, "dim_mult": [1, 2, 4, 4],
  "dropout": 0.0, "num_res_blocks": 2, "temperal_downsample": [false, true, true], "z_dim": 16})";
constexpr char kTextEncoder[] = R"({
  "architectures": ["UMT5EncoderModel"], "d_ff": 10240, "d_kv": 64, "d_model": 4096,
  "dense_act_fn": "gelu_new", "feed_forward_proj": "gated-gelu", "is_gated_act": true,
  "layer_norm_epsilon": 1e-06, "model_type": "umt5", "num_heads": 64, "num_layers": 24,
  "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
  "vocab_size": 256384})";
constexpr char kScheduler[] = R"({
  "_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "num_train_timesteps": 1000,
  "predict_x0": true, "prediction_type": "flow_prediction", "solver_order": 2,
  "solver_type": "bh2", "use_flow_sigmas": true})";

class ModelConfigTest : public testing::Test {
 protected:
  ModelConfigTest() {
    folder_.Write("wan/model_index.json", R"({"_class_name": "WanPipeline"})");
    folder_.Write("wan/transformer/config.json", kTransformer);
    folder_.Write("wan/vae/config.json", kVae);
    folder_.Write("wan/text_encoder/config.json", kTextEncoder);
    folder_.Write("wan/scheduler/scheduler_config.json", kScheduler);
  }
  ModelConfig Load() const { return LoadModelConfig(folder_ / "wan"); }

  // Writes the text and expects an INVALID_ARGUMENT that names the file and these words.
  void ExpectInvalid(const std::string& file, const std::string& text,
                     std::initializer_list<std::string> words) const {
    SCOPED_TRACE(text);
    const std::string path = folder_.Write("wan/" + file, text);
    ExpectError(ErrorCode::kInvalidArgument, words, [&] { Load(); });
    ExpectError(ErrorCode::kInvalidArgument, {path.substr(path.rfind("wan/"))}, [&] { Load(); });
  }

  TempFolder folder_;
};

TEST_F(ModelConfigTest, ReadsThePublishedFolder) {
  const ModelConfig model = Load();
  EXPECT_EQ(model.name, "wan");
  EXPECT_EQ(model.transformer.dim(), 1536);
  EXPECT_EQ(model.transformer.num_layers, 30);
  EXPECT_EQ(model.transformer.ffn_dim, 8960);
  EXPECT_TRUE(model.transformer.qk_norm);
  EXPECT_EQ(model.vae.spatial_scale(), 8);
  EXPECT_EQ(model.vae.temporal_scale(), 4);
  ASSERT_EQ(model.vae.latents_mean.size(), 16u);
  EXPECT_FLOAT_EQ(model.vae.latents_mean[15], -0.2921f);
  EXPECT_FLOAT_EQ(model.vae.latents_std[0], 2.8184f);
  EXPECT_EQ(model.text_encoder.num_layers, 24);
  EXPECT_EQ(model.sampler.kind, SamplerKind::kUniPc);
  EXPECT_EQ(model.defaults.width, 832);
  EXPECT_EQ(model.defaults.height, 480);
  EXPECT_EQ(model.defaults.num_frames, 81);
  EXPECT_EQ(model.defaults.fps, 16);
  EXPECT_EQ(model.defaults.steps, 50);
  EXPECT_EQ(model.defaults.guidance_scale, 5.0);
  EXPECT_EQ(model.defaults.flow_shift, 3.0);
  EXPECT_EQ(model.defaults.attention, std::nullopt);
}

TEST_F(ModelConfigTest, AbsentKeysHaveWansValues) {
  for (const char* file : {"transformer/config.json", "vae/config.json", "text_encoder/config.json",
                           "scheduler/scheduler_config.json"}) {
    folder_.Write(std::string("wan/") + file, "{}");
  }
  const ModelConfig model = Load();
  EXPECT_EQ(model.transformer.dim(), 1536);
  EXPECT_EQ(model.vae.dim_mult, (std::vector<int>{1, 2, 4, 4}));
  EXPECT_EQ(model.text_encoder.vocab_size, 256384);
  EXPECT_EQ(model.sampler.flow_shift, 3.0);
}

TEST_F(ModelConfigTest, ReadsTheOriginalKeyNames) {
  folder_.Write("wan/transformer/config.json",
                R"({"_class_name": "WanModel", "model_type": "t2v", "dim": 5120, "num_heads": 40,
                    "ffn_dim": 13824, "freq_dim": 256, "in_dim": 16, "out_dim": 16,
                    "num_layers": 40, "text_len": 512, "eps": 1e-06})");
  const TransformerConfig config = Load().transformer;
  EXPECT_EQ(config.num_attention_heads, 40);
  EXPECT_EQ(config.attention_head_dim, 128);
  EXPECT_EQ(config.dim(), 5120);
  EXPECT_EQ(config.num_layers, 40);
}

TEST_F(ModelConfigTest, ReadsOurOwnFile) {
  folder_.Write("wan/slalom.json", R"({"name": "demo",
    "defaults": {"width": 256, "height": 128, "num_frames": 33, "fps": 12, "steps": 8,
                 "guidance_scale": 1.5, "flow_shift": 2.5, "sampler": "euler",
                 "attention": "salad"},
    "limits": {"max_width": 512, "max_height": 256, "max_frames": 49, "max_pixels": 4000000,
               "max_steps": 20, "max_prompt_bytes": 500}})");
  const ModelConfig model = Load();
  EXPECT_EQ(model.name, "demo");
  EXPECT_EQ(model.defaults.width, 256);
  EXPECT_EQ(model.defaults.height, 128);
  EXPECT_EQ(model.defaults.num_frames, 33);
  EXPECT_EQ(model.defaults.fps, 12);
  EXPECT_EQ(model.defaults.steps, 8);
  EXPECT_EQ(model.defaults.guidance_scale, 1.5);
  EXPECT_EQ(model.defaults.flow_shift, 2.5);
  EXPECT_EQ(model.defaults.sampler, SamplerKind::kEuler);
  EXPECT_EQ(model.defaults.attention, AttentionKind::kSalad);
  EXPECT_EQ(model.limits.max_width, 512);
  EXPECT_EQ(model.limits.max_height, 256);
  EXPECT_EQ(model.limits.max_frames, 49);
  EXPECT_EQ(model.limits.max_pixels, 4000000);
  EXPECT_EQ(model.limits.max_steps, 20);
  EXPECT_EQ(model.limits.max_prompt_bytes, 500);
}

TEST_F(ModelConfigTest, DefaultsFollowTheLimitsAndTheSampler) {
  folder_.Write("wan/slalom.json",
                R"({"limits": {"max_width": 100, "max_height": 64, "max_frames": 8,
                               "max_steps": 10}})");
  folder_.Write("wan/scheduler/scheduler_config.json",
                R"({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0})");
  const ModelConfig model = Load();
  EXPECT_EQ(model.defaults.width, 96);
  EXPECT_EQ(model.defaults.height, 64);
  EXPECT_EQ(model.defaults.num_frames, 5);
  EXPECT_EQ(model.defaults.steps, 10);
  EXPECT_EQ(model.defaults.flow_shift, 7.0);
  EXPECT_EQ(model.defaults.sampler, SamplerKind::kEuler);
}

TEST_F(ModelConfigTest, TransformerErrors) {
  const std::string file = "transformer/config.json";
  ExpectInvalid(file, R"({"num_layers": 0})", {"num_layers", "0", "1 to"});
  ExpectInvalid(file, R"({"num_layers": -1})", {"num_layers", "-1"});
  ExpectInvalid(file, R"({"num_layers": 1e300})", {"num_layers"});
  ExpectInvalid(file, R"({"num_layers": 18446744073709551615})", {"18446744073709551615"});
  ExpectInvalid(file, R"({"num_layers": "30"})", {"num_layers", "\"30\""});
  ExpectInvalid(file, R"({"num_layers": 2.5})", {"2.5"});
  ExpectInvalid(file, R"({"num_attention_heads": []})", {"num_attention_heads"});
  ExpectInvalid(file, R"({"attention_head_dim": 12})", {"attention_head_dim", "12"});
  ExpectInvalid(file, R"({"dim": 100, "num_heads": 12})", {"dim", "100"});
  ExpectInvalid(file, R"({"patch_size": [2, 2, 2]})", {"patch_size", "[1,2,2]"});
  ExpectInvalid(file, R"({"patch_size": 2})", {"patch_size"});
  ExpectInvalid(file, R"({"image_dim": 1280})", {"image_dim", "1280"});
  ExpectInvalid(file, R"({"model_type": "i2v"})", {"model_type", "i2v"});
  ExpectInvalid(file, R"({"_class_name": "FluxTransformer2DModel"})", {"FluxTransformer2DModel"});
  ExpectInvalid(file, R"({"qk_norm": "layer_norm"})", {"qk_norm", "layer_norm"});
  ExpectInvalid(file, R"({"cross_attn_norm": 1})", {"cross_attn_norm"});
  ExpectInvalid(file, R"({"eps": 0})", {"eps"});
  ExpectInvalid(file, R"({"eps": "small"})", {"eps", "small"});
  ExpectInvalid(file, R"({"freq_dim": 255})", {"freq_dim"});
}

TEST_F(ModelConfigTest, VaeErrors) {
  const std::string file = "vae/config.json";
  ExpectInvalid(file, R"({"_class_name": "AutoencoderKL"})", {"AutoencoderKL"});
  ExpectInvalid(file, R"({"dim_mult": []})", {"dim_mult"});
  ExpectInvalid(file, R"({"dim_mult": [1, 2, "4", 4]})", {"dim_mult"});
  ExpectInvalid(file, R"({"dim_mult": [1, 2, 4]})", {"temperal_downsample"});
  ExpectInvalid(file, R"({"temperal_downsample": [0, 1, 1]})", {"temperal_downsample"});
  ExpectInvalid(file, R"({"attn_scales": [1.0]})", {"attn_scales"});
  ExpectInvalid(file, R"({"is_residual": true})", {"is_residual"});
  ExpectInvalid(file, R"({"patch_size": 2})", {"patch_size"});
  ExpectInvalid(file, R"({"z_dim": 48})", {"latents_mean", "48"});
  ExpectInvalid(file, R"({"latents_mean": [0.5]})", {"latents_mean", "16"});
  ExpectInvalid(file, R"({"latents_std": [0,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]})", {"latents_std"});
  ExpectInvalid(file, R"({"latents_std": [1e99,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]})", {"latents_std"});
}

TEST_F(ModelConfigTest, TextEncoderErrors) {
  const std::string file = "text_encoder/config.json";
  ExpectInvalid(file, R"({"model_type": "t5"})", {"model_type", "umt5"});
  ExpectInvalid(file, R"({"feed_forward_proj": "relu"})", {"feed_forward_proj"});
  ExpectInvalid(file, R"({"relative_attention_num_buckets": 30})", {"buckets", "4"});
  ExpectInvalid(file, R"({"relative_attention_max_distance": 8})", {"max_distance", "8"});
  ExpectInvalid(file, R"({"vocab_size": 0})", {"vocab_size"});
}

TEST_F(ModelConfigTest, SchedulerErrors) {
  const std::string file = "scheduler/scheduler_config.json";
  ExpectInvalid(file, R"({"_class_name": "DDIMScheduler"})", {"DDIMScheduler"});
  ExpectInvalid(file, R"({"prediction_type": "epsilon"})", {"prediction_type", "epsilon"});
  ExpectInvalid(file, R"({"solver_order": 3})", {"solver_order"});
  ExpectInvalid(file, R"({"flow_shift": 0})", {"flow_shift"});
  ExpectInvalid(file, R"({"num_train_timesteps": 100})", {"num_train_timesteps"});
}

TEST_F(ModelConfigTest, OwnFileErrors) {
  const std::string file = "slalom.json";
  ExpectInvalid(file, R"({"nmae": "x"})", {"'nmae'"});
  ExpectInvalid(file, R"({"name": ""})", {"name"});
  ExpectInvalid(file, R"({"defaults": 1})", {"defaults"});
  ExpectInvalid(file, R"({"defaults": {"witdh": 16}})", {"'witdh'"});
  ExpectInvalid(file, R"({"defaults": {"width": 250}})", {"width", "250", "16"});
  ExpectInvalid(file, R"({"defaults": {"width": 1296}})", {"width", "1296", "1280"});
  ExpectInvalid(file, R"({"defaults": {"num_frames": 32}})", {"num_frames", "4n + 1"});
  ExpectInvalid(file, R"({"defaults": {"sampler": "ddim"}})", {"sampler", "ddim", "unipc"});
  ExpectInvalid(file, R"({"defaults": {"guidance_scale": -1}})", {"guidance_scale"});
  ExpectInvalid(file, R"({"limits": {"max_steps": 0}})", {"max_steps"});
  ExpectInvalid(file, R"({"limits": {"max_pixels": 1000}})", {"max_pixels", "1000"});
}

TEST_F(ModelConfigTest, NetworksThatDoNotFitTogether) {
  folder_.Write("wan/transformer/config.json", R"({"text_dim": 512})");
  ExpectError(ErrorCode::kInvalidArgument, {"text_dim", "512", "4096"}, [&] { Load(); });
  folder_.Write("wan/transformer/config.json", R"({"in_channels": 32})");
  ExpectError(ErrorCode::kInvalidArgument, {"in_channels", "32", "16"}, [&] { Load(); });
}

TEST_F(ModelConfigTest, MissingAndDamagedFiles) {
  ExpectError(ErrorCode::kNotFound, {"no such model folder"},
              [&] { LoadModelConfig(folder_ / "gone"); });
  folder_.Write("wan/model_index.json", R"({"_class_name": "FluxPipeline"})");
  ExpectError(ErrorCode::kInvalidArgument, {"model_index.json", "FluxPipeline"}, [&] { Load(); });
  std::filesystem::remove(folder_ / "wan/model_index.json");
  Load();  // it may be absent
  for (const char* text : {"", "{", "[]", "nonsense", R"({"a": 1, "a": 2})"}) {
    folder_.Write("wan/vae/config.json", text);
    ExpectError(ErrorCode::kDataLoss, {"vae/config.json"}, [&] { Load(); });
  }
  std::filesystem::remove(folder_ / "wan/vae/config.json");
  ExpectError(ErrorCode::kNotFound, {"vae/config.json"}, [&] { Load(); });
}

}  // namespace
}  // namespace slalom
