// A clip that is saved and restored, in this pipeline or in another one, becomes the same video.
#include "model/checkpoint.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "model/pipeline.h"
#include "model/prompt_cache.h"
#include "tests/unit/model/expect_error.h"
#include "tests/unit/model/temp_folder.h"
#include "tests/unit/model/tiny_model.h"

namespace slalom {
namespace {

using Bytes = std::vector<std::byte>;

class CheckpointTest : public testing::Test {
 protected:
  void SetUp() override {
    WriteTinyModel(folder_.path());
    pipeline_ = Load();
  }

  std::unique_ptr<Pipeline> Load() const { return LoadPipeline(folder_.path(), {}); }

  ClipSpec Spec(SamplerKind sampler, AttentionKind attention, double guidance = 4.0) const {
    ClipRequest request;
    request.prompt = "a red ball";
    request.negative_prompt = "a green floor";
    request.seed = 7;
    request.steps = 5;
    request.sampler = sampler;
    request.attention = attention;
    request.guidance_scale = guidance;
    return pipeline_->Resolve(request);
  }

  static void Step(const Pipeline& pipeline, Generation& clip) {
    Generation* batch[] = {&clip};
    EXPECT_TRUE(pipeline.DenoiseStep(batch).empty());
  }

  static std::vector<std::uint8_t> Finish(const Pipeline& pipeline, Generation& clip) {
    while (!clip.denoised()) Step(pipeline, clip);
    std::vector<std::uint8_t> pixels;
    while (!clip.decoded()) {
      const FrameBatch frames = pipeline.DecodeNext(clip);
      const auto* data = frames.pixels.data<std::uint8_t>();
      pixels.insert(pixels.end(), data, data + frames.pixels.NumElements());
    }
    return pixels;
  }

  TempFolder folder_;
  std::unique_ptr<Pipeline> pipeline_;
};

TEST_F(CheckpointTest, GoesOnBitForBitAfterEveryStep) {
  const std::unique_ptr<Pipeline> other = Load();
  for (const SamplerKind sampler : {SamplerKind::kUniPc, SamplerKind::kEuler}) {
    for (const AttentionKind attention : {AttentionKind::kDense, AttentionKind::kSla}) {
      const ClipSpec spec = Spec(sampler, attention);
      const auto clip = pipeline_->Begin(spec);
      std::vector<Bytes> checkpoints = {pipeline_->Save(*clip)};
      while (!clip->denoised()) {
        Step(*pipeline_, *clip);
        checkpoints.push_back(pipeline_->Save(*clip));
      }
      const auto expected = Finish(*pipeline_, *clip);
      for (std::size_t step = 0; step < checkpoints.size(); ++step) {
        const auto restored = other->Restore(spec, checkpoints[step]);
        ASSERT_EQ(restored->step(), static_cast<int>(step));
        EXPECT_EQ(restored->batch_key(), clip->batch_key());
        EXPECT_EQ(Finish(*other, *restored), expected) << "from step " << step;
        EXPECT_EQ(restored->statistics().layer_sparsity, clip->statistics().layer_sparsity);
        EXPECT_EQ(restored->statistics().layer_mass_kept, clip->statistics().layer_mass_kept);
        EXPECT_GT(restored->statistics().denoise_seconds, 0);
      }
    }
  }
}

TEST_F(CheckpointTest, ADecodedClipCanBeSavedAndDecodedAnew) {
  const ClipSpec spec = Spec(SamplerKind::kUniPc, AttentionKind::kDense);
  const auto clip = pipeline_->Begin(spec);
  const auto expected = Finish(*pipeline_, *clip);
  const auto again = pipeline_->Restore(spec, pipeline_->Save(*clip));
  EXPECT_EQ(Finish(*pipeline_, *again), expected);
}

TEST_F(CheckpointTest, DamagedAndForeignBytesAreRefused) {
  const ClipSpec spec = Spec(SamplerKind::kUniPc, AttentionKind::kSla);
  const auto clip = pipeline_->Begin(spec);
  Step(*pipeline_, *clip);
  const Bytes good = pipeline_->Save(*clip);
  const auto refuses = [&](const ClipSpec& of, const Bytes& bytes) {
    ExpectError(ErrorCode::kDataLoss, {"checkpoint"}, [&] { pipeline_->Restore(of, bytes); });
  };
  for (std::size_t length = 0; length < good.size(); length += 1 + good.size() / 97) {
    refuses(spec, Bytes(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(length)));
  }
  for (std::size_t at = 0; at < good.size(); at += 1 + good.size() / 97) {
    Bytes flipped = good;
    flipped[at] ^= std::byte{4};
    refuses(spec, flipped);
  }
  ClipSpec other = spec;
  other.seed = 8;
  refuses(other, good);
  other = spec;
  other.prompt += "!";
  refuses(other, good);
}

TEST_F(CheckpointTest, PromptsAreEncodedOnceAndCounted) {
  const ClipSpec spec = Spec(SamplerKind::kUniPc, AttentionKind::kDense);
  const auto first = pipeline_->Begin(spec);
  const CacheStats before = pipeline_->PromptCacheUse();
  EXPECT_EQ(before.hits, 0);
  EXPECT_EQ(before.misses, 2) << "prompt and negative prompt";
  EXPECT_EQ(before.entries, 2u);
  ClipSpec same = spec;
  same.prompt = "  a red   ball ";  // the same once it is cleaned
  const auto second = pipeline_->Begin(same);
  const CacheStats after = pipeline_->PromptCacheUse();
  EXPECT_EQ(after.hits, 1);
  EXPECT_EQ(after.misses, 2);
  EXPECT_EQ(second->statistics().tokenize_seconds, 0);
  EXPECT_EQ(Finish(*pipeline_, *first), Finish(*pipeline_, *second));
}

TEST(PromptCacheTest, IsBoundedAndDropsTheLeastRecentlyUsed) {
  const auto tensor = [](float value) {
    return Tensor::FromFloats({4}, std::vector<float>(4, value));
  };
  PromptCache cache(3 * (1 + 16));
  for (const char* prompt : {"a", "b", "c"}) cache.Insert(prompt, tensor(1));
  EXPECT_TRUE(cache.Find("a").defined());
  cache.Insert("d", tensor(2));
  EXPECT_FALSE(cache.Find("b").defined());
  EXPECT_TRUE(cache.Find("a").defined());
  EXPECT_EQ(cache.Find("d").data<float>()[3], 2);
  EXPECT_EQ(cache.stats().entries, 3u);
  EXPECT_EQ(cache.stats().bytes, 3u * 17);
  EXPECT_EQ(cache.stats().hits, 3);
  EXPECT_EQ(cache.stats().misses, 1);
  cache.Insert(std::string(100, 'x'), tensor(3));
  EXPECT_EQ(cache.stats().entries, 3u) << "what cannot fit drives nothing out";
  PromptCache off(0);
  off.Insert("a", tensor(1));
  EXPECT_FALSE(off.Find("a").defined());
}

}  // namespace
}  // namespace slalom
