// JobDesk: requests become jobs, and jobs stay in the books until they are forgotten.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "scheduler/job.h"
#include "server/config.h"
#include "server/job_store.h"

namespace slalom {

class JobArchive;
class Metrics;
class Scheduler;

struct JobDeskOptions {
  std::vector<TenantOptions> tenants;
  RetentionLimits retention;
  double checkpoint_seconds = 0;
  // Called about once a second, from the desk's thread.
  std::function<void()> on_tick;
};

// A request is checked and resolved (request.h); its JobRecord goes into the JobStore, its VideoJob
// into the Scheduler. A thread of its own, the janitor, tells waiting jobs their places once a
// second and forgets ended ones in time. Nothing here waits for a device. Thread-safe.
class JobDesk {
 public:
  // `archive` and `metrics` outlive it. Takes over the archive's jobs; throws Error when it is
  // damaged.
  JobDesk(JobDeskOptions options, JobArchive* archive, Metrics* metrics);
  ~JobDesk();

  JobDesk(const JobDesk&) = delete;
  JobDesk& operator=(const JobDesk&) = delete;

  // As in VideoService.
  void Serve(Scheduler* scheduler);
  void ParkQueue();
  bool Settle(SchedulerClock::time_point deadline);
  void Stop();

  // The scheduler, or UNAVAILABLE while the server warms up.
  Scheduler& Running() const;

  // The job that the request asks for: a new one, or the earlier one of its request_id. `*model` is
  // set once it is known to be one of ours. Throws Error when there is none.
  std::shared_ptr<JobRecord> Submit(
      const v1::GenerateVideoRequest& request, const TenantOptions& tenant,
      const std::optional<std::chrono::system_clock::time_point>& deadline, std::string* model);
  // A tenant's job; throws Error as JobStore::Find does.
  std::shared_ptr<JobRecord> Find(const std::string& id, const std::string& tenant) const;
  v1::Job Describe(const JobRecord& record) const;
  // A page of the tenant's jobs. Throws Error(kInvalidArgument).
  v1::ListJobsResponse List(const v1::ListJobsRequest& request, const std::string& tenant) const;

  // Why a request was refused for now, as a metric's label; null when waiting does not help.
  const char* RefusalReason(const Error& error) const;
  // When to try again, where waiting helps.
  std::optional<double> RetrySeconds(const Error& error) const;
  JobStore::Kept kept() const { return store_.kept(); }

 private:
  bool Readmit(Scheduler& scheduler, const std::shared_ptr<JobRecord>& record);
  void Start(Scheduler& scheduler, const std::shared_ptr<JobRecord>& record, const ClipSpec& spec,
             Checkpoint checkpoint);
  double WeightOf(const std::string& tenant) const;
  void SetPlaces(v1::ListJobsResponse* page) const;
  void Tick();
  void TellPlaces(const Scheduler& scheduler);
  void Sweep();

  const JobDeskOptions options_;
  JobArchive* const archive_;
  Metrics* const metrics_;
  JobStore store_;
  std::atomic<Scheduler*> scheduler_ = nullptr;
  std::atomic<double> next_end_seconds_ = 1;  // of some job: then there is room

  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;
  std::thread janitor_;  // last: it uses all of the above
};

}  // namespace slalom
