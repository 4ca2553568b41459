#include "model/clip_request.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "kernels/core/error.h"
#include "model/guidance.h"
#include "model/prompt_cleaning.h"
#include "model/sampler.h"

namespace slalom {
namespace {

constexpr double kMaxGuidance = 100.0;
constexpr double kMinShift = 0.01;
constexpr double kMaxShift = 100.0;
constexpr int kMaxFps = 120;

std::string Text(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

// Collects what is wrong, so that one answer names it all.
class Checker {
 public:
  void Add(const std::string& field, const std::string& value, const std::string& allowed) {
    violations_.push_back({field, "is " + value + ", must be " + allowed});
  }

  void Integer(const std::string& field, int value, int least, int most) {
    if (value < least || value > most) {
      Add(field, std::to_string(value), std::to_string(least) + " to " + std::to_string(most));
    }
  }

  void Multiple(const std::string& field, int value, int multiple, int most) {
    if (value < multiple || value > most || value % multiple != 0) {
      Add(field, std::to_string(value),
          "a multiple of " + std::to_string(multiple) + " from " + std::to_string(multiple) +
              " to " + std::to_string(most));
    }
  }

  // Finite and within [least, most]; a NaN compares false and is refused.
  void Real(const std::string& field, double value, double least, double most) {
    if (!(value >= least && value <= most)) {
      Add(field, Text(value), "a number from " + Text(least) + " to " + Text(most));
    }
  }

  void Prompt(const std::string& field, const std::string& prompt, int max_bytes, bool required) {
    if (prompt.size() > static_cast<std::size_t>(max_bytes)) {
      Add(field, std::to_string(prompt.size()) + " bytes long",
          "at most " + std::to_string(max_bytes) + " bytes");
      return;
    }
    try {
      if (CleanPrompt(prompt).empty() && required) Add(field, "empty", "a text");
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kInvalidArgument) throw;
      Add(field, "not text", "valid UTF-8");
    }
  }

  void Finish() {
    if (!violations_.empty()) throw Error(std::move(violations_));
  }

 private:
  std::vector<FieldViolation> violations_;
};

void CheckSize(Checker& checker, const ModelConfig& config, const ClipSpec& spec) {
  const ClipLimits& limits = config.limits;
  const int multiple = SizeMultiple(config);
  checker.Multiple("width", spec.width, multiple, limits.max_width);
  checker.Multiple("height", spec.height, multiple, limits.max_height);
  const int stride = config.vae.temporal_scale();
  const int frames = spec.num_frames;
  if (frames < 1 || frames > limits.max_frames || (frames - 1) % stride != 0) {
    checker.Add("num_frames", std::to_string(frames),
                std::to_string(stride) + "n + 1, from 1 to " + std::to_string(limits.max_frames));
  }
  const std::int64_t pixels = std::int64_t{spec.width} * spec.height * frames;
  if (spec.width > 0 && spec.height > 0 && frames > 0 && spec.width <= limits.max_width &&
      spec.height <= limits.max_height && frames <= limits.max_frames &&
      pixels > limits.max_pixels) {
    checker.Add("width * height * num_frames", std::to_string(pixels),
                "at most " + std::to_string(limits.max_pixels));
  }
  checker.Integer("fps", spec.fps, 1, kMaxFps);
}

void CheckSampling(Checker& checker, const ModelConfig& config, const ModelInfo& info,
                   const ClipRequest& request, const ClipSpec& spec) {
  if (std::ranges::find(info.samplers, spec.sampler) == info.samplers.end()) {
    std::string offered;
    for (const SamplerKind kind : info.samplers) {
      offered += (offered.empty() ? "" : " or ") + std::string(SamplerName(kind));
    }
    checker.Add("sampler", SamplerName(spec.sampler), offered);
  }
  const bool rcm = spec.sampler == SamplerKind::kRcm;
  checker.Integer("steps", spec.steps, 1,
                  rcm ? std::min(kMaxRcmSteps, config.limits.max_steps) : config.limits.max_steps);
  checker.Real("guidance_scale", spec.guidance_scale, 0.0, kMaxGuidance);
  checker.Real("flow_shift", spec.flow_shift, kMinShift, kMaxShift);
  if (rcm && UsesGuidance(spec.guidance_scale)) {
    checker.Add("guidance_scale", Text(spec.guidance_scale),
                "at most 1 with the rcm sampler, whose weights have guidance built in");
  }
  if (rcm && request.flow_shift) {
    checker.Add("flow_shift", Text(*request.flow_shift),
                "left unset with the rcm sampler, which has fixed noise levels");
  }
  if (request.topk) {
    if (spec.attention == AttentionKind::kDense) {
      checker.Add("topk", Text(*request.topk), "left unset with dense attention");
    } else if (!(*request.topk > 0.0 && *request.topk <= 1.0)) {
      checker.Add("topk", Text(*request.topk), "above 0 and at most 1");
    }
  }
}

// The model's setting for this kind of attention.
const ModelInfo::Attention& FindAttention(const ModelInfo& info, AttentionKind kind) {
  for (const ModelInfo::Attention& attention : info.attention) {
    if (attention.kind == kind) return attention;
  }
  throw Error(ErrorCode::kFailedPrecondition,
              "model " + info.name + " has no adapter for the attention asked for");
}

// A seed for a request without one. It only has to differ from call to call.
std::uint64_t DrawSeed() {
  std::random_device device;
  // 53 bits: a seed that has passed through JSON is still the same number.
  return ((std::uint64_t{device()} << 32) | device()) >> 11;
}

}  // namespace

int SizeMultiple(const ModelConfig& config) {
  return config.vae.spatial_scale() * config.transformer.patch_size[1];
}

ClipSpec ResolveClip(const ModelConfig& config, const ModelInfo& info, const ClipRequest& request) {
  const ClipSpec& defaults = info.defaults;
  ClipSpec spec;
  spec.prompt = request.prompt;
  spec.negative_prompt = request.negative_prompt;
  spec.width = request.width.value_or(defaults.width);
  spec.height = request.height.value_or(defaults.height);
  spec.num_frames = request.num_frames.value_or(defaults.num_frames);
  spec.fps = request.fps.value_or(defaults.fps);
  spec.sampler = request.sampler.value_or(defaults.sampler);
  const bool other_rcm = spec.sampler == SamplerKind::kRcm && defaults.sampler != SamplerKind::kRcm;
  spec.steps = request.steps.value_or(other_rcm ? kMaxRcmSteps : defaults.steps);
  spec.guidance_scale = request.guidance_scale.value_or(other_rcm ? 1.0 : defaults.guidance_scale);
  spec.flow_shift = request.flow_shift.value_or(defaults.flow_shift);
  spec.seed = request.seed ? *request.seed : DrawSeed();
  spec.attention = request.attention.value_or(defaults.attention);
  const ModelInfo::Attention& attention = FindAttention(info, spec.attention);
  spec.topk = request.topk.value_or(attention.topk);

  Checker checker;
  checker.Prompt("prompt", spec.prompt, config.limits.max_prompt_bytes, /*required=*/true);
  checker.Prompt("negative_prompt", spec.negative_prompt, config.limits.max_prompt_bytes,
                 /*required=*/false);
  CheckSize(checker, config, spec);
  CheckSampling(checker, config, info, request, spec);
  checker.Finish();
  return spec;
}

}  // namespace slalom
