#include "server/request.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "kernels/core/error.h"
#include "server/metrics.h"

namespace slalom {
namespace {

constexpr int kDefaultQuality = 75;
constexpr std::size_t kMaxRequestIdBytes = 128;

v1::Sampler ToProto(SamplerKind kind) {
  switch (kind) {
    case SamplerKind::kUniPc:
      return v1::SAMPLER_UNIPC;
    case SamplerKind::kEuler:
      return v1::SAMPLER_EULER;
    case SamplerKind::kRcm:
      return v1::SAMPLER_RCM;
  }
  return v1::SAMPLER_UNSPECIFIED;
}

v1::AttentionMode ToProto(AttentionKind kind) {
  switch (kind) {
    case AttentionKind::kDense:
      return v1::ATTENTION_MODE_DENSE;
    case AttentionKind::kSla:
      return v1::ATTENTION_MODE_SLA;
    case AttentionKind::kSalad:
      return v1::ATTENTION_MODE_SALAD;
  }
  return v1::ATTENTION_MODE_AUTO;
}

std::optional<SamplerKind> FromProto(v1::Sampler sampler) {
  switch (sampler) {
    case v1::SAMPLER_UNIPC:
      return SamplerKind::kUniPc;
    case v1::SAMPLER_EULER:
      return SamplerKind::kEuler;
    case v1::SAMPLER_RCM:
      return SamplerKind::kRcm;
    default:
      return std::nullopt;
  }
}

std::optional<AttentionKind> FromProto(v1::AttentionMode mode) {
  switch (mode) {
    case v1::ATTENTION_MODE_DENSE:
      return AttentionKind::kDense;
    case v1::ATTENTION_MODE_SLA:
      return AttentionKind::kSla;
    case v1::ATTENTION_MODE_SALAD:
      return AttentionKind::kSalad;
    default:
      return std::nullopt;
  }
}

std::vector<FieldViolation> Violations(const v1::GenerateVideoRequest& request) {
  std::vector<FieldViolation> violations;
  const auto wrong = [&](const char* field, const std::string& description) {
    violations.push_back({field, description});
  };
  const auto known = [&](const char* field, bool is_known, int value, const char* allowed) {
    if (!is_known) wrong(field, std::to_string(value) + " is not known; give " + allowed);
  };
  const auto finite = [&](const char* field, bool set, double value) {
    if (set && !std::isfinite(value)) wrong(field, std::to_string(value) + " is not finite");
  };
  const v1::Attention& attention = request.attention();
  const v1::Output& output = request.output();
  known("sampler", v1::Sampler_IsValid(request.sampler()), request.sampler(), "0 to 3");
  known("attention.mode", v1::AttentionMode_IsValid(attention.mode()), attention.mode(), "0 to 3");
  known("output.container", v1::Container_IsValid(output.container()), output.container(),
        "CONTAINER_FRAGMENTED_MP4 (1)");
  known("output.codec", v1::Codec_IsValid(output.codec()), output.codec(), "CODEC_H264 (1)");
  known("priority", v1::Priority_IsValid(request.priority()), request.priority(), "0 to 3");
  finite("guidance_scale", request.has_guidance_scale(), request.guidance_scale());
  finite("flow_shift", request.has_flow_shift(), request.flow_shift());
  finite("attention.topk", attention.has_topk(), attention.topk());
  if (attention.has_topk() && attention.mode() == v1::ATTENTION_MODE_DENSE) {
    wrong("attention.topk", "not allowed with dense attention; leave it unset");
  }
  if (output.has_quality() && (output.quality() < 1 || output.quality() > 100)) {
    wrong("output.quality", std::to_string(output.quality()) + " is not in 1 to 100");
  }
  const std::string& id = request.request_id();
  const bool printable =
      std::all_of(id.begin(), id.end(), [](char c) { return c > 0x20 && c < 0x7f; });
  if (id.size() > kMaxRequestIdBytes || !printable) {
    wrong("request_id", std::to_string(id.size()) +
                            " bytes; give at most 128 bytes of printable ASCII without spaces");
  }
  return violations;
}

ClipRequest ToClipRequest(const v1::GenerateVideoRequest& request) {
  ClipRequest clip;
  clip.prompt = request.prompt();
  clip.negative_prompt = request.negative_prompt();
  if (request.has_width()) clip.width = request.width();
  if (request.has_height()) clip.height = request.height();
  if (request.has_num_frames()) clip.num_frames = request.num_frames();
  if (request.has_fps()) clip.fps = request.fps();
  if (request.has_steps()) clip.steps = request.steps();
  if (request.has_guidance_scale()) clip.guidance_scale = request.guidance_scale();
  if (request.has_flow_shift()) clip.flow_shift = request.flow_shift();
  if (request.has_seed()) clip.seed = request.seed();
  clip.sampler = FromProto(request.sampler());
  clip.attention = FromProto(request.attention().mode());
  if (request.attention().has_topk()) clip.topk = request.attention().topk();
  return clip;
}

}  // namespace

ClipSpec ResolveRequest(const v1::GenerateVideoRequest& request, const Pipeline& pipeline) {
  std::vector<FieldViolation> violations = Violations(request);
  std::optional<ClipSpec> spec;
  try {
    spec = pipeline.Resolve(ToClipRequest(request));
  } catch (const Error& error) {
    if (error.violations().empty() && violations.empty()) throw;
    for (FieldViolation violation : error.violations()) {
      if (violation.field == "topk")
        violation.field = "attention.topk";  // as the contract names it
      const auto same = [&](const FieldViolation& v) { return v.field == violation.field; };
      if (std::none_of(violations.begin(), violations.end(), same)) {
        violations.push_back(violation);
      }
    }
  }
  if (!violations.empty()) throw Error(std::move(violations));
  return *spec;
}

v1::GenerateVideoRequest ToResolved(const v1::GenerateVideoRequest& request, const ClipSpec& spec,
                                    const std::string& model) {
  v1::GenerateVideoRequest resolved = request;
  resolved.set_model(model);
  resolved.set_negative_prompt(spec.negative_prompt);
  resolved.set_width(spec.width);
  resolved.set_height(spec.height);
  resolved.set_num_frames(spec.num_frames);
  resolved.set_fps(spec.fps);
  resolved.set_steps(spec.steps);
  resolved.set_guidance_scale(spec.guidance_scale);
  resolved.set_flow_shift(spec.flow_shift);
  resolved.set_seed(spec.seed);
  resolved.set_sampler(ToProto(spec.sampler));
  resolved.mutable_attention()->set_mode(ToProto(spec.attention));
  if (spec.attention == AttentionKind::kDense) {
    resolved.mutable_attention()->clear_topk();
  } else {
    resolved.mutable_attention()->set_topk(spec.topk);
  }
  v1::Output* output = resolved.mutable_output();
  output->set_container(v1::CONTAINER_FRAGMENTED_MP4);
  output->set_codec(v1::CODEC_H264);
  if (!output->has_quality()) output->set_quality(kDefaultQuality);
  if (resolved.priority() == v1::PRIORITY_UNSPECIFIED) {
    resolved.set_priority(v1::PRIORITY_NORMAL);
  }
  return resolved;
}

Priority ToPriority(v1::Priority priority) {
  switch (priority) {
    case v1::PRIORITY_LOW:
      return Priority::kLow;
    case v1::PRIORITY_HIGH:
      return Priority::kHigh;
    default:
      return Priority::kNormal;
  }
}

std::string AttentionLabel(const v1::GenerateVideoRequest& request) {
  const std::optional<AttentionKind> kind = FromProto(request.attention().mode());
  return kind ? AttentionName(*kind) : "auto";
}

v1::Statistics ToStatistics(const JobResult& result, const v1::GenerateVideoRequest& resolved) {
  const ClipStatistics& clip = result.statistics;
  v1::Statistics statistics;
  statistics.set_queue_seconds(result.queue_seconds);
  statistics.set_tokenize_seconds(clip.tokenize_seconds);
  statistics.set_text_encode_seconds(clip.text_encode_seconds);
  statistics.set_denoise_seconds(clip.denoise_seconds);
  statistics.set_decode_seconds(clip.decode_seconds);
  statistics.set_sparsity(clip.sparsity());
  for (const double share : clip.layer_sparsity) statistics.add_layer_sparsity(share);
  for (const double share : clip.layer_mass_kept) statistics.add_layer_mass_kept(share);
  statistics.set_frames(result.frames);
  statistics.set_seed(resolved.seed());
  statistics.set_steps(resolved.steps());
  statistics.set_attention(resolved.attention().mode());
  return statistics;
}

v1::Model ToModel(const ModelInfo& info, const std::string& device, bool is_default) {
  v1::Model model;
  model.set_name(info.name);
  model.set_is_default(is_default);
  model.set_parameters(info.parameters);
  model.set_layers(info.layers);
  model.set_device(device);
  const ClipSpec& spec = info.defaults;
  v1::ModelDefaults* defaults = model.mutable_defaults();
  defaults->set_width(spec.width);
  defaults->set_height(spec.height);
  defaults->set_num_frames(spec.num_frames);
  defaults->set_fps(spec.fps);
  defaults->set_steps(spec.steps);
  defaults->set_guidance_scale(spec.guidance_scale);
  defaults->set_flow_shift(spec.flow_shift);
  defaults->set_sampler(ToProto(spec.sampler));
  defaults->set_attention(ToProto(spec.attention));
  v1::ModelLimits* limits = model.mutable_limits();
  limits->set_max_width(info.max_width);
  limits->set_max_height(info.max_height);
  limits->set_max_frames(info.max_frames);
  limits->set_max_pixels(info.max_pixels);
  limits->set_max_steps(info.max_steps);
  limits->set_max_prompt_bytes(info.max_prompt_bytes);
  for (const SamplerKind kind : info.samplers) model.add_samplers(ToProto(kind));
  for (const ModelInfo::Attention& attention : info.attention) {
    v1::AttentionInfo* entry = model.add_attention();
    entry->set_mode(ToProto(attention.kind));
    entry->set_topk(attention.topk);
    entry->set_sparsity(attention.sparsity);
  }
  return model;
}

}  // namespace slalom
