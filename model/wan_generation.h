// A clip in flight, as WanPipeline keeps it. Internal to the pipeline.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/core/tensor.h"
#include "model/clip_cost.h"
#include "model/pipeline.h"
#include "model/rope.h"
#include "model/sampler.h"
#include "model/transformer.h"
#include "model/video_decoder.h"

namespace slalom {

// Plain state: only the pipeline that made it changes it, on the worker's thread.
class WanGeneration : public Generation {
 public:
  const ClipSpec& spec() const override { return clip; }
  int step() const override { return sampler.step(); }
  bool decoded() const override { return denoised() && next_latent_frame == shape.frames; }
  const ClipStatistics& statistics() const override { return stats; }
  std::string batch_key() const override { return key; }

  // Gives back what only further steps would need.
  void ReleaseDenoising() {
    sampler.Release();
    text.reset();
    negative_text.reset();
    rope.reset();
  }

  ClipSpec clip;
  ClipShape shape;
  std::string key;
  ClipStatistics stats;

  // --- denoising ---
  Sampler sampler;
  Tensor latent;  // [C, F, h, w] f32
  std::shared_ptr<const TextContext> text;
  std::shared_ptr<const TextContext> negative_text;  // null without guidance
  std::shared_ptr<const RopeTables> rope;
  AttentionSetting attention;
  struct Pairs {
    std::int64_t critical = 0;
    std::int64_t all = 0;
  };
  std::vector<Pairs> layer_pairs;  // sparse attention: block pairs of all steps so far

  // --- decoding ---
  Tensor decoder_input;  // host [F, h, w, C] f32, from the first DecodeNext on
  DecoderState decoder;
  std::int64_t next_latent_frame = 0;
};

}  // namespace slalom
