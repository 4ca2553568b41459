// Options of service_bench.
#pragma once

#include <string>
#include <vector>

#include "slalom/v1/video_generation.pb.h"

namespace slalom::bench {

struct ServiceBenchOptions {
  std::string slalomd;
  std::string model = "model/demo";
  std::string device = "cpu";
  int threads = 1;  // of a CPU device, which leaves the other cores to what is not device work
  v1::GenerateVideoRequest clip;
  int clients = 4;
  int rounds = 5;
  int clips = 8;  // per round

  std::vector<std::string> ServerArguments() const {
    return {"--models", model, "--device", device, "--cpu-threads", std::to_string(threads)};
  }
};

// Rounds' median, which one disturbed round does not move.
double Median(std::vector<double> values);

}  // namespace slalom::bench
