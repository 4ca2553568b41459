#include "model/wan_pipeline.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>
#include <utility>

#include "kernels/core/error.h"
#include "kernels/core/random.h"
#include "model/checkpoint.h"
#include "model/clip_request.h"
#include "model/guidance.h"
#include "model/prompt_cleaning.h"

namespace slalom {
namespace {

using SteadyClock = std::chrono::steady_clock;

// Streams of a clip's noise: the start, then one per step of the samplers that need some.
constexpr std::uint64_t kStartStream = 0;

// Past this many tokens a device has nothing to gain from a larger batch, and a step only grows
// longer: cancel and fairness act between steps.
constexpr std::int64_t kBatchTokens = 65536;
constexpr int kMostClips = 8;

// A prompt's tokens per byte, for estimates before it is tokenised.
constexpr double kTokensPerByte = 0.3;

double SecondsSince(SteadyClock::time_point start) {
  return std::chrono::duration<double>(SteadyClock::now() - start).count();
}

WanGeneration& Cast(Generation& generation) {
  auto* clip = dynamic_cast<WanGeneration*>(&generation);
  if (clip == nullptr) {
    throw Error(ErrorCode::kInternal, "a generation of another pipeline");
  }
  return *clip;
}

// Operations per second of a mid-sized matrix product: the first guess for everything.
double MeasureRate(Backend& backend, DType dtype) {
  constexpr std::int64_t kSize = 512;
  constexpr int kRuns = 3;
  Tensor x = backend.Allocate({kSize, kSize}, dtype);
  Tensor weight = backend.Allocate({kSize, kSize}, dtype);
  Tensor out = backend.Allocate({kSize, kSize}, dtype);
  backend.Zero(x);
  backend.Zero(weight);
  double best = 1e9;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = SteadyClock::now();
    backend.Linear({.x = x, .weight = weight, .out = out});
    backend.Synchronize();
    best = std::min(best, SecondsSince(start));
  }
  // Whole networks reach about half of what one product does.
  return 0.5 * 2.0 * kSize * kSize * kSize / std::max(best, 1e-9);
}

ModelInfo Describe(const WanModel& model) {
  const ModelConfig& config = model.config;
  ModelInfo info;
  info.name = config.name;
  info.max_width = config.limits.max_width;
  info.max_height = config.limits.max_height;
  info.max_frames = config.limits.max_frames;
  info.max_pixels = config.limits.max_pixels;
  info.max_steps = config.limits.max_steps;
  info.max_prompt_bytes = config.limits.max_prompt_bytes;
  info.parameters = model.parameters;
  info.layers = config.transformer.num_layers;
  info.samplers = {SamplerKind::kUniPc, SamplerKind::kEuler};
  // Only weights distilled for it make anything of rCM's four steps: their folder says so.
  if (config.sampler.kind == SamplerKind::kRcm || config.defaults.sampler == SamplerKind::kRcm) {
    info.samplers.push_back(SamplerKind::kRcm);
  }

  const ClipDefaults& defaults = config.defaults;
  info.defaults = {.width = defaults.width,
                   .height = defaults.height,
                   .num_frames = defaults.num_frames,
                   .fps = defaults.fps,
                   .steps = defaults.steps,
                   .guidance_scale = defaults.guidance_scale,
                   .flow_shift = defaults.flow_shift,
                   .sampler = defaults.sampler};
  info.attention.push_back({});
  for (const AttentionAdapter& adapter : model.transformer->adapters()) {
    info.attention.push_back(
        {.kind = adapter.kind, .topk = adapter.map.topk, .sparsity = adapter.NominalSparsity()});
    // A model that was trained for sparse attention uses it unless told otherwise.
    const bool chosen = defaults.attention ? adapter.kind == *defaults.attention : adapter.trained;
    if (chosen && info.defaults.attention == AttentionKind::kDense) {
      info.defaults.attention = adapter.kind;
      info.defaults.topk = adapter.map.topk;
    }
  }
  return info;
}

// The timesteps of a batch's samples with neighbours that agree taken together: as few as divide
// the batch into equal runs.
std::vector<float> SharedTimesteps(const std::vector<float>& timesteps) {
  for (std::size_t groups = 1; groups < timesteps.size(); ++groups) {
    if (timesteps.size() % groups != 0) continue;
    const std::size_t run = timesteps.size() / groups;
    std::vector<float> shared;
    for (std::size_t i = 0; i < timesteps.size(); i += run) shared.push_back(timesteps[i]);
    bool agree = true;
    for (std::size_t i = 0; i < timesteps.size(); ++i) agree &= timesteps[i] == shared[i / run];
    if (agree) return shared;
  }
  return timesteps;
}

std::string BatchKey(const ClipShape& shape, const ClipSpec& spec) {
  return ToString(shape.latent()) + "/" + std::to_string(static_cast<int>(spec.attention)) + "/" +
         std::to_string(spec.topk);
}

}  // namespace

