// One GenerateVideo call of a load generator, without a thread of its own.
#pragma once

#include <grpcpp/alarm.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "slalom/v1/video_generation.grpc.pb.h"

namespace slalom::bench {

struct CallPlan {
  std::size_t load_class = 0;
  v1::GenerateVideoRequest request;
  std::string token;
  std::optional<double> deadline_seconds;
  double pause_seconds = 0;  // a slow reader's, between two messages
  int disconnect_after = 0;  // messages; 0: it stays
};

// Seconds from the call's start; negative: it did not come to that.
struct CallResult {
  std::size_t load_class = 0;
  bool disconnected = false;  // on purpose
  int code = 0;
  double accepted = -1;
  double first_byte = -1;
  double total = 0;
  std::int64_t bytes = 0;
};

// Starts the call; `done` is called from one of gRPC's threads. The channel lives until then.
void StartCall(v1::VideoGeneration::Stub& stub, CallPlan plan,
               std::function<void(const CallResult&)> done);

}  // namespace slalom::bench
