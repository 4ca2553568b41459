// How a scheduler is set up, and what it tells about itself.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "scheduler/cost_model.h"
#include "scheduler/job.h"
#include "scheduler/policy.h"

namespace slalom {

// One denoising step that has run, for histograms.
struct StepObservation {
  std::string device;
  std::string model;
  AttentionKind attention = AttentionKind::kDense;
  int batch_size = 0;
  double seconds = 0;
};

struct SchedulerOptions {
  int max_queue = 64;  // jobs accepted and not yet begun, all models together
  PolicyLimits limits;
  // A client that takes no frames for so long loses its job: decoder state is held for it. 0:
  // never.
  double stall_seconds = 120;
  int keep_finished = 256;  // finished jobs that Find and List still know
  // What Scheduler::CostState said before a restart; "" or anything else: learn from the start.
  std::string cost_state;
  // Called from worker threads; must not block. May be empty.
  std::function<void(const StepObservation&)> on_step;
};

struct DeviceStats {
  std::string device;
  std::string description;
  bool healthy = true;
  int in_flight = 0;
  double busy_seconds = 0;  // in pipeline calls, since the start
  MemoryStats memory;       // of its pipelines together
  CacheStats prompt_cache;  // likewise
};

struct DurationStats {
  std::int64_t count = 0;
  double last = 0;
  double mean = 0;
  double max = 0;
};

// How the ETA given at Submit compares with what jobs then took, over about the last hundred that
// succeeded.
struct EtaError {
  std::int64_t samples = 0;
  double mean_error = 0;  // of |taken - promised| / taken
  double bias = 0;        // of (promised - taken) / taken: above 0 when it promises too little
};

struct SchedulerStats {
  std::array<int, kNumPriorities> queued{};  // by Priority
  int in_flight = 0;
  std::vector<DeviceStats> devices;
  std::vector<CostError> cost_errors;
  EtaError eta_error;
  // From a cancel, a deadline or a drain to the moment when the job held nothing on its device.
  DurationStats cancel_to_free;
  std::int64_t requeued = 0;  // jobs that a lost device gave back
};

}  // namespace slalom
