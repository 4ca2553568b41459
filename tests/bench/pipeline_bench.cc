// Times a model's pipeline piece by piece, without a server: one denoising step for every attention
// mode and size, and the decoding of a clip. Prints a table, or JSON for scripts.
//
//   pipeline_bench --model model/demo --sizes 256x256x33,384x384x49 --steps 5

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <exception>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/core/device.h"
#include "kernels/core/error.h"
#include "model/pipeline.h"

namespace slalom {
namespace {

struct Options {
  std::string model = "model/demo";
  std::string device = "cpu";
  std::string dtype = "auto";
  std::vector<std::string> sizes;  // WxHxF; empty: the model's default
  int steps = 5;
  int threads = 0;
  double topk = 0.0;  // 0: the adapter's
  bool decode = true;
  bool json = false;
};

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

double TimeDecode(const Pipeline& pipeline, Generation& clip) {
  const auto start = std::chrono::steady_clock::now();
  while (pipeline.DecodeNext(clip).num_frames() > 0) {
  }
  return Seconds(start);
}

nlohmann::json BenchSize(const Pipeline& pipeline, const Options& options, const Size& size) {
  nlohmann::json row = {{"width", size.width}, {"height", size.height}, {"frames", size.frames}};
  for (const ModelInfo::Attention& mode : pipeline.info().attention) {
    const ClipSpec spec =
        pipeline.Resolve(MakeRequest(size, options.steps + 1, mode.kind, options.topk));
    std::unique_ptr<Generation> clip;
    const StepTimes times = TimeSteps(pipeline, spec, &clip);
    row["steps"].push_back({{"attention", times.attention},
                            {"median_seconds", times.median_seconds},
                            {"best_seconds", times.best_seconds},
                            {"sparsity", times.sparsity}});
    if (options.decode && mode.kind == AttentionKind::kDense) {
      row["decode_seconds"] = TimeDecode(pipeline, *clip);
    }
  }
  return row;
}

void PrintTable(const nlohmann::json& report) {
  std::printf("%s on %s\n", report["model"].get<std::string>().c_str(),
              report["device"].get<std::string>().c_str());
  std::printf("%-14s %-8s %12s %12s %10s\n", "size", "mode", "step median", "step best",
              "sparsity");
  for (const auto& row : report["sizes"]) {
    const std::string size = std::to_string(row["width"].get<int>()) + "x" +
                             std::to_string(row["height"].get<int>()) + "x" +
                             std::to_string(row["frames"].get<int>());
    for (const auto& step : row["steps"]) {
      std::printf("%-14s %-8s %10.3f s %10.3f s %9.1f%%\n", size.c_str(),
                  step["attention"].get<std::string>().c_str(),
                  step["median_seconds"].get<double>(), step["best_seconds"].get<double>(),
                  100 * step["sparsity"].get<double>());
    }
    if (row.contains("decode_seconds")) {
      std::printf("%-14s %-8s %10.3f s\n", size.c_str(), "decode",
                  row["decode_seconds"].get<double>());
    }
  }
}

void Run(const Options& options) {
  const auto start = std::chrono::steady_clock::now();
  PipelineOptions pipeline_options;
  pipeline_options.device = ParseDevice(options.device);
  pipeline_options.dtype = options.dtype;
  pipeline_options.cpu_threads = options.threads;
  const auto pipeline = LoadPipeline(options.model, pipeline_options);
  nlohmann::json report = {{"model", pipeline->info().name},
                           {"device", pipeline->device_description()},
                           {"load_seconds", Seconds(start)}};

  std::vector<Size> sizes;
  for (const std::string& text : options.sizes) sizes.push_back(ParseSize(text));
  const ClipSpec& defaults = pipeline->info().defaults;
  if (sizes.empty()) sizes.push_back({defaults.width, defaults.height, defaults.num_frames});
  for (const Size& size : sizes) report["sizes"].push_back(BenchSize(*pipeline, options, size));

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
  CLI::App app("Times a pipeline's denoising steps and decoding.");
  app.add_option("--model", options.model, "model folder")->capture_default_str();
  app.add_option("--device", options.device, "cpu, cuda or cuda:N")->capture_default_str();
  app.add_option("--dtype", options.dtype, "auto, f32 or bf16")->capture_default_str();
  app.add_option("--sizes", options.sizes, "WxHxF, several with commas")->delimiter(',');
  app.add_option("--steps", options.steps, "steps that are counted")->check(CLI::Range(1, 100));
  app.add_option("--threads", options.threads, "CPU threads, 0: all");
  app.add_option("--topk", options.topk, "instead of the adapter's");
  app.add_flag("!--no-decode", options.decode, "do not decode");
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
