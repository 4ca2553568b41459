// What a clip costs, as functions of its shape, and how fast this machine pays.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/core/device.h"
#include "kernels/core/dtype.h"
#include "kernels/core/tensor.h"
#include "model/config.h"
#include "model/pipeline.h"
#include "model/transformer_block.h"

namespace slalom {

// A clip's latent and its tokens.
struct ClipShape {
  std::int64_t channels = 0;
  std::int64_t frames = 0;  // latent frames
  std::int64_t height = 0;  // latent positions
  std::int64_t width = 0;
  TokenGrid grid;

  Shape latent() const { return {channels, frames, height, width}; }
};
ClipShape ShapeOf(const ModelConfig& config, const ClipSpec& spec);

// Samples that one step of the clip runs through the transformer: two with guidance.
int SamplesPerStep(const ClipSpec& spec);

// Operations (a multiply-add counts 2) of one transformer pass of one sample of `tokens`, of
// encoding a text of `text_tokens`. The attention core counts by its share of key blocks, topk.
double TransformerFlops(const TransformerConfig& config, std::int64_t tokens, AttentionKind kind,
                        double topk);
double TextFlops(const ModelConfig& config, std::int64_t text_tokens);

// Device memory of a clip between steps: latent and history, its prompts, its angles.
std::size_t WaitingBytes(const ModelConfig& config, const ClipSpec& spec, DType dtype);
// More, while one step of it runs alone on such a device, with that attention.
std::size_t StepBytes(const ModelConfig& config, const ClipSpec& spec,
                      const AttentionSetting& attention, DType dtype, const Device& device);

// Seconds per operation, as measured: a moving average over the latest runs. The first run also
// pays for what is prepared once; the second replaces it when it was faster. Thread-safe.
class RateMeter {
 public:
  explicit RateMeter(double flops_per_second) : rate_(flops_per_second) {}

  // One writer at a time. The first measurement replaces the initial guess.
  void Add(double flops, double seconds);
  double SecondsFor(double flops) const { return flops / rate_.load(std::memory_order_relaxed); }
  // What was known when the meter was made has been replaced by a measurement.
  bool measured() const { return runs_.load(std::memory_order_relaxed) > 0; }

 private:
  std::atomic<double> rate_;
  std::atomic<int> runs_ = 0;  // counted as far as two
};

}  // namespace slalom
