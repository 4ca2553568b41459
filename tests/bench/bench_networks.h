// Times the networks one by one, each alone on the device, at a clip's real shapes.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "model/pipeline.h"

namespace slalom {

// Median and best of some runs; the first, which warms caches and plans, is not counted.
struct RunTimes {
  double median_seconds = 0;
  double best_seconds = 0;
};

struct NetworkBenchOptions {
  std::string folder;
  Device device;
  std::string dtype = "auto";
  int threads = 0;
  int repeats = 3;
  int width = 0;
  int height = 0;
  int num_frames = 0;
};

// Each loads its network alone and gives an object with load_seconds, weight_bytes, what it timed
// (median_seconds, best_seconds, tflops) and memory: peak_bytes beside the weights, with
// predicted_bytes where there is a prediction. Throws what loading and running throw.

// One pass of the transformer with that attention and the model's adapter for it: batch 1, 512 rows
// of text.
nlohmann::json BenchForward(const NetworkBenchOptions& options, AttentionKind attention);
// 512 tokens through the text encoder.
nlohmann::json BenchTextEncoder(const NetworkBenchOptions& options);
// All latent frames of a clip, one per piece, without copying pixels to the host.
nlohmann::json BenchDecoder(const NetworkBenchOptions& options);

}  // namespace slalom
