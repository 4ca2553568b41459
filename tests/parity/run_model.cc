// The nets that come with a model folder: tokenizer, text encoder, transformer, video decoder.
#include <algorithm>
#include <vector>

#include "kernels/core/error.h"
#include "model/adapter.h"
#include "model/config.h"
#include "model/prompt_cleaning.h"
#include "model/rope.h"
#include "model/text_encoder.h"
#include "model/tokenizer.h"
#include "model/transformer.h"
#include "model/video_decoder.h"
#include "tests/parity/run_network.h"

namespace slalom {
namespace {

// How many ids of one row the mask keeps. The reference pads on the right.
std::int64_t ValidLength(const std::int64_t* mask, std::int64_t n) {
  const std::int64_t length = std::count(mask, mask + n, 1);
  if (length == 0 || !std::all_of(mask, mask + length, [](std::int64_t m) { return m == 1; }) ||
      !std::all_of(mask + length, mask + n, [](std::int64_t m) { return m == 0; })) {
    throw Error(ErrorCode::kInvalidArgument,
                "tensor 'attention_mask': expected ones, at least one, and then zeros");
  }
  return length;
}

// [T, H, W, 3] f32 into frames first.. of [3, frames, H, W], clamped as diffusers does.
void PlaceFrames(const Tensor& frames, std::int64_t first, std::int64_t total, float* out) {
  const std::int64_t pixels = frames.dim(1) * frames.dim(2);
  const float* from = frames.data<float>();
  for (std::int64_t t = 0; t < frames.dim(0); ++t) {
    for (std::int64_t p = 0; p < pixels; ++p) {
      for (std::int64_t c = 0; c < 3; ++c) {
        out[(c * total + first + t) * pixels + p] = std::clamp(*from++, -1.0f, 1.0f);
      }
    }
  }
}

}  // namespace

TensorMap RunTokenizer(const NetworkOptions& options) {
  const TextEncoderConfig config =
      LoadTextEncoderConfig(options.model + "/text_encoder/config.json");
  const Tokenizer tokenizer(options.model + "/tokenizer", config.vocab_size);
  const TokenIds tokens = tokenizer.Encode(CleanPrompt(options.text));
  const auto n = static_cast<std::int64_t>(tokens.ids.size());
  TensorMap out = {{"input_ids", Tensor::Host({1, n}, DType::kI64)},
                   {"attention_mask", Tensor::Host({1, n}, DType::kI64)}};
  std::ranges::copy(tokens.ids, out["input_ids"].data<std::int64_t>());
  for (std::int64_t i = 0; i < n; ++i) {
    out["attention_mask"].data<std::int64_t>()[i] = i < tokens.length ? 1 : 0;
  }
  return out;
}

TensorMap RunTextEncoder(Backend& backend, const NetworkOptions& options,
                         const NetworkInputs& inputs) {
  const Tensor ids = inputs.Get("input_ids", DType::kI64, {-1, -1});
  const std::int64_t batch = ids.dim(0);
  const std::int64_t n = ids.dim(1);
  const Tensor mask = inputs.Get("attention_mask", DType::kI64, {batch, n});

  const std::string folder = options.model + "/text_encoder";
  const TextEncoder encoder(backend, Weights::Open(folder, "model"),
                            LoadTextEncoderConfig(folder + "/config.json"), options.dtype);
  const std::int64_t width = encoder.config().d_model;
  Tensor hidden = Tensor::Host({batch, n, width}, DType::kF32);
  std::fill_n(hidden.data<float>(), hidden.NumElements(), 0.0f);
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t* row = ids.data<std::int64_t>() + b * n;
    const std::int64_t length = ValidLength(mask.data<std::int64_t>() + b * n, n);
    std::vector<std::int32_t> valid;
    for (std::int64_t i = 0; i < length; ++i) {
      // Narrowing must not turn a bad id into a good one.
      valid.push_back(
          row[i] == static_cast<std::int32_t>(row[i]) ? static_cast<std::int32_t>(row[i]) : -1);
    }
    const Tensor rows = Download(backend, encoder.Forward(backend, valid));
    std::copy_n(rows.data<float>(), length * width, hidden.data<float>() + b * n * width);
  }
  return {{"last_hidden_state", hidden}};
}

