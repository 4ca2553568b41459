// The writer of random models: its sizes are the published ones, and what it writes loads and runs.
#include "tests/bench/random_model.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>

#include "model/host_floats.h"
#include "model/pipeline.h"
#include "model/weights.h"
#include "tests/bench/model_layout.h"
#include "tests/bench/random_shards.h"
#include "tests/unit/model/temp_folder.h"

namespace slalom {
namespace {

namespace fs = std::filesystem;

std::int64_t Parameters(const NetworkLayout& layout) {
  std::int64_t sum = 0;
  for (const TensorSpec& spec : layout) sum += spec.shape.NumElements();
  return sum;
}

std::string Bytes(const fs::path& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

RandomModelOptions Small() {
  RandomModelOptions options;
  options.transformer = {.num_attention_heads = 2,
                         .attention_head_dim = 64,
                         .num_layers = 12,
                         .ffn_dim = 256,
                         .text_dim = 64};
  options.text_encoder = {
      .vocab_size = 512, .d_model = 64, .d_kv = 16, .num_heads = 4, .d_ff = 128, .num_layers = 12};
  options.vae.base_dim = 8;
  return options;
}

TEST(ModelLayout, PublishedSizes) {
  const NetworkLayout small = TransformerLayout(PublishedTransformer("1.3b"));
  EXPECT_EQ(small.size(), 825u);
  EXPECT_EQ(Parameters(small), 1'418'996'800);
  const NetworkLayout large = TransformerLayout(PublishedTransformer("14b"));
  EXPECT_EQ(large.size(), 1095u);
  EXPECT_EQ(Parameters(large), 14'288'491'584);
  const NetworkLayout text = TextEncoderLayout({});
  EXPECT_EQ(text.size(), 242u);
  EXPECT_EQ(Parameters(text), 5'680'910'336);
  // The published f32 file has 507,609,880 bytes, of which less than 0.1 MB are names.
  const std::int64_t vae = 4 * Parameters(VaeLayout({}));
  EXPECT_LT(vae, 507'609'880);
  EXPECT_GT(vae, 507'509'880);
}

TEST(RandomModel, LoadsAndMakesAFiniteClip) {
  TempFolder folder;
  WriteRandomModel(folder.path(), Small());
  PipelineOptions options;
  options.dtype = "f32";
  const auto pipeline = LoadPipeline(folder.path(), options);
  ClipRequest request;
  request.prompt = "a red ball";
  request.width = 64;
  request.height = 64;
  request.num_frames = 5;
  request.steps = 2;
  request.seed = 1;
  const auto clip = pipeline->Begin(pipeline->Resolve(request));
  const std::array<Generation*, 1> batch = {clip.get()};
  while (!clip->denoised()) ASSERT_TRUE(pipeline->DenoiseStep(batch).empty());
  // Through all layers a value keeps its size: the picture is neither flat nor all clipped.
  std::int64_t inside = 0;
  std::int64_t all = 0;
  for (FrameBatch frames = pipeline->DecodeNext(*clip); frames.num_frames() > 0;
       frames = pipeline->DecodeNext(*clip)) {
    const auto* pixels = frames.pixels.data<std::uint8_t>();
    for (std::int64_t i = 0; i < frames.pixels.NumElements(); ++i, ++all) {
      if (pixels[i] > 0 && pixels[i] < 255) ++inside;
    }
  }
  EXPECT_EQ(all, 5 * 64 * 64 * 3);
  EXPECT_GT(inside, all / 4);
}

TEST(RandomModel, ThreadsAndShardsChangeNoValue) {
  TempFolder folder;
  const NetworkLayout layout = {{"a.weight", {64, 1 << 15}, 0.5, 0.25},
                                {"b.weight", {7, 13}, 1.0, 0.0},
                                {"c.weight", {1 << 20}, 2.0, -1.0}};
  WriteRandomShards(folder / "one", "model", layout, {.threads = 1});
  WriteRandomShards(folder / "many", "model", layout, {.threads = 5});
  EXPECT_EQ(Bytes(folder / "one/model.safetensors"), Bytes(folder / "many/model.safetensors"));
  WriteRandomShards(folder / "shards", "model", layout, {.shard_bytes = 9 << 20, .threads = 3});
  EXPECT_TRUE(fs::exists(folder / "shards/model-00002-of-00002.safetensors"));

  const Weights one = Weights::Open(folder / "one", "model");
  const Weights shards = Weights::Open(folder / "shards", "model");
  for (const TensorSpec& spec : layout) {
    const std::vector<float> values = ToFloats(one.Get(spec.name));
    EXPECT_EQ(values, ToFloats(shards.Get(spec.name))) << spec.name;
    double sum = 0;
    double squares = 0;
    for (const float v : values) {
      sum += v;
      squares += double{v} * v;
    }
    const auto n = static_cast<double>(values.size());
    const double mean = sum / n;
    const double deviation = std::sqrt(squares / n - mean * mean);
    EXPECT_NEAR(mean, spec.mean, 5 * spec.deviation / std::sqrt(n)) << spec.name;
    EXPECT_NEAR(deviation, spec.deviation, 4 * spec.deviation / std::sqrt(n)) << spec.name;
  }
}

}  // namespace
}  // namespace slalom