WanPipeline::WanPipeline(WanModel model, const PipelineOptions& options)
    : model_(std::move(model)),
      info_(Describe(model_)),
      description_(model_.backend->Describe()),
      max_batch_(options.max_batch),
      preview_(PreviewMap::Fit(*model_.backend, *model_.decoder)),
      text_rate_(MeasureRate(*model_.backend, model_.dtype)),
      step_rates_{RateMeter(1.0 / text_rate_.SecondsFor(1.0)),
                  RateMeter(1.0 / text_rate_.SecondsFor(1.0)),
                  RateMeter(1.0 / text_rate_.SecondsFor(1.0))},
      decode_rate_(1.0 / text_rate_.SecondsFor(1.0)),
      prompt_cache_(options.prompt_cache_bytes) {
  const MemoryStats memory = model_.backend->Memory();
  weight_bytes_ = memory.bytes_in_use;
  device_bytes_ = memory.bytes_total;
  model_.backend->ResetPeak();
}

// --- from any thread ---

ClipSpec WanPipeline::Resolve(const ClipRequest& request) const {
  ClipSpec spec = ResolveClip(model_.config, info_, request);
  const ClipCost cost = Estimate(spec);
  const std::size_t needed = cost.waiting_bytes + std::max(cost.step_bytes, cost.decode_bytes);
  if (device_bytes_ > 0 && weight_bytes_ + needed > device_bytes_) {
    throw Error(ErrorCode::kResourceExhausted,
                "the clip needs " + std::to_string(needed >> 20) + " MiB beside the weights' " +
                    std::to_string(weight_bytes_ >> 20) + " MiB; the device has " +
                    std::to_string(device_bytes_ >> 20) + " MiB");
  }
  return spec;
}

double WanPipeline::StepFlops(const ClipSpec& spec) const {
  const ClipShape shape = ShapeOf(model_.config, spec);
  return SamplesPerStep(spec) *
         TransformerFlops(model_.config.transformer, shape.grid.size(), spec.attention, spec.topk);
}

std::size_t WanPipeline::BytesOfStep(const ClipSpec& spec) const {
  return StepBytes(model_.config, spec, model_.transformer->Setting(spec.attention, spec.topk),
                   model_.dtype, device());
}

RateMeter& WanPipeline::StepRate(AttentionKind kind) const {
  return step_rates_[static_cast<std::size_t>(kind)];
}

ClipCost WanPipeline::Estimate(const ClipSpec& spec) const {
  const ClipShape shape = ShapeOf(model_.config, spec);
  const auto text_tokens = [](const std::string& prompt) {
    return static_cast<std::int64_t>(kTokensPerByte * static_cast<double>(prompt.size())) + 1;
  };
  double text_flops = TextFlops(model_.config, text_tokens(spec.prompt));
  if (SamplesPerStep(spec) > 1) {
    text_flops += TextFlops(model_.config, text_tokens(spec.negative_prompt));
  }
  const VideoDecoder& decoder = *model_.decoder;
  ClipCost cost;
  cost.begin_work = text_flops;
  cost.step_work = StepFlops(spec);
  cost.decode_work = decoder.Flops(shape.frames, shape.height, shape.width);
  cost.begin_seconds = text_rate_.SecondsFor(cost.begin_work);
  cost.step_seconds = StepRate(spec.attention).SecondsFor(cost.step_work);
  cost.decode_seconds = decode_rate_.SecondsFor(cost.decode_work);
  cost.waiting_bytes = WaitingBytes(model_.config, spec, model_.dtype);
  cost.step_bytes = BytesOfStep(spec);
  cost.decode_bytes =
      decoder.StateBytes(shape.height, shape.width) + decoder.WorkBytes(shape.height, shape.width);
  return cost;
}

