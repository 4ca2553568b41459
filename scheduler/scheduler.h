// Scheduler: accepts jobs, queues them, runs them on its workers.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model/pipeline.h"
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
  // Called from worker threads; must not block. May be empty.
  std::function<void(const StepObservation&)> on_step;
};

struct DeviceStats {
  std::string device;
  std::string description;
  bool healthy = true;
  int in_flight = 0;
  double busy_seconds = 0;  // in pipeline calls, since the start
};

struct SchedulerStats {
  std::array<int, kNumPriorities> queued{};  // by Priority
  int in_flight = 0;
  std::vector<DeviceStats> devices;
};

// All methods are thread-safe. Pipelines are grouped by device: one worker thread drives all of a
// device's pipelines, one bounded piece of work at a time. Jobs of one model are served by every
// device that has it.
class Scheduler {
 public:
  // Takes the pipelines and starts the workers. Pipelines with the same model name must stand on
  // different devices and be the same model. Throws Error(kInvalidArgument) when there are none or
  // two share name and device.
  Scheduler(std::vector<std::unique_ptr<Pipeline>> pipelines, SchedulerOptions options);
  // Drain with no time left, then joins the workers.
  ~Scheduler();

  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // One per model name, in the order given to the constructor.
  std::vector<ModelInfo> Models() const;
  // A pipeline of that model, for Resolve and Estimate (thread-safe ones). Empty: the first model.
  // Throws Error(kNotFound) that names the models there are.
  const Pipeline& pipeline(const std::string& model) const;

  // Queues a job. The sink's OnAccepted is called before it returns, OnDone exactly once later.
  // Throws Error, and then never calls OnDone:
  //   kNotFound           no such model
  //   kAlreadyExists      a live job has that id
  //   kUnavailable        draining, or every device of that model is lost
  //   kResourceExhausted  the queue is full, or the clip can never fit the device's memory
  //   kDeadlineExceeded   the cost model says that the deadline cannot be met; says the estimate
  JobHandle Submit(JobRequest request);

  // False when no such job is live.
  bool Cancel(const std::string& id);

  std::optional<JobStatus> Find(const std::string& id) const;
  // Live jobs in the order in which they will run, then finished ones, newest first.
  std::vector<JobStatus> List() const;
  SchedulerStats Stats() const;

  // False once draining has begun.
  bool accepting() const;
  // Every device works; a lost one makes it false for good.
  bool healthy() const;

  // Refuses new jobs from now on (returns at once).
  void StopAccepting();
  // StopAccepting, then waits until every job is done. What still runs at the deadline is ended
  // with UNAVAILABLE, within one step. Returns true when nothing had to be ended.
  bool Drain(SchedulerClock::time_point deadline);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace slalom
