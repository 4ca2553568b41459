// Worker: the one thread that drives a device.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "model/pipeline.h"
#include "scheduler/job_table.h"

namespace slalom {

// Owns a device's pipelines and the jobs begun on it. In a loop it asks the table for its turn and
// does that one bounded piece of work; between two pieces jobs are cancelled, expire, come and go.
//
// It is one of the seams where an Error ends: it fails the job that it came from and no other.
// UNAVAILABLE from a pipeline means that the device is lost: the table hears of it, its jobs go
// back to the queue where another device serves their model, and fail otherwise; the thread ends.
class Worker {
 public:
  // All pipelines stand on one device. Start begins the thread.
  Worker(std::vector<std::unique_ptr<Pipeline>> pipelines, const SchedulerOptions& options,
         std::shared_ptr<JobTable> table);
  // Joins the thread; JobTable::Stop must have been called.
  ~Worker();
  void Start();

  // Null when this device does not have the model. Thread-safe.
  const Pipeline* Find(const std::string& model) const;
  // Of all its pipelines. Thread-safe.
  MemoryStats Memory() const;
  CacheStats PromptCacheUse() const;

 private:
  struct Outcome {
    std::optional<Error> error;
    double seconds = 0;
  };

  void Loop();
  void Begin(const JobPtr& job);
  void Denoise(const std::vector<JobPtr>& jobs);
  void Stepped(const JobPtr& job, int batch, double share);
  bool MakeCheckpoint(const JobPtr& job, double share);
  void Decode(const JobPtr& job);
  void End(const JobPtr& job, const std::optional<Error>& error);
  void Failed(const JobPtr& job, const Error& error);
  // `at_work`: whose piece of work it was.
  void LoseDevice(const Error& error, const std::vector<JobPtr>& at_work);
  template <typename Work>
  Outcome OnDevice(Work&& work);
  template <typename Call>
  bool Tell(const JobPtr& job, Call&& call);

  const std::vector<std::unique_ptr<Pipeline>> pipelines_;
  const SchedulerOptions options_;
  const std::shared_ptr<JobTable> table_;
  const std::string device_;
  const int index_;           // in the table
  std::vector<JobPtr> jobs_;  // begun here; the thread's alone
  bool lost_ = false;         // the thread's alone
  std::thread thread_;
};

}  // namespace slalom
