// Pipeline: prompt in, frames out, in bounded pieces of device work. The contract between the model
// and whoever decides what runs when.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/backend.h"
#include "kernels/core/device.h"
#include "kernels/core/tensor.h"

namespace slalom {

enum class SamplerKind { kUniPc, kEuler, kRcm };

// What to make. Optional fields that are unset take the model's defaults in Pipeline::Resolve.
struct ClipRequest {
  std::string prompt;
  std::string negative_prompt;
  std::optional<int> width;       // pixels
  std::optional<int> height;      // pixels
  std::optional<int> num_frames;  // 4n + 1
  std::optional<int> fps;
  std::optional<int> steps;
  std::optional<double> guidance_scale;
  std::optional<double> flow_shift;
  std::optional<std::uint64_t> seed;
  std::optional<SamplerKind> sampler;
  std::optional<AttentionKind> attention;
  std::optional<double> topk;  // overrides the adapter's
};

// The same with every field decided and checked.
struct ClipSpec {
  std::string prompt;
  std::string negative_prompt;
  int width = 0;
  int height = 0;
  int num_frames = 0;
  int fps = 16;
  int steps = 0;
  double guidance_scale = 1.0;
  double flow_shift = 1.0;
  std::uint64_t seed = 0;
  SamplerKind sampler = SamplerKind::kUniPc;
  AttentionKind attention = AttentionKind::kDense;
  double topk = 0.0;  // 0 with dense attention
};

// What a model can do; what ListModels shows.
struct ModelInfo {
  std::string name;
  ClipSpec defaults;  // prompt, negative prompt and seed unused
  int max_width = 0;
  int max_height = 0;
  int max_frames = 0;
  std::int64_t max_pixels = 0;  // width * height * frames
  int max_steps = 0;
  int max_prompt_bytes = 0;
  std::vector<SamplerKind> samplers;
  struct Attention {
    AttentionKind kind = AttentionKind::kDense;
    double topk = 0.0;
    double sparsity = 0.0;  // what the adapter's setting comes to
  };
  std::vector<Attention> attention;  // dense first
  std::int64_t parameters = 0;       // of all networks together
  int layers = 0;                    // transformer blocks
};

// What device work on a clip costs: for the policy, admission and ETAs. Estimates come from
// arithmetic counts times a rate that the pipeline measures as it works.
struct ClipCost {
  double begin_seconds = 0;
  double step_seconds = 0;        // one denoising step of this clip alone
  double decode_seconds = 0;      // all of the decoding
  std::size_t waiting_bytes = 0;  // device memory while it waits between steps
  std::size_t step_bytes = 0;     // more, while it is stepped
  std::size_t decode_bytes = 0;   // more, from the first DecodeNext to the last
  // Arithmetic operations: the same on every device and at any time, so that measured seconds of
  // one clip say something about another. 0: unknown.
  double begin_work = 0;
  double step_work = 0;
  double decode_work = 0;
};

struct ClipStatistics {
  double tokenize_seconds = 0;
  double text_encode_seconds = 0;
  double denoise_seconds = 0;  // this clip's share of the batches that it was in
  double decode_seconds = 0;
  double last_step_seconds = 0;
  std::vector<double> layer_sparsity;   // per block, from the maps used so far; empty when dense
  std::vector<double> layer_mass_kept;  // per block, from a sample of rows; empty when dense

