// The whole pipeline on a tiny random model: prompt in, frames out.
#include "model/pipeline.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/core/error.h"
#include "kernels/core/random.h"
#include "model/config.h"
#include "model/safetensors_writer.h"
#include "model/wan_generation.h"
#include "tests/unit/model/expect_error.h"
#include "tests/unit/model/temp_folder.h"
#include "tests/unit/model/tiny_model.h"

namespace slalom {
namespace {

class PipelineTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new TempFolder();
    WriteTinyModel(folder_->path());
    PipelineOptions options;
    options.dtype = "f32";
    pipeline_ = LoadPipeline(folder_->path(), options).release();
  }
  static void TearDownTestSuite() {
    delete pipeline_;
    delete folder_;
  }

  static ClipRequest Request(const std::string& prompt, std::uint64_t seed) {
    ClipRequest request;
    request.prompt = prompt;
    request.seed = seed;
    return request;
  }

  static std::unique_ptr<Generation> Begin(const ClipRequest& request) {
    return pipeline_->Begin(pipeline_->Resolve(request));
  }

  static void Step(std::vector<Generation*> batch) {
    const auto failures = pipeline_->DenoiseStep(batch);
    for (const auto& failure : failures) ADD_FAILURE() << failure.message;
  }

  // The latent's bytes, on the CPU.
  static std::vector<float> Latent(const Generation& generation) {
    const Tensor& latent = dynamic_cast<const WanGeneration&>(generation).latent;
    return {latent.data<float>(), latent.data<float>() + latent.NumElements()};
  }

  // All frames, decoded.
  static std::vector<std::uint8_t> Decode(Generation& generation) {
    std::vector<std::uint8_t> bytes;
    int next = 0;
    while (!generation.decoded()) {
      const FrameBatch batch = pipeline_->DecodeNext(generation);
      EXPECT_EQ(batch.first_frame, next);
      EXPECT_GT(batch.num_frames(), 0);
      next += batch.num_frames();
      const auto* pixels = batch.pixels.data<std::uint8_t>();
      bytes.insert(bytes.end(), pixels, pixels + batch.pixels.NumElements());
    }
    EXPECT_EQ(next, generation.spec().num_frames);
    EXPECT_EQ(pipeline_->DecodeNext(generation).num_frames(), 0);
    return bytes;
  }

  static std::vector<std::uint8_t> Generate(const ClipRequest& request) {
    const auto clip = Begin(request);
    while (!clip->denoised()) Step({clip.get()});
    return Decode(*clip);
  }

  static TempFolder* folder_;
  static Pipeline* pipeline_;
};
TempFolder* PipelineTest::folder_ = nullptr;
Pipeline* PipelineTest::pipeline_ = nullptr;

TEST_F(PipelineTest, MakesEveryFrame) {
  ClipRequest request = Request("a red ball", 1);
  request.num_frames = 9;
  request.width = 48;
  const std::vector<std::uint8_t> frames = Generate(request);
  ASSERT_EQ(frames.size(), std::size_t{9 * 32 * 48 * 3});
  // Random weights: not a flat image.
  const auto [least, most] = std::ranges::minmax(frames);
  EXPECT_GT(most - least, 50);
}

TEST_F(PipelineTest, SeedAndPromptDecide) {
  const auto first = Generate(Request("a red ball", 7));
  EXPECT_EQ(first, Generate(Request("a red ball", 7)));
  EXPECT_NE(first, Generate(Request("a red ball", 8)));
  EXPECT_NE(first, Generate(Request("a blue cube", 7)));
  ClipRequest negative = Request("a red ball", 7);
  negative.negative_prompt = "a green floor";
  EXPECT_NE(first, Generate(negative));
}

TEST_F(PipelineTest, GuidanceIsSkippedAtOne) {
  ClipRequest request = Request("a red ball", 7);
  request.guidance_scale = 1.0;
  const auto clip = Begin(request);
  EXPECT_EQ(dynamic_cast<WanGeneration&>(*clip).negative_text, nullptr);
  Step({clip.get()});
  request.guidance_scale = 0.0;
  const auto other = Begin(request);
  Step({other.get()});
  EXPECT_EQ(Latent(*clip), Latent(*other));
}