int WanPipeline::MaxBatch(const ClipSpec& spec) const {
  // One clip keeps the cores of a CPU busy; a batch would only make its step longer.
  const int wanted = max_batch_ > 0 ? max_batch_ : device().is_cpu() ? 1 : kMostClips;
  const ClipShape shape = ShapeOf(model_.config, spec);
  const std::int64_t tokens = SamplesPerStep(spec) * shape.grid.size();
  std::int64_t most = wanted;
  if (max_batch_ == 0) most = std::min(most, kBatchTokens / std::max<std::int64_t>(tokens, 1));
  if (device_bytes_ > weight_bytes_) {
    const std::size_t each = WaitingBytes(model_.config, spec, model_.dtype) + BytesOfStep(spec);
    most = std::min(most, static_cast<std::int64_t>((device_bytes_ - weight_bytes_) / each));
  }
  return static_cast<int>(std::clamp<std::int64_t>(most, 1, wanted));
}

// --- on the worker's thread ---

Tensor WanPipeline::Embed(const std::string& prompt, ClipStatistics& stats) const {
  Backend& backend = *model_.backend;
  const std::string cleaned = CleanPrompt(prompt);
  if (const Tensor kept = prompt_cache_.Find(cleaned); kept.defined()) {
    Tensor embeddings = backend.Allocate(kept.shape(), kept.dtype());
    backend.Copy(kept, embeddings);
    return embeddings;
  }
  auto start = SteadyClock::now();
  const TokenIds tokens = model_.tokenizer->Encode(cleaned, model_.config.transformer.text_len);
  stats.tokenize_seconds += SecondsSince(start);

  start = SteadyClock::now();
  const std::span<const std::int32_t> ids(tokens.ids.data(),
                                          static_cast<std::size_t>(tokens.length));
  const Tensor embeddings = model_.text_encoder->Forward(backend, ids);
  Tensor kept = Tensor::Host(embeddings.shape(), embeddings.dtype());
  backend.Copy(embeddings, kept);
  backend.Synchronize();
  text_rate_.Add(TextFlops(model_.config, tokens.length), SecondsSince(start));
  prompt_cache_.Insert(cleaned, kept);
  return embeddings;
}

std::shared_ptr<const TextContext> WanPipeline::EncodeText(const std::string& prompt,
                                                           ClipStatistics& stats) const {
  const auto start = SteadyClock::now();
  const double tokenized_before = stats.tokenize_seconds;
  Backend& backend = *model_.backend;
  const Tensor embeddings = Embed(prompt, stats);
  auto context =
      std::make_shared<const TextContext>(model_.transformer->PrepareText(backend, embeddings));
  backend.Synchronize();
  const double tokenize_seconds = stats.tokenize_seconds - tokenized_before;
  stats.text_encode_seconds += SecondsSince(start) - tokenize_seconds;
  return context;
}

std::shared_ptr<const RopeTables> WanPipeline::Angles(const TokenGrid& grid,
                                                      const TokenTile& tile) const {
  std::shared_ptr<const RopeTables> tables = cached_angles_.lock();
  if (tables == nullptr || tables->grid.frames != grid.frames ||
      tables->grid.height != grid.height || tables->grid.width != grid.width ||
      !(tables->tile == tile)) {
    const TransformerConfig& config = model_.config.transformer;
    tables = std::make_shared<const RopeTables>(MakeRopeTables(
        *model_.backend, grid, config.attention_head_dim, config.rope_max_seq_len, tile));
    cached_angles_ = tables;
  }
  return tables;
}

Tensor WanPipeline::Noise(const WanGeneration& clip, std::uint64_t stream, float scale) const {
  Tensor host = Tensor::Host(clip.shape.latent(), DType::kF32);
  const std::span<float> values(host.data<float>(), static_cast<std::size_t>(host.NumElements()));
  FillNormal(clip.clip.seed, stream, 0, values);
  if (scale != 1.0f) {
    for (float& value : values) value *= scale;
  }
  Tensor noise = model_.backend->Allocate(host.shape(), DType::kF32);
  model_.backend->Copy(host, noise);
  return noise;
}

std::unique_ptr<WanGeneration> WanPipeline::MakeClip(const ClipSpec& spec) const {
  auto clip = std::make_unique<WanGeneration>();
  clip->clip = spec;
  clip->shape = ShapeOf(model_.config, spec);
  clip->key = BatchKey(clip->shape, spec);
  clip->attention = model_.transformer->Setting(spec.attention, spec.topk);
  clip->sampler = Sampler(spec.sampler, MakeSchedule(spec.sampler, spec.steps, spec.flow_shift));
  return clip;
}

