// A job as the outside sees it: what is asked for, what is reported, and the handle that steers it.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/core/error.h"
#include "kernels/core/tensor.h"
#include "model/pipeline.h"

namespace slalom {

// Deadlines and waits are measured on this clock; it never jumps.
using SchedulerClock = std::chrono::steady_clock;

enum class Priority { kLow, kNormal, kHigh };
inline constexpr int kNumPriorities = 3;
const char* PriorityName(Priority priority);  // "low", "normal", "high"

// Also the stage that Progress names. A job moves down this list and ends in one of the last three;
// only the loss of its device puts it back to the start.
enum class JobState { kQueued, kEncoding, kDenoising, kDecoding, kSucceeded, kFailed, kCancelled };
const char* JobStateName(JobState state);  // "queued", "encoding", ...
constexpr bool IsFinal(JobState state) { return state >= JobState::kSucceeded; }

struct Progress {
  JobState stage = JobState::kQueued;
  int step = 0;  // denoising steps done
  int steps = 0;
  int frames = 0;  // frames decoded
  int num_frames = 0;
  double eta_seconds = 0;   // until the last frame is out, jobs ahead included
  double step_seconds = 0;  // the last denoising step, shared by its whole batch
  double sparsity = 0;      // measured, mean over layers; 0 when dense
};

// How a job ended and where its time went. The same for success, failure and cancellation; what was
// not reached is 0.
struct JobResult {
  JobState state = JobState::kFailed;  // kSucceeded, kFailed or kCancelled
  std::optional<Error> error;          // set unless kSucceeded
  double queue_seconds = 0;            // from Submit to the first device work
  double begin_seconds = 0;            // tokenizing and text encoding
  double denoise_seconds = 0;          // this job's share of its batches
  double decode_seconds = 0;
  double device_seconds = 0;  // the sum of the three: what the tenant used
  double total_seconds = 0;   // from Submit to the end
  int frames = 0;             // handed to OnFrames
  // From Cancel() until the job held nothing on the device any more.
  std::optional<double> cancel_to_free_seconds;
  ClipStatistics statistics;
};

// What can be asked about a job at any time, also for a while after its end.
struct JobStatus {
  std::string id;
  std::string model;
  std::string tenant;
  std::string device;  // "cuda:0"; empty while queued
  Priority priority = Priority::kNormal;
  ClipSpec spec;
  JobState state = JobState::kQueued;
  int step = 0;
  int frames = 0;
  int queue_position = 0;  // jobs that go first; 0 once it has begun
  double eta_seconds = 0;  // until the last frame is out; 0 after the end
  std::chrono::system_clock::time_point submitted;
  std::optional<Error> error;  // once kFailed or kCancelled
};

// Where a live job stands: as in its JobStatus.
struct JobPlace {
  std::string id;
  bool queued = false;
  int queue_position = 0;
  double eta_seconds = 0;
};

class JobHandle;

// RESOURCE_EXHAUSTED that goes away by itself: too many jobs wait.
class QueueFull : public Error {
 public:
  explicit QueueFull(const std::string& message) : Error(ErrorCode::kResourceExhausted, message) {}
};

// A begun clip as Pipeline::Save gives it.
using Checkpoint = std::shared_ptr<const std::vector<std::byte>>;

// Where a job's output goes: one client's bounded queues. The scheduler keeps it alive until OnDone
// has returned. Calls for one job never overlap, come in the order OnAccepted, (OnProgress |
// OnPreview | OnFrames | OnCheckpoint)*, OnDone, and must not block: they run on the thread that
// drives the device. They may call JobHandle::Cancel and Wake and Scheduler's const methods.
//
// OnProgress, OnPreview, OnFrames and OnCheckpoint may throw Error (an encoder that fails, a full
// disk): the job then fails with that error and other jobs go on.
class JobSink {
 public:
  virtual ~JobSink() = default;

  // From inside Submit, on its thread, before any other call. `status` has the queue position and
  // the ETA. If it throws, Submit rethrows and the job never was.
  virtual void OnAccepted(const JobHandle& handle, const JobStatus& status) = 0;
  virtual void OnProgress(const Progress& progress) = 0;
  virtual void OnPreview(const Tensor& image) = 0;  // host [h, w, 3] u8 RGB
  virtual void OnFrames(const FrameBatch& frames) = 0;
  // Where the job could go on from if the process ended now. Only for jobs that ask for it.
  virtual void OnCheckpoint(const Checkpoint&) {}
  // The last call, exactly once for every accepted job, whatever happened to it. The job holds no
  // device memory any more.
  virtual void OnDone(const JobResult& result) noexcept = 0;

  // False while the client's queue has no room for another FrameBatch: the job is then not decoded
  // and others run meanwhile. Call JobHandle::Wake when there is room again. Called from the
  // worker's thread at any time after OnAccepted, without locks of the scheduler.
  virtual bool WantsFrames() const noexcept = 0;
};

struct JobRequest {
  std::string id;     // unique among live jobs; empty: Submit makes one
  std::string model;  // empty: the scheduler's first
  ClipSpec spec;      // from Pipeline::Resolve
  Priority priority = Priority::kNormal;
  std::string tenant;
  double tenant_weight = 1.0;  // the tenant's share of device seconds, against other tenants'
  std::optional<SchedulerClock::time_point> deadline;
  int preview_every = 0;  // denoising steps between previews; 0: none
  // Accepted once, by an earlier process: neither a full queue nor the estimate for its deadline
  // refuses it now.
  bool readmitted = false;
  // Where to go on from; a damaged one is as good as none. Null: from the start.
  Checkpoint checkpoint;
  // Seconds of its denoising between two checkpoints; there is one more after the last step. 0:
  // none.
  double checkpoint_seconds = 0;
  std::shared_ptr<JobSink> sink;
};

struct Job;
class JobTable;

// Refers to a job; cheap to copy, safe to use from any thread, also after the job's end or the
// scheduler's: then Cancel and Wake do nothing.
class JobHandle {
 public:
  JobHandle() = default;
  JobHandle(std::shared_ptr<Job> job, std::weak_ptr<JobTable> table);

  const std::string& id() const;
  // Asks for the end of the job. It ends, with CANCELLED or the given reason, before its device
  // starts another step; OnDone tells when. The first reason wins.
  void Cancel() const;
  void Cancel(const Error& reason) const;
  // Tells the scheduler that the sink's WantsFrames may have turned true. May be called with the
  // sink's own lock held.
  void Wake() const;

 private:
  std::shared_ptr<Job> job_;
  std::weak_ptr<JobTable> table_;
};

}  // namespace slalom