  // Mean over layers; 0 when dense.
  double sparsity() const {
    double sum = 0;
    for (double value : layer_sparsity) sum += value;
    return layer_sparsity.empty() ? 0.0 : sum / static_cast<double>(layer_sparsity.size());
  }
};

// What a cache has done since the start, and what it holds.
struct CacheStats {
  std::int64_t hits = 0;
  std::int64_t misses = 0;
  std::size_t entries = 0;
  std::size_t bytes = 0;
};

// Some decoded frames.
struct FrameBatch {
  int first_frame = 0;
  Tensor pixels;  // host [n, height, width, 3] u8 RGB; undefined when n = 0
  int num_frames() const { return pixels.defined() ? static_cast<int>(pixels.dim(0)) : 0; }
};

// One clip in flight: latent, embeddings, sampler history, decoder state. Owned by its worker and
// touched by one thread at a time; dropping it frees its device memory.
class Generation {
 public:
  virtual ~Generation() = default;
  virtual const ClipSpec& spec() const = 0;
  virtual int step() const = 0;  // steps done
  bool denoised() const { return step() >= spec().steps; }
  virtual bool decoded() const = 0;  // the last frame has been handed out
  virtual const ClipStatistics& statistics() const = 0;
  // Generations with equal keys may share a batch (same latent shape and attention settings).
  virtual std::string batch_key() const = 0;
};

class Pipeline {
 public:
  virtual ~Pipeline() = default;

  virtual const ModelInfo& info() const = 0;
  virtual Device device() const = 0;
  virtual std::string device_description() const = 0;

  // Fills in defaults and checks every field. Thread-safe, needs no device. Throws Error:
  // kInvalidArgument with all violations, kFailedPrecondition when the attention kind has no
  // adapter, kResourceExhausted when the clip can never fit the device.
  virtual ClipSpec Resolve(const ClipRequest& request) const = 0;
  // What this pipeline holds of its device; the peak counts from the end of loading. Pipelines of
  // one device each have their own share of it, all the same total. Thread-safe.
  virtual MemoryStats Memory() const = 0;
  // Embeddings of prompts that are kept for the next clip with the same one. Thread-safe.
  virtual CacheStats PromptCacheUse() const = 0;
  // Thread-safe.
  virtual ClipCost Estimate(const ClipSpec& spec) const = 0;

  // The rest is for the device's one worker. Each call is one bounded piece of device work and has
  // finished on the device when it returns.

  // Tokenises and encodes the prompts, draws the noise.
  virtual std::unique_ptr<Generation> Begin(const ClipSpec& spec) const = 0;
  // A checkpoint: what Restore needs to go on, in this process or another one, to the same video
  // bit for bit. For a clip whose decoding has not begun, or begins anew.
  virtual std::vector<std::byte> Save(const Generation& generation) const = 0;
  // Instead of Begin. `spec` is that of the clip that was saved. Throws Error(kDataLoss) when the
  // bytes are damaged or of another model or clip: Begin still works then.
  virtual std::unique_ptr<Generation> Restore(const ClipSpec& spec,
                                              std::span<const std::byte> checkpoint) const = 0;
  // One denoising step for each. All have equal batch keys; they may stand at different steps. A
  // clip's result does not depend on who shares its batch. If one clip's latent turns non-finite,
  // its failure is returned and the others go on. If the call throws, generations whose step()
  // has not moved are as they were, and may be stepped again.
  struct StepFailure {
    Generation* generation = nullptr;
    std::string message;  // names step and layer range
  };
  virtual std::vector<StepFailure> DenoiseStep(std::span<Generation* const> batch) const = 0;
  // The most that one DenoiseStep takes for such clips on this device.
  virtual int MaxBatch(const ClipSpec& spec) const = 0;
  // The next few frames of a denoised clip; an empty batch when there are no more.
  virtual FrameBatch DecodeNext(Generation& generation) const = 0;
  // A small RGB image of the clip as it stands, host [h, w, 3] u8, cheap (a linear map from the
  // latent's current x0 estimate, no decoder).
  virtual Tensor Preview(const Generation& generation) const = 0;
};

struct PipelineOptions {
  Device device;
  std::string dtype = "auto";  // auto | f32 | bf16
  int cpu_threads = 0;
  int max_batch = 0;                                       // 0: what memory and shapes allow
  std::size_t prompt_cache_bytes = std::size_t{64} << 20;  // host memory for prompts' embeddings
};

// Loads a model folder in the diffusers layout. Throws Error: kNotFound when the folder or a file
// is not there, kDataLoss or kInvalidArgument when a file is damaged or does not fit, naming the
// file.
std::unique_ptr<Pipeline> LoadPipeline(const std::string& folder, const PipelineOptions& options);

}  // namespace slalom
