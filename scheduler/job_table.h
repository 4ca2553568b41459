// JobTable: every job that is not over, and the state that threads share about it. The scheduler
// puts jobs in, workers take turns out; one mutex, held for bookkeeping only, never during device
// work or a sink's calls.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "model/pipeline.h"
#include "scheduler/job.h"
#include "scheduler/options.h"
#include "scheduler/policy.h"

namespace slalom {

struct Job {
  static constexpr int kNoWorker = -1;
  static constexpr int kSweeper = -2;

  // Set before the job is shared, then constant (`request.sink` goes with the job's end).
  JobRequest request;
  SchedulerClock::time_point submitted;
  std::chrono::system_clock::time_point submitted_at;

  // Guarded by the table's mutex.
  int owner = kNoWorker;      // the worker that has begun it, or that nobody may begin it any more
  bool published = false;     // OnAccepted has returned
  std::uint64_t devices = 0;  // bit w: worker w may run it; only its owner's, once it has begun
  JobState state = JobState::kQueued;
  JobView view;  // its keys refer to the strings below
  std::string batch_key;
  std::string likely_key;
  int frames = 0;
  std::optional<Error> end_reason;  // someone wants it to end
  SchedulerClock::time_point end_requested;
  std::optional<SchedulerClock::time_point> stalled_since;
  std::optional<Error> error;  // how it ended

  // Written by the owner before it asks for a turn.
  std::atomic<bool> wants_frames{true};

  // The owner's alone.
  std::unique_ptr<Generation> generation;  // dropped before OnDone
  JobResult result;                        // the timings, as they grow
  Checkpoint checkpoint;                   // the newest; what Begin goes on from
  double unsaved_seconds = 0;              // of denoising since then
};

using JobPtr = std::shared_ptr<Job>;

// Thread-safe.
class JobTable {
 public:
  explicit JobTable(const SchedulerOptions& options) : options_(options) {}

  // Before any job comes. Returns the worker's index. Throws Error(kInvalidArgument) when there are
  // more than 64.
  int AddWorker(const std::string& device, const std::string& description,
                std::vector<std::string> models);

  // --- Scheduler ---

  // Adds a job that no worker sees yet. Throws as Scheduler::Submit does.
  JobPtr Insert(JobRequest request, const ClipCost& cost);
  void Publish(const JobPtr& job);
  void Withdraw(const JobPtr& job);  // instead of Publish
  // Ends the job before its next piece of work. False when it is over already. The first reason
  // wins.
  bool RequestEnd(Job& job, const Error& reason);
  bool RequestEnd(const std::string& id, const Error& reason);
  // Returns how many jobs it asked to end.
  int RequestEndOfAll(const Error& reason);
  void StopAccepting();
  // Waits until no job is live. False when that takes past the deadline.
  bool WaitUntilEmpty(std::optional<SchedulerClock::time_point> deadline);
  // Makes NextTurn and NextSweep return stop. Once no job is live.
  void Stop();

  std::optional<JobStatus> Find(const std::string& id) const;
  std::vector<JobStatus> List() const;
  JobStatus Status(const JobPtr& job) const;
  SchedulerStats Stats() const;
  bool accepting() const;
  bool healthy() const;

  // --- Workers and the sweeper ---

  // A job that must end now, and why. The caller owns it, and calls End.
  struct Ending {
    JobPtr job;
    Error reason;
  };
  struct Turn {
    bool stop = false;
    std::vector<Ending> endings;              // to be done first, then ask again
    Action::Kind kind = Action::Kind::kWait;  // otherwise one piece of work
    std::vector<JobPtr> jobs;
  };
  // What a worker does next. Blocks while there is nothing to do and the epoch is the given one;
  // may return an empty turn.
  Turn NextTurn(int worker, std::uint64_t epoch);
  // Blocks until queued jobs must end: asked for, past their deadline, or nobody left to run them.
  Turn NextSweep();

  // Grows with everything that can change a worker's mind. Read it, then ask the sinks for room,
  // then call NextTurn with it: so no Wake is lost.
  std::uint64_t epoch() const;
  void Wake();

  // The owner's reports. Each returns the job's progress as it now stands.
  Progress ReportBegun(const JobPtr& job, int max_batch);
  Progress ReportStep(const JobPtr& job, double seconds);  // seconds: this job's share
  Progress ReportFrames(const JobPtr& job, int frames);
  Progress CurrentProgress(const JobPtr& job) const;
  // From now on it is stepped by itself.
  void StepAlone(const JobPtr& job);
  void AddBusy(int worker, double seconds);
  void MarkLost(int worker);

  // Ends a job that the caller owns and that holds nothing on the device: fills in its result,
  // calls the sink's OnDone and forgets the job. No error: it succeeded.
  void End(const JobPtr& job, const std::optional<Error>& error);

 private:
  struct WorkerRecord {
    std::vector<std::string> models;
    DeviceStats stats;
  };

  // All with mutex_ held.
  void Changed();
  std::uint64_t WorkersFor(const std::string& model) const;  // healthy ones, as bits
  void CheckRoom(const JobRequest& request, const ClipCost& cost) const;
  Job* FindLive(const std::string& id) const;
  bool RequestEndLocked(Job& job, const Error& reason);
  // What goes before a job on the devices that may run it.
  struct Ahead {
    int jobs = 0;
    double seconds = 0;  // of one device
  };
  Ahead CountAhead(const Job& job) const;
  static double EtaSeconds(const Job& job, const Ahead& ahead);
  JobStatus StatusLocked(const Job& job, const Ahead& ahead) const;
  Progress ProgressLocked(const Job& job) const;
  void UpdateStall(Job& job, SchedulerClock::time_point now) const;
  // Why the job may not go on, if so; else when to look again, if earlier than `*look_again`.
  std::optional<Error> WhyEnd(const Job& job, SchedulerClock::time_point now,
                              SchedulerClock::time_point* look_again) const;
  void Take(int worker, const Action& action, Turn* turn);

  const SchedulerOptions options_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t epoch_ = 0;
  std::uint64_t next_sequence_ = 0;
  bool accepting_ = true;
  bool stop_ = false;
  std::vector<WorkerRecord> workers_;
  std::vector<JobPtr> live_;        // in the policy's order
  std::deque<JobStatus> finished_;  // newest first
};

}  // namespace slalom