void WanPipeline::PrepareDenoising(WanGeneration& clip) const {
  clip.rope = Angles(clip.shape.grid, clip.attention.tile);
  clip.text = EncodeText(clip.clip.prompt, clip.stats);
  if (SamplesPerStep(clip.clip) == 1) return;
  const std::string& negative_prompt = clip.clip.negative_prompt;
  if (cached_text_ == nullptr || cached_prompt_ != negative_prompt) {
    cached_text_ = EncodeText(negative_prompt, clip.stats);
    cached_prompt_ = negative_prompt;
  }
  clip.negative_text = cached_text_;
}

std::unique_ptr<Generation> WanPipeline::Begin(const ClipSpec& spec) const {
  auto clip = MakeClip(spec);
  PrepareDenoising(*clip);
  clip->latent = Noise(*clip, kStartStream, clip->sampler.initial_scale());
  model_.backend->Synchronize();
  return clip;
}

std::string WanPipeline::Identity() const {
  return info_.name + "/" + std::to_string(info_.parameters) + "/" +
         std::to_string(static_cast<int>(model_.dtype)) + "/" +
         std::to_string(static_cast<int>(device().kind));
}

std::vector<std::byte> WanPipeline::Save(const Generation& generation) const {
  const auto* clip = dynamic_cast<const WanGeneration*>(&generation);
  if (clip == nullptr) throw Error(ErrorCode::kInternal, "a generation of another pipeline");
  return SaveClip(*model_.backend, Identity(), *clip);
}

std::unique_ptr<Generation> WanPipeline::Restore(const ClipSpec& spec,
                                                 std::span<const std::byte> checkpoint) const {
  auto clip = MakeClip(spec);
  RestoreClip(*model_.backend, Identity(), checkpoint, *clip);
  if (clip->denoised()) {
    clip->ReleaseDenoising();
  } else {
    PrepareDenoising(*clip);
  }
  model_.backend->Synchronize();
  return clip;
}

void WanPipeline::AppendSamples(const WanGeneration& clip, const Tensor& latent, float timestep,
                                std::vector<Sample>& samples) {
  samples.push_back({latent, timestep, clip.text.get()});
  if (clip.negative_text != nullptr) {
    samples.push_back({latent, timestep, clip.negative_text.get()});
  }
}

Tensor WanPipeline::RunTransformer(const WanGeneration& lead, const std::vector<Sample>& samples,
                                   Measurements* measurements, const Observer& observer) const {
  Backend& backend = *model_.backend;
  const auto n = static_cast<std::int64_t>(samples.size());
  const Shape one = lead.shape.latent();
  const Shape all = {n, one[0], one[1], one[2], one[3]};
  Tensor latents = backend.Allocate(all, DType::kF32);
  std::vector<const TextContext*> texts;
  std::vector<float> timesteps;
  for (std::int64_t i = 0; i < n; ++i) {
    const Sample& sample = samples[static_cast<std::size_t>(i)];
    backend.Copy(sample.latent, latents.Slice(i, i + 1).Reshape(one));
    texts.push_back(sample.text);
    timesteps.push_back(sample.timestep);
  }
  timesteps = SharedTimesteps(timesteps);
  const Tensor host_times =
      Tensor::FromFloats({static_cast<std::int64_t>(timesteps.size())}, timesteps);
  Tensor times = backend.Allocate(host_times.shape(), DType::kF32);
  backend.Copy(host_times, times);
  Transformer::Args args = {.latent = latents,
                            .timesteps = times,
                            .text = texts,
                            .rope = lead.rope.get(),
                            .attention = &lead.attention,
                            .velocity = backend.Allocate(all, DType::kF32),
                            .observer = observer};
  if (measurements != nullptr && measurements->sparse) {
    args.pair_counters =
        measurements->counters.Slice(0, 2 * info_.layers).Reshape({info_.layers, 2});
    if (measurements->mass_sample >= 0) {
      args.mass_sample = measurements->mass_sample;
      args.mass_kept = backend.Allocate({info_.layers}, DType::kF32);
      measurements->mass_kept = args.mass_kept;
    }
  }
  model_.transformer->Forward(backend, args);
  return args.velocity;
}

