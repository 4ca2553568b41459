// JobTable: what can be asked about jobs and devices.
#include <algorithm>

#include "scheduler/job_table.h"

namespace slalom {

Job* JobTable::FindLive(const std::string& id) const {
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : found->second;
}

// --- Who goes first ---

// What its tenant uses moves a job.
void JobTable::RefreshRank(Job& job) const {
  if (job.tenant >= 0) job.view.rank = queue_.RankOf(job);
}

void JobTable::AddTo(Forecast* forecast, const Job& job) const {
  if (IsFinal(job.state) || job.owner == Job::kSweeper || job.end_reason || job.view.stalled()) {
    return;
  }
  const double seconds = Policy::RemainingSeconds(job.view);
  if (job.owner >= 0) {
    forecast->AddBegun(job.owner, seconds);
  } else {
    forecast->AddQueued(DevicesOf(job.pool), seconds);
  }
}

Forecast::Wait JobTable::WaitOf(const Forecast& forecast, const Job& job) const {
  return job.owner >= 0 ? forecast.ForBegun(job.owner) : forecast.ForQueued(DevicesOf(job.pool));
}

Forecast::Wait JobTable::WaitOf(Job& job) const {
  RefreshRank(job);
  Forecast forecast(workers_.size());
  for (const auto& [sequence, other] : live_) {
    if (other.get() == &job) continue;
    RefreshRank(*other);
    if (Policy::Before(other->view, job.view)) AddTo(&forecast, *other);
  }
  return WaitOf(forecast, job);
}

// A job that runs is asked about after each of its steps, and a step may be short: what is spent on
// looking at all the others stays below a thousandth of the time, whatever their number.
double JobTable::RecentWait(Job& job) const {
  constexpr auto kPerJob = std::chrono::microseconds(100);
  const auto now = SchedulerClock::now();
  if (now >= job.count_wait_at) {
    job.wait_seconds = WaitOf(job).seconds;
    job.count_wait_at = now + live_.size() * kPerJob;
  }
  return job.wait_seconds;
}

std::vector<Job*> JobTable::LiveInOrder() const {
  std::vector<Job*> live;
  live.reserve(live_.size());
  for (const auto& [sequence, job] : live_) {
    RefreshRank(*job);
    live.push_back(job.get());
  }
  std::sort(live.begin(), live.end(),
            [](const Job* a, const Job* b) { return Policy::Before(a->view, b->view); });
  return live;
}

// --- Answers ---

JobStatus JobTable::StatusLocked(const Job& job, const Forecast::Wait& wait) const {
  JobStatus status;
  status.id = job.request.id;
  status.model = job.request.model;
  status.tenant = job.request.tenant;
  if (job.owner >= 0) status.device = workers_[static_cast<std::size_t>(job.owner)].stats.device;
  status.priority = job.request.priority;
  status.spec = job.request.spec;
  status.state = job.state;
  status.step = job.request.spec.steps - job.view.steps_left;
  status.frames = job.frames;
  if (!IsFinal(job.state)) {
    if (job.state == JobState::kQueued) status.queue_position = wait.jobs;
    status.eta_seconds = wait.seconds + Policy::RemainingSeconds(job.view);
  }
  status.submitted = job.submitted_at;
  status.error = job.error;
  return status;
}

Progress JobTable::ProgressLocked(Job& job) const {
  Progress progress;
  progress.stage = job.state;
  progress.steps = job.request.spec.steps;
  progress.step = progress.steps - job.view.steps_left;
  progress.frames = job.frames;
  progress.num_frames = job.request.spec.num_frames;
  progress.eta_seconds = RecentWait(job) + Policy::RemainingSeconds(job.view);
  if (job.generation) {
    const ClipStatistics& statistics = job.generation->statistics();
    progress.step_seconds = statistics.last_step_seconds;
    progress.sparsity = statistics.sparsity();
  }
  return progress;
}

Progress JobTable::CurrentProgress(const JobPtr& job) const {
  const std::lock_guard lock(mutex_);
  return ProgressLocked(*job);
}

std::optional<JobStatus> JobTable::Find(const std::string& id) const {
  const std::lock_guard lock(mutex_);
  if (Job* job = FindLive(id)) return StatusLocked(*job, WaitOf(*job));
  for (const auto& [sequence, job] : live_) {  // over, but its sink is still being told
    if (job->request.id == id) return StatusLocked(*job, {});
  }
  for (const JobStatus& status : finished_) {
    if (status.id == id) return status;
  }
  return std::nullopt;
}

std::vector<JobStatus> JobTable::List() const {
  const std::lock_guard lock(mutex_);
  const std::vector<Job*> live = LiveInOrder();
  std::vector<JobStatus> list;
  list.reserve(live.size() + finished_.size());
  Forecast forecast(workers_.size());
  for (const Job* job : live) {
    list.push_back(StatusLocked(*job, WaitOf(forecast, *job)));
    AddTo(&forecast, *job);
  }
  list.insert(list.end(), finished_.begin(), finished_.end());
  return list;
}

std::vector<JobPlace> JobTable::Places() const {
  const std::lock_guard lock(mutex_);
  std::vector<JobPlace> places;
  places.reserve(live_.size());
  Forecast forecast(workers_.size());
  for (const Job* job : LiveInOrder()) {
    if (!IsFinal(job->state)) {
      const Forecast::Wait wait = WaitOf(forecast, *job);
      const bool queued = job->state == JobState::kQueued;
      places.push_back({job->request.id, queued, queued ? wait.jobs : 0,
                        wait.seconds + Policy::RemainingSeconds(job->view)});
    }
    AddTo(&forecast, *job);
  }
  return places;
}

JobStatus JobTable::Status(const JobPtr& job) const {
  const std::lock_guard lock(mutex_);
  return StatusLocked(*job, WaitOf(*job));
}

SchedulerStats JobTable::Stats() const {
  const std::lock_guard lock(mutex_);
  SchedulerStats stats;
  for (const WorkerRecord& worker : workers_) {
    stats.devices.push_back(worker.stats);
    stats.devices.back().in_flight = static_cast<int>(worker.begun.size());
    stats.in_flight += stats.devices.back().in_flight;
  }
  for (const auto& [sequence, job] : live_) {
    if (job->state == JobState::kQueued) {
      ++stats.queued[static_cast<std::size_t>(job->request.priority)];
    }
  }
  stats.cost_errors = costs_.Errors();
  stats.eta_error = eta_error_;
  stats.cancel_to_free = cancel_to_free_;
  stats.requeued = requeued_;
  return stats;
}

std::string JobTable::CostState() const {
  const std::lock_guard lock(mutex_);
  return costs_.Save();
}

bool JobTable::accepting() const {
  const std::lock_guard lock(mutex_);
  return accepting_;
}

bool JobTable::healthy() const {
  const std::lock_guard lock(mutex_);
  return std::all_of(workers_.begin(), workers_.end(),
                     [](const WorkerRecord& worker) { return worker.stats.healthy; });
}

bool JobTable::lost() const {
  const std::lock_guard lock(mutex_);
  return std::none_of(workers_.begin(), workers_.end(),
                      [](const WorkerRecord& worker) { return worker.stats.healthy; });
}

}  // namespace slalom