// A clip's result has the same bits whoever shares its batch, at whatever step they stand.
TEST_F(PipelineTest, BatchMatesDoNotMatter) {
  for (const AttentionKind kind :
       {AttentionKind::kDense, AttentionKind::kSla, AttentionKind::kSalad}) {
    ClipRequest request = Request("a red ball", 7);
    request.width = 128;
    request.height = 128;
    request.num_frames = 9;
    request.attention = kind;
    const auto alone = Begin(request);
    while (!alone->denoised()) Step({alone.get()});

    const auto shared = Begin(request);
    ClipRequest other = request;
    other.prompt = "blue";
    other.seed = 8;
    other.steps = 6;
    const auto mate = Begin(other);
    other.guidance_scale = 1.0;
    const auto unguided = Begin(other);
    Step({mate.get()});
    ASSERT_EQ(shared->batch_key(), mate->batch_key());
    Step({mate.get(), shared.get()});
    Step({unguided.get(), shared.get(), mate.get()});
    Step({shared.get(), unguided.get()});
    ASSERT_TRUE(shared->denoised());
    EXPECT_EQ(Latent(*alone), Latent(*shared)) << static_cast<int>(kind);
  }
}

TEST_F(PipelineTest, EverySamplerAndBothTypesRun) {
  for (const SamplerKind kind : pipeline_->info().samplers) {
    ClipRequest request = Request("a red ball", 3);
    request.sampler = kind;
    EXPECT_FALSE(Generate(request).empty());
  }
  PipelineOptions options;
  options.dtype = "bf16";
  const auto pipeline = LoadPipeline(folder_->path(), options);
  const auto clip = pipeline->Begin(pipeline->Resolve(Request("a red ball", 3)));
  while (!clip->denoised()) {
    Generation* one = clip.get();
    EXPECT_TRUE(pipeline->DenoiseStep({&one, 1}).empty());
  }
  // bf16 networks, f32 latents: near the f32 result, not equal to it.
  const auto reference = Begin(Request("a red ball", 3));
  while (!reference->denoised()) Step({reference.get()});
  const std::vector<float> a = Latent(*clip);
  const std::vector<float> b = Latent(*reference);
  double error = 0;
  double size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    error += std::pow(a[i] - b[i], 2);
    size += std::pow(b[i], 2);
  }
  EXPECT_GT(error, 0);
  EXPECT_LT(std::sqrt(error / size), 0.05);
}

TEST_F(PipelineTest, SparseAttentionIsMeasured) {
  for (const AttentionKind kind : {AttentionKind::kSla, AttentionKind::kSalad}) {
    ClipRequest request = Request("a red ball", 3);
    request.width = 128;
    request.height = 128;
    request.num_frames = 17;  // 5 x 8 x 8 tokens, 5 blocks of 64
    request.attention = kind;
    request.topk = 0.4;
    const auto clip = Begin(request);
    while (!clip->denoised()) Step({clip.get()});
    const ClipStatistics& statistics = clip->statistics();
    ASSERT_EQ(statistics.layer_sparsity.size(), 2u);
    for (const double sparsity : statistics.layer_sparsity) EXPECT_DOUBLE_EQ(sparsity, 0.6);
    EXPECT_DOUBLE_EQ(statistics.sparsity(), 0.6);
    ASSERT_EQ(statistics.layer_mass_kept.size(), 2u);
    for (const double mass : statistics.layer_mass_kept) {
      EXPECT_GT(mass, 0.2);
      EXPECT_LT(mass, 1.0);
    }
  }
}

// All key blocks critical: the untrained adapters come to dense attention.
TEST_F(PipelineTest, SparseWithEverythingKeptIsDense) {
  ClipRequest request = Request("a red ball", 3);
  request.width = 128;
  request.height = 128;
  const auto dense = Begin(request);
  while (!dense->denoised()) Step({dense.get()});
  request.topk = 1.0;
  for (const AttentionKind kind : {AttentionKind::kSla, AttentionKind::kSalad}) {
    request.attention = kind;
    const auto clip = Begin(request);
    while (!clip->denoised()) Step({clip.get()});
    const std::vector<float> a = Latent(*clip);
    const std::vector<float> b = Latent(*dense);
    float error = 0;
    for (std::size_t i = 0; i < a.size(); ++i) error = std::max(error, std::abs(a[i] - b[i]));
    EXPECT_LT(error, 1e-4f);
    EXPECT_EQ(clip->statistics().sparsity(), 0.0);
  }
}