void WanPipeline::Read(Measurements& measurements) const {
  const Tensor host = Tensor::Host(measurements.counters.shape(), DType::kI64);
  model_.backend->Copy(measurements.counters, host);
  const auto* counts = host.data<std::int64_t>();
  for (int layer = 0; measurements.sparse && layer < info_.layers; ++layer) {
    measurements.layer_pairs.push_back({counts[2 * layer], counts[2 * layer + 1]});
  }
  measurements.non_finite.assign(counts + 2 * info_.layers, counts + host.NumElements());
  if (measurements.mass_kept.defined()) {
    const Tensor mass = Tensor::Host(measurements.mass_kept.shape(), DType::kF32);
    model_.backend->Copy(measurements.mass_kept, mass);
    measurements.layer_mass.assign(mass.data<float>(), mass.data<float>() + info_.layers);
  }
}

std::vector<Pipeline::StepFailure> WanPipeline::DenoiseStep(
    std::span<Generation* const> batch) const {
  Clips clips;
  std::vector<Sample> samples;
  std::vector<int> first_sample;
  Measurements measurements;
  double flops = 0;
  for (Generation* generation : batch) {
    WanGeneration& clip = Cast(*generation);
    if (clip.denoised() || (!clips.empty() && clip.key != clips.front()->key)) {
      throw Error(ErrorCode::kInternal, "a batch of clips that cannot be stepped together");
    }
    first_sample.push_back(static_cast<int>(samples.size()));
    // The kept mass is sampled once per clip, halfway: early maps see little but noise.
    if (measurements.mass_sample < 0 && clip.step() == clip.clip.steps / 2) {
      measurements.mass_sample = first_sample.back();
    }
    AppendSamples(clip, clip.latent, clip.sampler.timestep(), samples);
    flops += StepFlops(clip.clip);
    clips.push_back(&clip);
  }
  if (clips.empty()) return {};

  const auto start = SteadyClock::now();
  Backend& backend = *model_.backend;
  const std::int64_t pairs = 2 * std::int64_t{info_.layers};
  measurements.sparse = clips.front()->attention.kind != AttentionKind::kDense;
  measurements.counters =
      backend.Allocate({pairs + static_cast<std::int64_t>(clips.size())}, DType::kI64);
  backend.Zero(measurements.counters);
  const Tensor velocities = RunTransformer(*clips.front(), samples, &measurements, nullptr);
  // All of the step is queued before anything waits for the device: fresh noise is drawn beside it.
  std::vector<Tensor> before;
  for (std::size_t i = 0; i < clips.size(); ++i) {
    before.push_back(clips[i]->latent);
    StepClip(velocities, first_sample[i], *clips[i]);
    const std::int64_t counter = pairs + static_cast<std::int64_t>(i);
    backend.CountNonFinite(clips[i]->latent, measurements.counters.Slice(counter, counter + 1));
  }
  Read(measurements);
  std::vector<StepFailure> failures;
  for (std::size_t i = 0; i < clips.size(); ++i) {
    WanGeneration& clip = *clips[i];
    if (measurements.non_finite[i] > 0) {
      failures.push_back({&clip, FindNonFinite(clip, before[i])});
    }
    if (clip.denoised()) clip.ReleaseDenoising();
  }
  backend.Synchronize();
  const double seconds = SecondsSince(start);
  if (failures.empty()) StepRate(clips.front()->attention.kind).Add(flops, seconds);
  for (std::size_t i = 0; i < clips.size(); ++i) {
    const double share = SamplesPerStep(clips[i]->clip) / static_cast<double>(samples.size());
    AddStatistics(measurements, first_sample[i], seconds, share, *clips[i]);
  }
  return failures;
}

void WanPipeline::StepClip(const Tensor& velocities, int first_sample, WanGeneration& clip) const {
  Backend& backend = *model_.backend;
  const auto sample = [&](int s) {
    return velocities.Slice(s, s + 1).Reshape(clip.shape.latent());
  };
  Tensor velocity = sample(first_sample);
  if (clip.negative_text != nullptr) {
    velocity = Guide(backend, velocity, sample(first_sample + 1), clip.clip.guidance_scale);
  }
  Tensor noise;
  if (clip.sampler.needs_noise()) {
    noise = Noise(clip, kStartStream + 1 + static_cast<std::uint64_t>(clip.step()), 1.0f);
  }
  clip.sampler.Step(backend, velocity, noise, clip.latent);
}

