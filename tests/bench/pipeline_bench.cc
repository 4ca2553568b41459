// Times a model piece by piece, without a server: each network alone (one forward with each
// attention, 512 tokens of text, decoding), one denoising step with each, and whole clips with the
// seconds of each stage. Prints a table, or JSON for scripts; memory stands beside what was
// predicted.
//
//   pipeline_bench --model model/demo --sizes 256x256x33,384x384x49 --repeats 5
//   pipeline_bench --model /data/random-1.3b --device cuda --parts forward,text,decode --json

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <exception>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/device.h"
#include "kernels/core/error.h"
#include "model/config.h"
#include "model/pipeline.h"
#include "tests/bench/bench_networks.h"

namespace slalom {
namespace {

struct Options {
  std::string model = "model/demo";
  std::string device = "cpu";
  std::string dtype = "auto";
  std::vector<std::string> sizes;        // WxHxF; empty: the model's default
  std::vector<AttentionKind> attention;  // for forward and step; empty: all that the model has
  std::set<std::string> parts = {"forward", "text", "decode", "step", "clip"};
  int repeats = 5;
  int clip_steps = 0;  // 0: the model's default
  int threads = 0;
  double topk = 0.0;  // 0: the adapter's
  bool json = false;
};

// The dense pass is what others have, too, so that it has the plain name.
constexpr std::array<std::pair<const char*, AttentionKind>, 3> kForwards = {
    {{"forward", AttentionKind::kDense},
     {"forward_sla", AttentionKind::kSla},
     {"forward_salad", AttentionKind::kSalad}}};

struct Size {
  int width = 0;
  int height = 0;
  int frames = 0;
};

struct StepTimes {
  std::string attention;
  double median_seconds = 0;
  double best_seconds = 0;
  double sparsity = 0;
};

double Seconds(std::chrono::steady_clock::time_point since) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
}

const char* Name(AttentionKind kind) {
  static constexpr std::array kNames = {"dense", "sla", "salad"};
  return kNames[static_cast<std::size_t>(kind)];
}

bool Wanted(const Options& options, AttentionKind kind) {
  return options.attention.empty() || std::ranges::count(options.attention, kind) > 0;
}

Size ParseSize(const std::string& text) {
  Size size;
  char rest = 0;
  if (std::sscanf(text.c_str(), "%dx%dx%d%c", &size.width, &size.height, &size.frames, &rest) !=
      3) {
    throw Error(ErrorCode::kInvalidArgument, "--sizes: \"" + text + "\" is not WxHxF");
  }
  return size;
}

ClipRequest MakeRequest(const Size& size, int steps, AttentionKind attention, double topk) {
  ClipRequest request;
  request.prompt = "a red ball rolls from left to right over a green floor";
  request.width = size.width;
  request.height = size.height;
  request.num_frames = size.frames;
  request.steps = steps;
  request.seed = 1;
  request.attention = attention;
  if (attention != AttentionKind::kDense && topk > 0) request.topk = topk;
  return request;
}

// The first step warms caches and plans and is not counted.
StepTimes TimeSteps(const Pipeline& pipeline, const ClipSpec& spec,
                    std::unique_ptr<Generation>* clip) {
  *clip = pipeline.Begin(spec);
  const std::array<Generation*, 1> batch = {clip->get()};
  std::vector<double> seconds;
  while (!(*clip)->denoised()) {
    const auto start = std::chrono::steady_clock::now();
    if (const auto failed = pipeline.DenoiseStep(batch); !failed.empty()) {
      throw Error(ErrorCode::kInternal, failed.front().message);
    }
    if ((*clip)->step() > 1) seconds.push_back(Seconds(start));
  }
  std::sort(seconds.begin(), seconds.end());
  return {Name(spec.attention), seconds[seconds.size() / 2], seconds.front(),
          (*clip)->statistics().sparsity()};
}

// One step at a time of every attention mode.
nlohmann::json BenchSteps(const Pipeline& pipeline, const Options& options, const Size& size) {
  nlohmann::json rows = nlohmann::json::array();
  for (const ModelInfo::Attention& mode : pipeline.info().attention) {
    if (!Wanted(options, mode.kind)) continue;
    const ClipSpec spec =
        pipeline.Resolve(MakeRequest(size, options.repeats + 1, mode.kind, options.topk));
    std::unique_ptr<Generation> clip;
    const StepTimes times = TimeSteps(pipeline, spec, &clip);
    rows.push_back({{"attention", times.attention},
                    {"median_seconds", times.median_seconds},
                    {"best_seconds", times.best_seconds},
                    {"sparsity", times.sparsity}});
  }
  return rows;
}

// Prompt to pixels with the model's default attention. The peak counts from loading on, so it is
// this clip's only if no earlier one was larger.
nlohmann::json BenchClip(const Pipeline& pipeline, const Options& options, const Size& size) {
  const ClipSpec& defaults = pipeline.info().defaults;
  const int steps = options.clip_steps > 0 ? options.clip_steps : defaults.steps;
  const ClipSpec spec =
      pipeline.Resolve(MakeRequest(size, steps, defaults.attention, options.topk));
  const ClipCost cost = pipeline.Estimate(spec);
  const std::size_t before = pipeline.Memory().bytes_in_use;
  const auto start = std::chrono::steady_clock::now();
  const std::unique_ptr<Generation> clip = pipeline.Begin(spec);
  const double begin_seconds = Seconds(start);
  const std::array<Generation*, 1> batch = {clip.get()};
  while (!clip->denoised()) {
    if (const auto failed = pipeline.DenoiseStep(batch); !failed.empty()) {
      throw Error(ErrorCode::kInternal, failed.front().message);
    }
  }
  double first_frames_seconds = 0;
  while (pipeline.DecodeNext(*clip).num_frames() > 0) {
    if (first_frames_seconds == 0) first_frames_seconds = Seconds(start);
  }
  const double total = Seconds(start);
  const ClipStatistics& statistics = clip->statistics();
  const double explained = begin_seconds + statistics.denoise_seconds + statistics.decode_seconds;
  const std::size_t predicted =
      before + cost.waiting_bytes + std::max(cost.step_bytes, cost.decode_bytes);
  return {{"attention", Name(spec.attention)},
          {"steps", steps},
          {"guidance_scale", spec.guidance_scale},
          {"total_seconds", total},
          {"tokenize_seconds", statistics.tokenize_seconds},
          {"text_encode_seconds", statistics.text_encode_seconds},
          {"begin_seconds", begin_seconds},
          {"denoise_seconds", statistics.denoise_seconds},
          {"decode_seconds", statistics.decode_seconds},
          {"unexplained_seconds", total - explained},
          {"first_frames_seconds", first_frames_seconds},
          {"peak_bytes", pipeline.Memory().bytes_peak},
          {"predicted_bytes", predicted}};
}

nlohmann::json BenchNetworks(const Options& options, const Size& size) {
  const NetworkBenchOptions network = {.folder = options.model,
                                       .device = ParseDevice(options.device),
                                       .dtype = options.dtype,
                                       .threads = options.threads,
                                       .repeats = options.repeats,
                                       .width = size.width,
                                       .height = size.height,
                                       .num_frames = size.frames};
  nlohmann::json row = nlohmann::json::object();
  if (options.parts.contains("text")) row["text"] = BenchTextEncoder(network);
  for (const auto& [key, kind] : kForwards) {
    if (options.parts.contains("forward") && Wanted(options, kind)) {
      row[key] = BenchForward(network, kind);
    }
  }
  if (options.parts.contains("decode")) row["decode"] = BenchDecoder(network);
  return row;
}

void PrintTable(const nlohmann::json& report) {
  constexpr double kMiB = 1 << 20;
  std::printf("%s on %s\n", report["model"].get<std::string>().c_str(),
              report["device"].get<std::string>().c_str());
  for (const auto& row : report["sizes"]) {
    std::printf("%dx%dx%d\n", row["width"].get<int>(), row["height"].get<int>(),
                row["frames"].get<int>());
    for (const char* part : {"text", "forward", "forward_sla", "forward_salad", "decode"}) {
      if (!row.contains(part)) continue;
      const auto& one = row[part];
      std::printf(
          "  %-13s median %9.4f s  best %9.4f s  %8.2f TFLOP/s  load %7.2f s  peak %8.1f MiB", part,
          one["median_seconds"].get<double>(), one["best_seconds"].get<double>(),
          one["tflops"].get<double>(), one["load_seconds"].get<double>(),
          one["peak_bytes"].get<double>() / kMiB);
      if (one.contains("predicted_bytes")) {
        std::printf(", predicted %8.1f", one["predicted_bytes"].get<double>() / kMiB);
      }
      std::printf("\n");
    }
    for (const auto& step : row.value("steps", nlohmann::json::array())) {
      std::printf("  step %-6s median %6.3f s  best %6.3f s  sparsity %5.1f%%\n",
                  step["attention"].get<std::string>().c_str(),
                  step["median_seconds"].get<double>(), step["best_seconds"].get<double>(),
                  100 * step["sparsity"].get<double>());
    }
    if (row.contains("clip")) {
      const auto& clip = row["clip"];
      std::printf(
          "  clip     %d steps, %s: %.2f s = text %.3f + denoise %.2f + decode %.2f + other %.3f; "
          "first frames after %.2f s; peak %.1f MiB, predicted %.1f\n",
          clip["steps"].get<int>(), clip["attention"].get<std::string>().c_str(),
          clip["total_seconds"].get<double>(), clip["begin_seconds"].get<double>(),
          clip["denoise_seconds"].get<double>(), clip["decode_seconds"].get<double>(),
          clip["unexplained_seconds"].get<double>(), clip["first_frames_seconds"].get<double>(),
          clip["peak_bytes"].get<double>() / kMiB, clip["predicted_bytes"].get<double>() / kMiB);
    }
  }
}

std::vector<Size> Sizes(const Options& options) {
  std::vector<Size> sizes;
  for (const std::string& text : options.sizes) sizes.push_back(ParseSize(text));
  if (sizes.empty()) {
    const ClipDefaults defaults = LoadModelConfig(options.model).defaults;
    sizes.push_back({defaults.width, defaults.height, defaults.num_frames});
  }
  return sizes;
}

void Run(const Options& options) {
  const std::vector<Size> sizes = Sizes(options);
  const PipelineOptions pipeline_options = {.device = ParseDevice(options.device),
                                            .dtype = options.dtype,
                                            .cpu_threads = options.threads};
  nlohmann::json report = {{"model", options.model},
                           {"device", MakeBackend(pipeline_options.device)->Describe()},
                           {"dtype", options.dtype}};
  for (const Size& size : sizes) {
    nlohmann::json row = {{"width", size.width}, {"height", size.height}, {"frames", size.frames}};
    row.update(BenchNetworks(options, size));
    report["sizes"].push_back(row);
  }
  // The networks alone are gone by now: the pipeline has the device to itself.
  if (options.parts.contains("step") || options.parts.contains("clip")) {
    const auto start = std::chrono::steady_clock::now();
    const auto pipeline = LoadPipeline(options.model, pipeline_options);
    report["load_seconds"] = Seconds(start);
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      nlohmann::json& row = report["sizes"][i];
      if (options.parts.contains("clip")) row["clip"] = BenchClip(*pipeline, options, sizes[i]);
      if (options.parts.contains("step")) row["steps"] = BenchSteps(*pipeline, options, sizes[i]);
    }
  }
  if (options.json) {
    std::cout << report.dump(2) << "\n";
  } else {
    PrintTable(report);
  }
}

}  // namespace
}  // namespace slalom

