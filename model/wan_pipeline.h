// WanPipeline: the networks of one model on one device, behind the Pipeline contract.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "model/clip_cost.h"
#include "model/config.h"
#include "model/pipeline.h"
#include "model/preview.h"
#include "model/prompt_cache.h"
#include "model/text_encoder.h"
#include "model/tokenizer.h"
#include "model/transformer.h"
#include "model/video_decoder.h"
#include "model/wan_generation.h"

namespace slalom {

// Everything that is loaded from a model folder.
struct WanModel {
  ModelConfig config;
  DType dtype = DType::kF32;
  std::int64_t parameters = 0;
  std::unique_ptr<Backend> backend;
  // Declared after the backend: their memory goes back to it first.
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<TextEncoder> text_encoder;
  std::unique_ptr<Transformer> transformer;
  std::unique_ptr<VideoDecoder> decoder;
};

// Thread rules as in Pipeline: Resolve, Estimate and the descriptions from any thread, the rest
// from the device's one worker. What changes while it works are the rate meters (atomic) and the
// worker's own caches.
class WanPipeline : public Pipeline {
 public:
  // Measures the device for the first estimates and fits the preview: some device work.
  WanPipeline(WanModel model, const PipelineOptions& options);

  const ModelInfo& info() const override { return info_; }
  Device device() const override { return model_.backend->device(); }
  std::string device_description() const override { return description_; }
  MemoryStats Memory() const override { return model_.backend->Memory(); }
  CacheStats PromptCacheUse() const override { return prompt_cache_.stats(); }
  ClipSpec Resolve(const ClipRequest& request) const override;
  ClipCost Estimate(const ClipSpec& spec) const override;
  std::unique_ptr<Generation> Begin(const ClipSpec& spec) const override;
  std::vector<std::byte> Save(const Generation& generation) const override;
  std::unique_ptr<Generation> Restore(const ClipSpec& spec,
                                      std::span<const std::byte> checkpoint) const override;
  std::vector<StepFailure> DenoiseStep(std::span<Generation* const> batch) const override;
  int MaxBatch(const ClipSpec& spec) const override;
  FrameBatch DecodeNext(Generation& generation) const override;
  Tensor Preview(const Generation& generation) const override;

 private:
  using Clips = std::vector<WanGeneration*>;
  // One row of a transformer batch.
  struct Sample {
    Tensor latent;  // [C, F, h, w] f32
    float timestep = 0;
    const TextContext* text = nullptr;
  };
  // What is counted on the device during a step. It is read when all of the step is queued, and the
  // counters in one go: each reading waits for the device.
  struct Measurements {
    bool sparse = false;
    Tensor counters;  // i64: [layers, 2] pairs, then one for each clip's values that are not finite
    Tensor mass_kept;                               // [layers] f32
    std::vector<std::int64_t> non_finite;           // of each clip
    std::vector<WanGeneration::Pairs> layer_pairs;  // of all samples together; empty when dense
    std::vector<double> layer_mass;                 // of sample `mass_sample`; empty when not asked
    int mass_sample = -1;
  };
  using Observer = std::function<void(int layer, const Tensor& x)>;

  // A clip without its latent, and without what only steps need.
  std::unique_ptr<WanGeneration> MakeClip(const ClipSpec& spec) const;
  void PrepareDenoising(WanGeneration& clip) const;
  // The model's name and what else decides the bits of a step, for checkpoints.
  std::string Identity() const;
  Tensor Embed(const std::string& prompt, ClipStatistics& stats) const;  // [n, text_dim] T
  std::shared_ptr<const TextContext> EncodeText(const std::string& prompt,
                                                ClipStatistics& stats) const;
  std::shared_ptr<const RopeTables> Angles(const TokenGrid& grid, const TokenTile& tile) const;
  Tensor Noise(const WanGeneration& clip, std::uint64_t stream, float scale) const;
  // A clip's rows: its prompt's, then with guidance its negative prompt's.
  static void AppendSamples(const WanGeneration& clip, const Tensor& latent, float timestep,
                            std::vector<Sample>& samples);
  // The velocities [samples, C, F, h, w] f32. `lead` gives what all samples share.
  Tensor RunTransformer(const WanGeneration& lead, const std::vector<Sample>& samples,
                        Measurements* measurements, const Observer& observer) const;
  void Read(Measurements& measurements) const;
  void StepClip(const Tensor& velocities, int first_sample, WanGeneration& clip) const;
  void AddStatistics(const Measurements& measurements, int first_sample, double seconds,
                     double share, WanGeneration& clip) const;
  std::string FindNonFinite(const WanGeneration& clip, const Tensor& latent) const;
  Tensor DecodePiece(WanGeneration& clip) const;
  RateMeter& StepRate(AttentionKind kind) const;
  double StepFlops(const ClipSpec& spec) const;
  std::size_t BytesOfStep(const ClipSpec& spec) const;

  WanModel model_;
  ModelInfo info_;
  std::string description_;
  int max_batch_;
  PreviewMap preview_;
  std::size_t weight_bytes_ = 0;
  std::size_t device_bytes_ = 0;

  mutable RateMeter text_rate_;
  mutable std::array<RateMeter, 3> step_rates_;  // by AttentionKind
  mutable RateMeter decode_rate_;
  mutable PromptCache prompt_cache_;
  // The worker's: most clips share their negative prompt, and clips of one size their angles.
  mutable std::string cached_prompt_;
  mutable std::shared_ptr<const TextContext> cached_text_;
  mutable std::weak_ptr<const RopeTables> cached_angles_;
};

}  // namespace slalom
