// JobTable: every job that is not over, and the state that threads share about it. The scheduler
// puts jobs in, workers take turns out; one mutex, held for bookkeeping only, never during device
// work or a sink's calls.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "model/pipeline.h"
#include "scheduler/cost_model.h"
#include "scheduler/job.h"
#include "scheduler/job_queue.h"
#include "scheduler/options.h"
#include "scheduler/placement.h"
#include "scheduler/policy.h"

namespace slalom {

struct Job : QueuedJob, std::enable_shared_from_this<Job> {
  static constexpr int kNoWorker = -1;
  static constexpr int kSweeper = -2;

  // Set before the job is shared, then constant (`request.sink` goes with the job's end).
  JobRequest request;
  SchedulerClock::time_point submitted;
  std::chrono::system_clock::time_point submitted_at;
  ClipCost prior;               // Pipeline::Estimate's
  double promised_seconds = 0;  // the ETA when it was accepted

  // Guarded by the table's mutex, as is QueuedJob.
  int owner = kNoWorker;  // the worker that has begun it, or that nobody may begin it any more
  JobState state = JobState::kQueued;
  std::string batch_key;
  std::string likely_key;
  int frames = 0;                   // handed to the sink
  std::optional<Error> end_reason;  // someone wants it to end
  SchedulerClock::time_point end_requested;
  std::optional<SchedulerClock::time_point> stalled_since;
  double wait_seconds = 0;  // for others, as last counted
  SchedulerClock::time_point count_wait_at;
  std::optional<Error> error;  // how it ended

  // Written by the owner before it asks for a turn.
  std::atomic<bool> wants_frames{true};

  // The owner's alone.
  std::unique_ptr<Generation> generation;  // dropped before OnDone
  JobResult result;                        // the timings, as they grow
  Checkpoint checkpoint;                   // the newest; what Begin goes on from
  double unsaved_seconds = 0;              // of denoising since then
  int decoded = 0;                         // frames, on this device
  double decode_seconds = 0;               // likewise
  int devices_lost = 0;                    // while a piece of this job ran on them
};

using JobPtr = std::shared_ptr<Job>;

// Thread-safe.
class JobTable {
 public:
  explicit JobTable(const SchedulerOptions& options);

  // Before any job comes. Returns the worker's index. Throws Error(kInvalidArgument) when there are
  // more than 64.
  int AddWorker(const std::string& device, const std::string& description,
                std::vector<std::string> models);

  // --- Scheduler ---

  // Adds a job that no worker sees yet. Throws as Scheduler::Submit does.
  JobPtr Insert(JobRequest request, const ClipCost& prior);
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
  std::vector<JobPlace> Places() const;
  JobStatus Status(const JobPtr& job) const;
  SchedulerStats Stats() const;
  std::string CostState() const;
  bool accepting() const;
  bool healthy() const;
  bool lost() const;

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

  // The owner's reports. Those that return a Progress say how the job now stands.
  Progress ReportBegun(const JobPtr& job, int max_batch);
  Progress ReportStep(const JobPtr& job, int batch);   // it shared its step with batch - 1 others
  Progress ReportFrames(const JobPtr& job, int sent);  // after job->decoded has grown
  Progress CurrentProgress(const JobPtr& job) const;
  // From now on it is stepped by itself.
  void StepAlone(const JobPtr& job);
  void AddBusy(int worker, double seconds);
  // What a piece of work took: the cost model learns from it.
  void ObserveBegin(const Job& job, double seconds);
  void ObserveStep(const Job& job, int batch, double seconds);
  void ObserveBytes(const Job& job, CostPhase phase, int batch, std::size_t bytes);
  void ObserveOutOfMemory(const Job& job, CostPhase phase);
  void MarkLost(int worker);
  // Whether a device is left that could run the job.
  bool CanRunElsewhere(const JobPtr& job) const;
  // Back to the queue, to begin anew (or from its checkpoint) on another device. The owner has
  // dropped the generation, and owns the job no more.
  void Requeue(const JobPtr& job);

  // Ends a job that the caller owns and that holds nothing on the device: fills in its result,
  // calls the sink's OnDone and forgets the job. No error: it succeeded.
  void End(const JobPtr& job, const std::optional<Error>& error);

 private:
  struct WorkerRecord {
    std::vector<std::string> models;
    std::vector<int> pools;                 // one per model
    std::vector<std::array<int, 3>> kinds;  // costs_' numbers, per model and attention
    DeviceStats stats;
    std::vector<JobPtr> begun;
  };

  // All with mutex_ held.
  void Changed();
  std::uint64_t DevicesOf(int pool) const;  // healthy ones, as bits
  int PoolOf(const std::string& model) const;
  int KindOf(const Job& job, int worker) const;
  ClipCost CostOn(const Job& job, int worker) const;
  ClipCost LeastCost(const Job& job) const;  // on the device that is best for it
  void CheckRoom(const Job& job) const;
  void CheckDeadline(const Job& job, double eta) const;
  Job* FindLive(const std::string& id) const;
  bool RequestEndLocked(Job& job, const Error& reason);
  void LeaveQueue(Job& job);
  void RemoveFromWorker(const JobPtr& job);
  void CountEnd(const Job& job);

  // Why the job may not go on, if so; else when to look again, if earlier than `*look_again`.
  std::optional<Error> WhyEnd(const Job& job, SchedulerClock::time_point now,
                              SchedulerClock::time_point* look_again) const;
  void UpdateStall(Job& job, SchedulerClock::time_point now) const;
  // The queued jobs that a worker chooses from; true when one was left to another device.
  bool AddCandidates(int worker, SchedulerClock::time_point now, std::vector<JobPtr>* jobs,
                     std::vector<JobView>* views);
  bool PlacedHere(const Job& job, int worker, std::vector<double>* handed_on) const;
  // Predicts anew what is live, now and then: what came early was predicted badly.
  void Reestimate(SchedulerClock::time_point now);
  void Take(int worker, const Action& action, const std::vector<JobPtr>& shown, Turn* turn);

  void RefreshRank(Job& job) const;
  void AddTo(Forecast* forecast, const Job& job) const;
  Forecast::Wait WaitOf(const Forecast& forecast, const Job& job) const;
  Forecast::Wait WaitOf(Job& job) const;  // looks at all live jobs
  // The same, of a begun job, from time to time.
  double RecentWait(Job& job) const;
  std::vector<Job*> LiveInOrder() const;
  JobStatus StatusLocked(const Job& job, const Forecast::Wait& wait) const;
  Progress ProgressLocked(Job& job) const;

  const SchedulerOptions options_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t epoch_ = 0;
  std::uint64_t next_sequence_ = 0;
  bool accepting_ = true;
  bool stop_ = false;
  std::vector<WorkerRecord> workers_;
  std::vector<std::string> models_;  // a pool is one model's devices, by its index here
  CostModel costs_;
  std::uint64_t observed_ = 0;  // measurements
  std::uint64_t reestimate_after_ = 1;
  SchedulerClock::time_point reestimate_at_;
  JobQueue queue_;
  std::map<std::uint64_t, JobPtr> live_;         // by sequence
  std::unordered_map<std::string, Job*> by_id_;  // those that are not over
  // The sweeper's: queued jobs that must end, and those that will at a time.
  std::vector<JobPtr> to_sweep_;
  std::set<std::pair<SchedulerClock::time_point, Job*>> queued_deadlines_;
  int queued_ = 0;
  std::deque<JobStatus> finished_;  // newest first
  DurationStats cancel_to_free_;
  std::int64_t requeued_ = 0;
  EtaError eta_error_;
};

}  // namespace slalom