// A folder with a trained SLA adapter: it is the default then, unless slalom.json says otherwise;
// it changes the clip by its linear branch and its LoRA, and dense attention is left as it was.
TEST_F(PipelineTest, ATrainedAdapterIsUsed) {
  TempFolder folder;
  WriteTinyModel(folder.path());
  const auto random = [](const Shape& shape, std::uint64_t stream) {
    Tensor tensor = Tensor::Host(shape, DType::kF32);
    FillNormal(3, stream, 0,
               {tensor.data<float>(), static_cast<std::size_t>(tensor.NumElements())});
    return tensor;
  };
  std::filesystem::create_directories(folder / "attention");
  const auto write = [&](const std::string& lora, std::int64_t in, std::int64_t out) {
    std::map<std::string, Tensor> tensors = {
        {"blocks.1.attn1.sla.proj_l.weight", random({32, 32}, 1)},
        {"blocks.1.attn1.sla.proj_l.bias", random({32}, 2)}};
    if (!lora.empty()) {
      tensors["blocks.0." + lora + ".lora_A.weight"] = random({4, in}, 3);
      tensors["blocks.0." + lora + ".lora_B.weight"] = random({out, 4}, 4);
    }
    WriteSafetensors(folder / "attention/sla.safetensors", tensors,
                     {{"slalom.attention",
                       R"({"kind": "sla", "topk": 0.5, "scope": "all", "dropped_layers": [0]})"}});
  };
  // The latent after one step, and the spec that made it.
  std::size_t held = 0;  // by the weights
  const auto run = [&](std::optional<AttentionKind> kind) {
    PipelineOptions options;
    options.dtype = "f32";
    const auto pipeline = LoadPipeline(folder.path(), options);
    held = pipeline->Memory().bytes_in_use;
    ClipRequest request = Request("a red ball", 3);
    request.width = 128;
    request.height = 128;
    request.attention = kind;
    const auto clip = pipeline->Begin(pipeline->Resolve(request));
    Generation* one = clip.get();
    EXPECT_TRUE(pipeline->DenoiseStep({&one, 1}).empty());
    return std::pair(Latent(*clip), clip->spec());
  };
  const auto untrained = run(AttentionKind::kSla).first;
  const auto dense = run(AttentionKind::kDense).first;
  EXPECT_EQ(run(std::nullopt).second.attention, AttentionKind::kDense);
  write(/*lora=*/"", 0, 0);
  const auto [trained, spec] = run(std::nullopt);
  EXPECT_EQ(spec.attention, AttentionKind::kSla);
  EXPECT_EQ(spec.topk, 0.5);
  EXPECT_NE(trained, untrained);
  const std::size_t shared = held;
  const TransformerConfig config = LoadModelConfig(folder.path()).transformer;
  const std::int64_t dim = config.dim();
  for (const char* lora :
       {"attn1.to_q", "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"}) {
    SCOPED_TRACE(lora);
    const std::string name = lora;
    write(name, name == "ffn.net.2" ? config.ffn_dim : dim,
          name == "ffn.net.0.proj" ? config.ffn_dim : dim);
    EXPECT_NE(run(AttentionKind::kSla).first, trained);
    EXPECT_EQ(run(AttentionKind::kDense).first, dense);
    // What the LoRA changes is there twice, all else once.
    const bool mlp = name.starts_with("ffn");
    EXPECT_EQ(held - shared, 4u * static_cast<std::size_t>(dim * (mlp ? config.ffn_dim : dim)));
  }
  std::ofstream(folder / "slalom.json") << R"({"defaults": {"attention": "dense"}})";
  EXPECT_EQ(run(std::nullopt).second.attention, AttentionKind::kDense);
}

