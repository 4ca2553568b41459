#include "tests/bench/bench_networks.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/error.h"
#include "kernels/core/random.h"
#include "model/adapter.h"
#include "model/clip_cost.h"
#include "model/text_encoder.h"
#include "model/transformer.h"
#include "model/video_decoder.h"

namespace slalom {
namespace {

using SteadyClock = std::chrono::steady_clock;
using nlohmann::json;

constexpr char kDiffusersStem[] = "diffusion_pytorch_model";

double SecondsSince(SteadyClock::time_point start) {
  return std::chrono::duration<double>(SteadyClock::now() - start).count();
}

// A device, the folder's configs and the report that is growing.
class Bench {
 public:
  explicit Bench(const NetworkBenchOptions& options)
      : options_(options),
        config_(LoadModelConfig(options.folder)),
        backend_(MakeBackend(
            options.device, {.cpu_threads = options.threads, .force_f32 = options.dtype == "f32"})),
        dtype_(options.dtype == "auto"   ? backend_->preferred_dtype()
               : options.dtype == "bf16" ? DType::kBF16
                                         : DType::kF32) {}

  const ModelConfig& config() const { return config_; }
  Backend& backend() const { return *backend_; }
  DType dtype() const { return dtype_; }
  ClipSpec spec() const {
    ClipSpec spec;
    spec.width = options_.width;
    spec.height = options_.height;
    spec.num_frames = options_.num_frames;
    return spec;
  }
  std::string Folder(const char* network) const {
    return (std::filesystem::path(options_.folder) / network).string();
  }

  template <typename Make>
  auto Load(const Make& make) {
    const auto start = SteadyClock::now();
    auto network = make();
    backend_->Synchronize();
    report_["load_seconds"] = SecondsSince(start);
    report_["weight_bytes"] = backend_->Memory().bytes_in_use;
    return network;
  }

  Tensor Random(const Shape& shape, DType dtype) const {
    Tensor host = Tensor::Host(shape, DType::kF32);
    FillNormal(1, 0, 0, {host.data<float>(), static_cast<std::size_t>(host.NumElements())});
    Tensor tensor = backend_->Allocate(shape, dtype);
    backend_->Copy(host, tensor);
    return tensor;
  }

  // `flops` of one run. What is in use now does not count as the run's memory.
  template <typename Run>
  void Time(double flops, const Run& run) {
    const std::size_t before = backend_->Memory().bytes_in_use;
    backend_->ResetPeak();
    std::vector<double> seconds;
    for (int i = 0; i <= options_.repeats; ++i) {
      const auto start = SteadyClock::now();
      run();
      backend_->Synchronize();
      if (i > 0) seconds.push_back(SecondsSince(start));
    }
    std::sort(seconds.begin(), seconds.end());
    const double median = seconds[seconds.size() / 2];
    report_["median_seconds"] = median;
    report_["best_seconds"] = seconds.front();
    report_["tflops"] = flops / median * 1e-12;
    report_["peak_bytes"] = backend_->Memory().bytes_peak - before;
  }

  void Predict(std::size_t bytes) { report_["predicted_bytes"] = bytes; }
  void RequireFinite(const Tensor& tensor, const char* what) {
    if (CountNonFinite(*backend_, tensor) > 0) {
      throw Error(ErrorCode::kInternal, std::string(what) + " has values that are not finite");
    }
  }
  json Report() { return std::move(report_); }

