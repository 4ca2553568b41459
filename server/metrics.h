// Every number that the server publishes, in Prometheus' text format. The names and labels are
// those of deploy/'s dashboards.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "kernels/core/error.h"
#include "model/pipeline.h"
#include "scheduler/job.h"
#include "scheduler/options.h"

namespace slalom {

// "dense", "sla", "salad".
const char* AttentionName(AttentionKind kind);

// Thread-safe.
class Metrics {
 public:
  Metrics();
  ~Metrics();

  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // A GenerateVideo that has ended, refused ones included. `model` and `attention` are labels: pass
  // names that the server knows, or "", never a client's own text. `code` 0 is OK.
  void CountRequest(const std::string& model, const std::string& attention, int code);
  // A request that was refused for now: "rate", "quota", "queue", "streams".
  void CountRefusal(const std::string& reason);
  void CountReadmitted(int jobs);
  struct Service {
    int streams = 0;
    int kept_jobs = 0;
    std::int64_t kept_video_bytes = 0;
  };
  void SetService(const Service& service);
  void CountDenseFallback(const std::string& reason);
  void ObserveStep(const StepObservation& step);
  void ObserveFirstByte(double seconds);
  // A job's end on the device, whatever it was.
  void ObserveJob(const std::string& model, const std::string& tenant, const JobResult& result);
  // A video whose last byte is there.
  void ObserveVideo(double encode_seconds, double request_seconds, int frames, int fps);

  // The text, with the scheduler's state of now; `stats` is null while warming up.
  std::string Text(const SchedulerStats* stats);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace slalom