// What each layer really kept is counted; a request's topk goes for all of them.
TEST_F(PipelineTest, LayersKeepTheirOwnShares) {
  TempFolder folder;
  WriteTinyModel(folder.path());
  std::filesystem::create_directories(folder / "attention");
  WriteSafetensors(folder / "attention/sla.safetensors", {},
                   {{"slalom.attention", R"({"kind": "sla", "topk": 0.5, "layer_topk": [0.25, 0.75],
                      "block_q": 16, "block_k": 16, "dropped_layers": [0, 1]})"}});
  PipelineOptions options;
  options.dtype = "f32";
  const auto pipeline = LoadPipeline(folder.path(), options);
  const auto layers = [&](std::optional<double> topk) {
    ClipRequest request = Request("a red ball", 3);
    request.width = request.height = 128;
    request.attention = AttentionKind::kSla;
    request.topk = topk;
    const auto clip = pipeline->Begin(pipeline->Resolve(request));
    Generation* one = clip.get();
    EXPECT_TRUE(pipeline->DenoiseStep({&one, 1}).empty());
    return clip->statistics().layer_sparsity;
  };
  const auto own = layers(std::nullopt);
  ASSERT_EQ(own.size(), 2u);
  EXPECT_NEAR(own[0], 0.75, 0.05);
  EXPECT_NEAR(own[1], 0.25, 0.05);
  const auto same = layers(0.25);
  EXPECT_NEAR(same[0], 0.75, 0.05);
  EXPECT_NEAR(same[1], 0.75, 0.05);
}

TEST_F(PipelineTest, StatisticsAndEstimates) {
  const ClipSpec spec = pipeline_->Resolve(Request("a clip that is measured", 3));
  const auto clip = pipeline_->Begin(spec);
  while (!clip->denoised()) Step({clip.get()});
  Decode(*clip);
  const ClipStatistics& statistics = clip->statistics();
  EXPECT_GT(statistics.tokenize_seconds, 0);
  EXPECT_GT(statistics.text_encode_seconds, 0);
  EXPECT_GT(statistics.denoise_seconds, 0);
  EXPECT_GT(statistics.decode_seconds, 0);
  EXPECT_GE(statistics.denoise_seconds, statistics.last_step_seconds);
  EXPECT_TRUE(statistics.layer_sparsity.empty());

  const ClipCost cost = pipeline_->Estimate(spec);
  EXPECT_GT(cost.begin_seconds, 0);
  EXPECT_GT(cost.step_seconds, 0);
  EXPECT_GT(cost.decode_seconds, 0);

  ClipSpec larger = spec;
  larger.width *= 2;
  const ClipCost more = pipeline_->Estimate(larger);
  EXPECT_GT(more.step_seconds, 1.9 * cost.step_seconds);
  EXPECT_GT(more.step_bytes, cost.step_bytes);
  EXPECT_GT(more.decode_bytes, cost.decode_bytes);
}

TEST_F(PipelineTest, AFailedClipIsNamedAndItsMatesGoOn) {
  const auto good = Begin(Request("a red ball", 1));
  const auto bad = Begin(Request("a red ball", 2));
  const auto alone = Begin(Request("a red ball", 1));
  dynamic_cast<WanGeneration&>(*bad).latent.data<float>()[5] =
      std::numeric_limits<float>::quiet_NaN();
  std::vector<Generation*> batch = {bad.get(), good.get()};
  const auto failures = pipeline_->DenoiseStep(batch);
  ASSERT_EQ(failures.size(), 1u);
  EXPECT_EQ(failures[0].generation, bad.get());
  EXPECT_NE(failures[0].message.find("step 1 of 3"), std::string::npos) << failures[0].message;
  EXPECT_NE(failures[0].message.find("block 0"), std::string::npos) << failures[0].message;
  Step({alone.get()});
  EXPECT_EQ(Latent(*good), Latent(*alone));
}

TEST_F(PipelineTest, PreviewIsASmallImage) {
  const auto clip = Begin(Request("a red ball", 1));
  Tensor image = pipeline_->Preview(*clip);
  EXPECT_EQ(image.shape(), (Shape{4, 8, 3}));
  Step({clip.get()});
  image = pipeline_->Preview(*clip);
  EXPECT_EQ(image.dtype(), DType::kU8);
  const auto* values = image.data<std::uint8_t>();
  const auto [least, most] = std::minmax_element(values, values + image.NumElements());
  EXPECT_GT(*most - *least, 10);
}

TEST_F(PipelineTest, DecodingFreesItsMemoryAndNeedsAFinishedClip) {
  const auto clip = Begin(Request("a red ball", 1));
  ExpectError(ErrorCode::kInternal, {"last step"}, [&] { pipeline_->DecodeNext(*clip); });
  while (!clip->denoised()) Step({clip.get()});
  EXPECT_EQ(dynamic_cast<WanGeneration&>(*clip).text, nullptr);
  Decode(*clip);
  EXPECT_TRUE(dynamic_cast<WanGeneration&>(*clip).decoder.fresh());
  std::vector<Generation*> batch = {clip.get()};
  ExpectError(ErrorCode::kInternal, {"stepped"}, [&] { pipeline_->DenoiseStep(batch); });
}

TEST_F(PipelineTest, LoadNamesWhatIsWrong) {
  ExpectError(ErrorCode::kNotFound, {"/nowhere"}, [] { LoadPipeline("/nowhere", {}); });
  PipelineOptions options;
  options.dtype = "int3";
  ExpectError(ErrorCode::kInvalidArgument, {"int3", "bf16"},
              [&] { LoadPipeline(folder_->path(), options); });
}

}  // namespace
}  // namespace slalom