void WanPipeline::AddStatistics(const Measurements& measurements, int first_sample, double seconds,
                                double share, WanGeneration& clip) const {
  clip.stats.denoise_seconds += seconds * share;
  clip.stats.last_step_seconds = seconds;
  // Clips of one batch share shape and top-k, so that all of their maps keep equally many pairs:
  // the batch's counts are this clip's but for a factor, which the ratio does not see.
  clip.layer_pairs.resize(measurements.layer_pairs.size());
  clip.stats.layer_sparsity.resize(measurements.layer_pairs.size());
  for (std::size_t layer = 0; layer < measurements.layer_pairs.size(); ++layer) {
    WanGeneration::Pairs& sum = clip.layer_pairs[layer];
    sum.critical += measurements.layer_pairs[layer].critical;
    sum.all += measurements.layer_pairs[layer].all;
    clip.stats.layer_sparsity[layer] =
        1.0 - static_cast<double>(sum.critical) / static_cast<double>(sum.all);
  }
  if (measurements.mass_sample == first_sample && !measurements.layer_mass.empty()) {
    clip.stats.layer_mass_kept = measurements.layer_mass;
  }
}

// Runs the step that went wrong once more, looking at every block: a failed clip may cost that.
std::string WanPipeline::FindNonFinite(const WanGeneration& clip, const Tensor& latent) const {
  const int step = clip.step() - 1;
  std::vector<Sample> samples;
  AppendSamples(clip, latent, clip.sampler.schedule().timesteps[static_cast<std::size_t>(step)],
                samples);
  int first = -1;
  RunTransformer(clip, samples, nullptr, [&](int layer, const Tensor& x) {
    if (first < 0 && CountNonFinite(*model_.backend, x) > 0) first = layer;
  });
  std::string message = "step " + std::to_string(step + 1) + " of " +
                        std::to_string(clip.clip.steps) +
                        ": the latent has values that are not finite; ";
  if (first < 0) return message + "all transformer blocks were finite, so it is the last layer";
  message += "they appear in transformer block " + std::to_string(first) + " of 0 to " +
             std::to_string(info_.layers - 1);
  return message;
}

FrameBatch WanPipeline::DecodeNext(Generation& generation) const {
  WanGeneration& clip = Cast(generation);
  if (!clip.denoised()) throw Error(ErrorCode::kInternal, "a clip is decoded before its last step");
  if (clip.decoded()) return {};

  const auto start = SteadyClock::now();
  const VideoDecoder& decoder = *model_.decoder;
  if (!clip.decoder_input.defined()) {
    clip.decoder_input = decoder.ToDecoderLayout(*model_.backend, clip.latent);
  }
  const std::int64_t begin = clip.next_latent_frame;
  FrameBatch frames;
  frames.first_frame = begin == 0 ? 0 : static_cast<int>(decoder.FramesOf(begin, /*first=*/true));
  frames.pixels = DecodePiece(clip);
  const double seconds = SecondsSince(start);
  clip.stats.decode_seconds += seconds;
  // The first piece is shorter and pays for what the device prepares once: it would mislead.
  if (begin > 0) {
    const ClipShape& shape = clip.shape;
    const double flops = decoder.Flops(begin + 1, shape.height, shape.width) -
                         decoder.Flops(begin, shape.height, shape.width);
    decode_rate_.Add(flops, seconds);
  }
  if (clip.decoded()) {
    clip.decoder = DecoderState();
    clip.decoder_input = Tensor();
  }
  return frames;
}

// The next latent frame as host pixels [n, height, width, 3] u8.
Tensor WanPipeline::DecodePiece(WanGeneration& clip) const {
  Backend& backend = *model_.backend;
  const std::int64_t begin = clip.next_latent_frame;
  const Tensor piece = clip.decoder_input.Slice(begin, begin + 1);
  Tensor latents = backend.Allocate(piece.shape(), model_.dtype);
  backend.Copy(piece, latents);
  const Tensor decoded = model_.decoder->Decode(backend, latents, clip.decoder);
  Tensor pixels = backend.Allocate(decoded.shape(), DType::kU8);
  backend.ToPixels({.x = decoded, .out = pixels});
  Tensor host = Tensor::Host(pixels.shape(), DType::kU8);
  backend.Copy(pixels, host);
  clip.next_latent_frame = begin + 1;
  return host;
}

Tensor WanPipeline::Preview(const Generation& generation) const {
  const auto* clip = dynamic_cast<const WanGeneration*>(&generation);
  if (clip == nullptr) throw Error(ErrorCode::kInternal, "a generation of another pipeline");
  const Tensor& estimate = clip->sampler.x0();
  return preview_.Render(*model_.backend, estimate.defined() ? estimate : clip->latent);
}

}  // namespace slalom