 private:
  const NetworkBenchOptions& options_;
  ModelConfig config_;
  std::unique_ptr<Backend> backend_;
  DType dtype_;
  json report_;
};

}  // namespace

json BenchForward(const NetworkBenchOptions& options, AttentionKind attention) {
  Bench bench(options);
  Backend& backend = bench.backend();
  const TransformerConfig& config = bench.config().transformer;
  const auto transformer = bench.Load([&] {
    return std::make_unique<Transformer>(
        backend, Weights::Open(bench.Folder("transformer"), kDiffusersStem), config,
        LoadAdapters(options.folder, config), bench.dtype());
  });
  ClipSpec spec = bench.spec();
  spec.attention = attention;
  const ClipShape shape = ShapeOf(bench.config(), spec);
  const AttentionSetting setting = transformer->Setting(attention);
  const TextContext text = transformer->PrepareText(
      backend, bench.Random({config.text_len, config.text_dim}, bench.dtype()));
  const RopeTables rope =
      MakeRopeTables(backend, shape.grid, config.attention_head_dim, config.rope_max_seq_len);
  const Shape batch = {1, shape.channels, shape.frames, shape.height, shape.width};
  const Tensor latent = bench.Random(batch, DType::kF32);
  const Tensor velocity = backend.Allocate(batch, DType::kF32);
  const Tensor timestep = backend.Allocate({1}, DType::kF32);
  const std::vector<float> half = {500.0f};
  backend.Copy(Tensor::FromFloats({1}, half), timestep);
  const std::vector<const TextContext*> texts = {&text};
  const double flops = TransformerFlops(config, shape.grid.size(), attention, setting.map.topk);
  bench.Time(flops, [&] {
    transformer->Forward(backend, {.latent = latent,
                                   .timesteps = timestep,
                                   .text = texts,
                                   .rope = &rope,
                                   .attention = &setting,
                                   .velocity = velocity});
  });
  bench.Predict(StepBytes(bench.config(), spec, setting, bench.dtype(), backend.device()));
  bench.RequireFinite(velocity, "the velocity");
  json report = bench.Report();
  report["tokens"] = shape.grid.size();
  return report;
}

json BenchTextEncoder(const NetworkBenchOptions& options) {
  Bench bench(options);
  Backend& backend = bench.backend();
  const TextEncoderConfig& config = bench.config().text_encoder;
  const auto encoder = bench.Load([&] {
    return std::make_unique<TextEncoder>(
        backend, Weights::Open(bench.Folder("text_encoder"), "model"), config, bench.dtype());
  });
  constexpr std::int64_t kTokens = 512;
  std::vector<std::int32_t> ids;
  for (std::int64_t i = 0; i < kTokens; ++i) {
    ids.push_back(static_cast<std::int32_t>(i * 7919 % config.vocab_size));
  }
  const double inner = static_cast<double>(config.num_heads) * config.d_kv;
  const double per_layer = 2.0 * kTokens * config.d_model * (4 * inner + 3.0 * config.d_ff) +
                           4.0 * kTokens * kTokens * inner;
  Tensor embeddings;
  bench.Time(config.num_layers * per_layer, [&] { embeddings = encoder->Forward(backend, ids); });
  bench.RequireFinite(embeddings, "the text's embedding");
  json report = bench.Report();
  report["tokens"] = kTokens;
  return report;
}

json BenchDecoder(const NetworkBenchOptions& options) {
  Bench bench(options);
  Backend& backend = bench.backend();
  const auto decoder = bench.Load([&] {
    return std::make_unique<VideoDecoder>(backend,
                                          Weights::Open(bench.Folder("vae"), kDiffusersStem),
                                          bench.config().vae, bench.dtype());
  });
  const ClipShape shape = ShapeOf(bench.config(), bench.spec());
  const Tensor latents =
      bench.Random({shape.frames, shape.height, shape.width, shape.channels}, bench.dtype());
  Tensor frames;
  bench.Time(decoder->Flops(shape.frames, shape.height, shape.width), [&] {
    DecoderState state;
    for (std::int64_t i = 0; i < shape.frames; ++i) {
      frames = Tensor();  // its memory goes to the next piece
      frames = decoder->Decode(backend, latents.Slice(i, i + 1), state);
    }
  });
  bench.Predict(decoder->StateBytes(shape.height, shape.width) +
                decoder->WorkBytes(shape.height, shape.width));
  bench.RequireFinite(frames, "the last frame");
  json report = bench.Report();
  report["frames"] = options.num_frames;
  return report;
}

}  // namespace slalom