int main(int argc, char** argv) {
  slalom::Options options;
  CLI::App app("Times a model's networks, denoising steps and whole clips.");
  app.add_option("--model", options.model, "model folder")->capture_default_str();
  app.add_option("--device", options.device, "cpu, cuda or cuda:N")->capture_default_str();
  app.add_option("--dtype", options.dtype, "auto, f32 or bf16")->capture_default_str();
  app.add_option("--sizes", options.sizes, "WxHxF, several with commas")->delimiter(',');
  app.add_option("--parts", options.parts, "of forward, text, decode, step, clip; default: all")
      ->delimiter(',')
      ->check(CLI::IsMember({"forward", "text", "decode", "step", "clip"}));
  app.add_option("--attention", options.attention, "of dense, sla, salad, for forward and step")
      ->delimiter(',')
      ->transform(CLI::CheckedTransformer(
          std::map<std::string, slalom::AttentionKind>{{"dense", slalom::AttentionKind::kDense},
                                                       {"sla", slalom::AttentionKind::kSla},
                                                       {"salad", slalom::AttentionKind::kSalad}}));
  app.add_option("--repeats", options.repeats, "runs that are counted")->check(CLI::Range(1, 99));
  app.add_option("--clip-steps", options.clip_steps, "denoising steps of a whole clip, 0: default");
  app.add_option("--threads", options.threads, "CPU threads, 0: all");
  app.add_option("--topk", options.topk, "instead of the adapter's");
  app.add_flag("--json", options.json, "JSON instead of a table");
  CLI11_PARSE(app, argc, argv);
  try {
    slalom::Run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pipeline_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