TensorMap RunTransformer(Backend& backend, const NetworkOptions& options,
                         const NetworkInputs& inputs) {
  const std::string folder = options.model + "/transformer";
  const TransformerConfig config = LoadTransformerConfig(folder + "/config.json");
  const Tensor latent =
      inputs.Get("hidden_states", DType::kF32, {-1, config.in_channels, -1, -1, -1});
  if (latent.dim(3) % 2 != 0 || latent.dim(4) % 2 != 0) {
    throw Error(
        ErrorCode::kInvalidArgument,
        "tensor 'hidden_states': height and width must be even, got " + ToString(latent.shape()));
  }
  const std::int64_t batch = latent.dim(0);
  const Tensor timestep = inputs.Get("timestep", DType::kF32, {batch});
  const Tensor text =
      inputs.Get("encoder_hidden_states", DType::kF32, {batch, config.text_len, config.text_dim});

  const Transformer transformer(backend, Weights::Open(folder, "diffusion_pytorch_model"), config,
                                LoadAdapters(options.model, config), options.dtype);
  std::vector<TextContext> contexts;
  for (std::int64_t b = 0; b < batch; ++b) {
    const Tensor one = text.Slice(b, b + 1).Reshape({config.text_len, config.text_dim});
    contexts.push_back(transformer.PrepareText(backend, Upload(backend, one, options.dtype)));
  }
  std::vector<const TextContext*> pointers;
  for (const TextContext& context : contexts) pointers.push_back(&context);

  const AttentionSetting attention = transformer.Setting(options.attention);
  const RopeTables rope =
      MakeRopeTables(backend, transformer.GridOf(latent), config.attention_head_dim,
                     config.rope_max_seq_len, attention.tile);
  const Tensor velocity = backend.Allocate(
      {batch, config.out_channels, latent.dim(2), latent.dim(3), latent.dim(4)}, DType::kF32);
  transformer.Forward(backend, {.latent = Upload(backend, latent, DType::kF32),
                                .timesteps = Upload(backend, timestep, DType::kF32),
                                .text = pointers,
                                .rope = &rope,
                                .attention = &attention,
                                .velocity = velocity});
  return {{"sample", Download(backend, velocity)}};
}

TensorMap RunVideoDecoder(Backend& backend, const NetworkOptions& options,
                          const NetworkInputs& inputs) {
  const std::string folder = options.model + "/vae";
  const VideoDecoder decoder(backend, Weights::Open(folder, "diffusion_pytorch_model"),
                             LoadVaeConfig(folder + "/config.json"), options.dtype);
  const VaeConfig& config = decoder.config();
  const Tensor latents = inputs.Get("latents", DType::kF32, {-1, config.z_dim, -1, -1, -1});
  const std::int64_t batch = latents.dim(0);
  const std::int64_t latent_frames = latents.dim(2);
  const std::int64_t height = latents.dim(3) * config.spatial_scale();
  const std::int64_t width = latents.dim(4) * config.spatial_scale();
  const std::int64_t frames = decoder.FramesOf(latent_frames, true);

  Tensor sample = Tensor::Host({batch, 3, frames, height, width}, DType::kF32);
  for (std::int64_t b = 0; b < batch; ++b) {
    float* out = sample.data<float>() + b * 3 * frames * height * width;
    const Tensor clip = latents.Slice(b, b + 1).Reshape(
        {config.z_dim, latent_frames, latents.dim(3), latents.dim(4)});
    const Tensor rows = decoder.ToDecoderLayout(backend, Upload(backend, clip, DType::kF32),
                                                /*normalised=*/false);
    const std::int64_t piece = options.whole ? latent_frames : 1;
    DecoderState state;
    std::int64_t done = 0;
    for (std::int64_t t = 0; t < latent_frames; t += piece) {
      const Tensor part = Upload(backend, rows.Slice(t, t + piece), DType::kF32);
      const Tensor decoded = Download(backend, decoder.Decode(backend, part, state));
      PlaceFrames(decoded, done, frames, out);
      done += decoded.dim(0);
    }
  }
  return {{"sample", sample}};
}

}  // namespace slalom
