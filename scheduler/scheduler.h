// Scheduler: accepts jobs, queues them, runs them on its workers.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "model/pipeline.h"
#include "scheduler/job.h"
#include "scheduler/options.h"

namespace slalom {

class Worker;

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
  //   kResourceExhausted  the queue is full (then it is a QueueFull), or the clip can never fit the
  //                       device's memory
  //   kDeadlineExceeded   the cost model says that the deadline cannot be met; says the estimate
  JobHandle Submit(JobRequest request);

  // False when no such job is live.
  bool Cancel(const std::string& id);

  std::optional<JobStatus> Find(const std::string& id) const;
  // Live jobs in the order in which they will run, then finished ones, newest first.
  std::vector<JobStatus> List() const;
  // Of the live jobs, in that order: what changes while they wait, and cheap.
  std::vector<JobPlace> Places() const;
  SchedulerStats Stats() const;
  // What the cost model has learned, a few kilobytes of text, for SchedulerOptions::cost_state
  // after a restart.
  std::string CostState() const;

  // False once draining has begun.
  bool accepting() const;
  // Every device works; a lost one makes it false for good.
  bool healthy() const;
  // Every device is lost: only a new process can go on.
  bool lost() const;

  // Refuses new jobs from now on (returns at once).
  void StopAccepting();
  // StopAccepting, then waits until every job is done. What still runs at the deadline is ended
  // with UNAVAILABLE, within one step. Returns true when nothing had to be ended.
  bool Drain(SchedulerClock::time_point deadline);

 private:
  void SweepLoop();

  std::vector<std::string> models_;  // in the order given; the first is the default
  std::shared_ptr<JobTable> table_;  // handles outlive the scheduler
  std::vector<std::unique_ptr<Worker>> workers_;
  std::thread sweeper_;  // ends queued jobs: no worker has to look at them
};

}  // namespace slalom
