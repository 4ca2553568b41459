#include "scheduler/job_table.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <map>
#include <random>
#include <sstream>

namespace slalom {
namespace {

using Clock = SchedulerClock;

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

Clock::duration FromSeconds(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

std::uint64_t Bit(int worker) { return std::uint64_t{1} << worker; }

std::string MakeId() {
  std::random_device random;
  char text[32];
  std::snprintf(text, sizeof text, "job-%08x%08x", static_cast<unsigned>(random()),
                static_cast<unsigned>(random()));
  return text;
}

// Clips that agree in this will most likely have equal batch keys.
std::string LikelyKey(const std::string& model, const ClipSpec& spec) {
  std::ostringstream key;
  key << model << '/' << spec.width << 'x' << spec.height << 'x' << spec.num_frames << '/'
      << static_cast<int>(spec.attention) << '/' << spec.topk << '/'
      << (spec.guidance_scale != 1.0);
  return key.str();
}

std::string Describe(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, seconds < 10 ? "%.1f s" : "%.0f s", seconds);
  return text;
}

std::string WhereItStands(const Job& job) {
  switch (job.state) {
    case JobState::kDenoising:
      return "at step " + std::to_string(job.request.spec.steps - job.view.steps_left) + " of " +
             std::to_string(job.request.spec.steps);
    case JobState::kDecoding:
      return "at frame " + std::to_string(job.frames) + " of " +
             std::to_string(job.request.spec.num_frames);
    default:
      return std::string("while ") + JobStateName(job.state);
  }
}

}  // namespace

int JobTable::AddWorker(const std::string& device, const std::string& description,
                        std::vector<std::string> models) {
  const std::lock_guard lock(mutex_);
  if (workers_.size() == 64) {
    throw Error(ErrorCode::kInvalidArgument, "one process drives at most 64 devices");
  }
  WorkerRecord record;
  record.models = std::move(models);
  record.stats.device = device;
  record.stats.description = description;
  workers_.push_back(std::move(record));
  return static_cast<int>(workers_.size()) - 1;
}

// --- Admission ---

void JobTable::CheckRoom(const JobRequest& request, const ClipCost& cost) const {
  if (!accepting_) throw Error(ErrorCode::kUnavailable, "the server is shutting down");
  if (WorkersFor(request.model) == 0) {
    throw Error(ErrorCode::kUnavailable, "no working device serves model " + request.model);
  }
  if (FindLive(request.id) != nullptr) {
    throw Error(ErrorCode::kAlreadyExists, "job " + request.id + " is live already");
  }
  const std::size_t need = cost.waiting_bytes + std::max(cost.step_bytes, cost.decode_bytes);
  if (options_.limits.memory_bytes != 0 && need > options_.limits.memory_bytes) {
    throw Error(ErrorCode::kResourceExhausted,
                "the clip needs " + std::to_string(need >> 20) + " MiB of device memory, at most " +
                    std::to_string(options_.limits.memory_bytes >> 20) + " MiB are there");
  }
  const auto queued = std::count_if(live_.begin(), live_.end(), [](const JobPtr& job) {
    return job->state == JobState::kQueued;
  });
  if (queued >= options_.max_queue && !request.readmitted) {
    throw Error(ErrorCode::kResourceExhausted, "the queue is full: " + std::to_string(queued) +
                                                   " jobs wait, at most " +
                                                   std::to_string(options_.max_queue) + " may");
  }
}

JobPtr JobTable::Insert(JobRequest request, const ClipCost& cost) {
  auto job = std::make_shared<Job>();
  job->submitted = Clock::now();
  job->submitted_at = std::chrono::system_clock::now();
  job->request = std::move(request);
  job->checkpoint = std::move(job->request.checkpoint);
  if (job->request.id.empty()) job->request.id = MakeId();
  job->likely_key = LikelyKey(job->request.model, job->request.spec);
  job->view.priority = job->request.priority;
  job->view.deadline = job->request.deadline;
  job->view.likely_key = job->likely_key;
  job->view.steps_left = job->request.spec.steps;
  job->view.cost = cost;

  const std::lock_guard lock(mutex_);
  CheckRoom(job->request, cost);
  job->view.sequence = next_sequence_++;
  job->devices = WorkersFor(job->request.model);
  if (const auto& deadline = job->request.deadline; deadline && !job->request.readmitted) {
    const double left = std::max(0.0, Seconds(*deadline - job->submitted));
    const double own = Policy::RemainingSeconds(job->view);
    const double needed = EtaSeconds(*job, CountAhead(*job));
    if (needed > left || left == 0.0) {
      throw Error(ErrorCode::kDeadlineExceeded,
                  "the job would take about " + Describe(needed) + " (" + Describe(needed - own) +
                      " of it waiting), its deadline is in " + Describe(left));
    }
  }
  const auto place = std::upper_bound(
      live_.begin(), live_.end(), job,
      [](const JobPtr& a, const JobPtr& b) { return Policy::Before(a->view, b->view); });
  live_.insert(place, job);
  return job;
}

void JobTable::Publish(const JobPtr& job) {
  const std::lock_guard lock(mutex_);
  job->published = true;
  Changed();
}

void JobTable::Withdraw(const JobPtr& job) {
  job->request.sink.reset();  // it may hold a handle: break the circle
  const std::lock_guard lock(mutex_);
  std::erase(live_, job);
  Changed();
}

void JobTable::StopAccepting() {
  const std::lock_guard lock(mutex_);
  accepting_ = false;
}

// --- Ending jobs ---

bool JobTable::RequestEndLocked(Job& job, const Error& reason) {
  if (IsFinal(job.state)) return false;
  if (!job.end_reason) {
    job.end_reason = reason;
    job.end_requested = Clock::now();
    Changed();
  }
  return true;
}

bool JobTable::RequestEnd(Job& job, const Error& reason) {
  const std::lock_guard lock(mutex_);
  return RequestEndLocked(job, reason);
}

bool JobTable::RequestEnd(const std::string& id, const Error& reason) {
  const std::lock_guard lock(mutex_);
  Job* job = FindLive(id);
  return job != nullptr && RequestEndLocked(*job, reason);
}

int JobTable::RequestEndOfAll(const Error& reason) {
  const std::lock_guard lock(mutex_);
  int count = 0;
  for (const JobPtr& job : live_) count += RequestEndLocked(*job, reason) ? 1 : 0;
  return count;
}

bool JobTable::WaitUntilEmpty(std::optional<Clock::time_point> deadline) {
  std::unique_lock lock(mutex_);
  const auto empty = [&] { return live_.empty(); };
  if (deadline) return changed_.wait_until(lock, *deadline, empty);
  changed_.wait(lock, empty);
  return true;
}

void JobTable::Stop() {
  const std::lock_guard lock(mutex_);
  stop_ = true;
  Changed();
}

void JobTable::End(const JobPtr& job, const std::optional<Error>& error) {
  const auto now = Clock::now();
  JobResult& result = job->result;
  {
    const std::lock_guard lock(mutex_);
    if (job->state == JobState::kQueued) result.queue_seconds = Seconds(now - job->submitted);
    if (!error) {
      job->state = JobState::kSucceeded;
    } else {
      job->state =
          error->code() == ErrorCode::kCancelled ? JobState::kCancelled : JobState::kFailed;
      if (job->end_reason) result.cancel_to_free_seconds = Seconds(now - job->end_requested);
    }
    job->error = error;
    result.state = job->state;
    result.frames = job->frames;
  }
  result.error = error;
  result.device_seconds = result.begin_seconds + result.denoise_seconds + result.decode_seconds;
  result.total_seconds = Seconds(now - job->submitted);
  job->request.sink->OnDone(result);
  // The sink may hold a handle, which holds the job: break the circle.
  job->request.sink.reset();

  const std::lock_guard lock(mutex_);
  finished_.push_front(StatusLocked(*job, {}));
  while (static_cast<int>(finished_.size()) > options_.keep_finished) finished_.pop_back();
  std::erase(live_, job);
  Changed();
}

// --- Turns ---

void JobTable::UpdateStall(Job& job, Clock::time_point now) const {
  job.view.wants_frames = job.wants_frames.load(std::memory_order_relaxed);
  if (!job.view.stalled()) {
    job.stalled_since.reset();
  } else if (!job.stalled_since) {
    job.stalled_since = now;
  }
}

std::optional<Error> JobTable::WhyEnd(const Job& job, Clock::time_point now,
                                      Clock::time_point* look_again) const {
  if (job.end_reason) return job.end_reason;
  if (const auto& deadline = job.request.deadline) {
    if (*deadline <= now) {
      return Error(ErrorCode::kDeadlineExceeded, "the deadline passed " + WhereItStands(job));
    }
    *look_again = std::min(*look_again, *deadline);
  }
  if (job.stalled_since && options_.stall_seconds > 0) {
    const auto limit = *job.stalled_since + FromSeconds(options_.stall_seconds);
    if (limit <= now) {
      return Error(ErrorCode::kCancelled, "the client took no frames for " +
                                              Describe(options_.stall_seconds) + " " +
                                              WhereItStands(job));
    }
    *look_again = std::min(*look_again, limit);
  }
  return std::nullopt;
}

JobTable::Turn JobTable::NextTurn(int worker, std::uint64_t epoch) {
  std::unique_lock lock(mutex_);
  Turn turn;
  turn.stop = stop_;
  if (stop_) return turn;

  const auto now = Clock::now();
  auto look_again = Clock::time_point::max();
  std::vector<JobView> views;
  for (const JobPtr& job : live_) {
    if (IsFinal(job->state)) continue;
    if (job->owner == worker) {
      UpdateStall(*job, now);
      if (const auto why = WhyEnd(*job, now, &look_again)) {
        turn.endings.push_back({job, *why});
        continue;
      }
    } else if (job->owner != Job::kNoWorker || !job->published || job->end_reason ||
               (job->devices & Bit(worker)) == 0) {
      continue;
    }
    views.push_back(job->view);
    turn.jobs.push_back(job);
  }
  if (!turn.endings.empty()) {
    turn.jobs.clear();
    return turn;
  }
  const Action action = Policy::Plan(views, now, options_.limits);
  Take(worker, action, &turn);
  if (action.kind == Action::Kind::kWait) {
    const auto news = [&] { return epoch_ != epoch; };
    if (look_again == Clock::time_point::max()) {
      changed_.wait(lock, news);
    } else {
      changed_.wait_until(lock, look_again, news);
    }
  }
  return turn;
}

// Turns the policy's answer into the worker's: of the jobs that it was shown, those it shall run.
void JobTable::Take(int worker, const Action& action, Turn* turn) {
  std::vector<JobPtr> taken;
  for (const std::size_t i : action.jobs) taken.push_back(turn->jobs[i]);
  for (const JobPtr& job : taken) {
    if (action.kind == Action::Kind::kBegin) {
      job->owner = worker;
      job->devices = Bit(worker);
      job->state = JobState::kEncoding;
    } else if (action.kind == Action::Kind::kDecode) {
      job->view.phase = JobView::Phase::kDecoding;
      job->state = JobState::kDecoding;
    }
  }
  turn->kind = action.kind;
  turn->jobs = std::move(taken);
}

JobTable::Turn JobTable::NextSweep() {
  std::unique_lock lock(mutex_);
  for (;;) {
    Turn turn;
    turn.stop = stop_;
    if (stop_) return turn;
    const auto now = Clock::now();
    auto look_again = Clock::time_point::max();
    for (const JobPtr& job : live_) {
      if (job->owner != Job::kNoWorker || !job->published) continue;
      auto why = WhyEnd(*job, now, &look_again);
      if (!why && job->devices == 0) {
        why = Error(ErrorCode::kUnavailable,
                    "no working device serves model " + job->request.model + " any more");
      }
      if (!why) continue;
      job->owner = Job::kSweeper;
      turn.endings.push_back({job, *why});
    }
    if (!turn.endings.empty()) return turn;
    if (look_again == Clock::time_point::max()) {
      changed_.wait(lock);
    } else {
      changed_.wait_until(lock, look_again);
    }
  }
}

std::uint64_t JobTable::epoch() const {
  const std::lock_guard lock(mutex_);
  return epoch_;
}

void JobTable::Wake() {
  const std::lock_guard lock(mutex_);
  Changed();
}

void JobTable::Changed() {
  ++epoch_;
  changed_.notify_all();
}

// --- Reports ---

Progress JobTable::ReportBegun(const JobPtr& job, int max_batch) {
  const std::lock_guard lock(mutex_);
  job->batch_key = job->request.model + "/" + job->generation->batch_key();
  job->view.batch_key = job->batch_key;
  job->view.max_batch = max_batch;
  job->view.steps_left = job->request.spec.steps - job->generation->step();
  const bool denoised = job->generation->denoised();
  job->view.phase = denoised ? JobView::Phase::kDenoised : JobView::Phase::kStepping;
  job->state = JobState::kDenoising;
  return ProgressLocked(*job);
}

Progress JobTable::ReportStep(const JobPtr& job, double seconds) {
  const std::lock_guard lock(mutex_);
  job->view.steps_left = job->request.spec.steps - job->generation->step();
  job->view.cost.step_seconds = seconds;
  if (job->generation->denoised()) job->view.phase = JobView::Phase::kDenoised;
  return ProgressLocked(*job);
}

Progress JobTable::ReportFrames(const JobPtr& job, int frames) {
  const std::lock_guard lock(mutex_);
  job->frames += frames;
  const int all = std::max(1, job->request.spec.num_frames);
  if (job->frames > 0) {
    job->view.cost.decode_seconds = job->result.decode_seconds * all / job->frames;
  }
  job->view.decode_left = std::max(0.0, 1.0 - static_cast<double>(job->frames) / all);
  return ProgressLocked(*job);
}

Progress JobTable::CurrentProgress(const JobPtr& job) const {
  const std::lock_guard lock(mutex_);
  return ProgressLocked(*job);
}

void JobTable::StepAlone(const JobPtr& job) {
  const std::lock_guard lock(mutex_);
  job->view.alone = true;
}

void JobTable::AddBusy(int worker, double seconds) {
  const std::lock_guard lock(mutex_);
  workers_[static_cast<std::size_t>(worker)].stats.busy_seconds += seconds;
}

void JobTable::MarkLost(int worker) {
  const std::lock_guard lock(mutex_);
  workers_[static_cast<std::size_t>(worker)].stats.healthy = false;
  for (const JobPtr& job : live_) job->devices &= ~Bit(worker);
  Changed();
}

// --- Questions ---

std::uint64_t JobTable::WorkersFor(const std::string& model) const {
  std::uint64_t bits = 0;
  for (std::size_t i = 0; i < workers_.size(); ++i) {
    const std::vector<std::string>& models = workers_[i].models;
    if (workers_[i].stats.healthy &&
        std::find(models.begin(), models.end(), model) != models.end()) {
      bits |= Bit(static_cast<int>(i));
    }
  }
  return bits;
}

Job* JobTable::FindLive(const std::string& id) const {
  for (const JobPtr& job : live_) {
    if (job->request.id == id && !IsFinal(job->state)) return job.get();
  }
  return nullptr;
}

JobTable::Ahead JobTable::CountAhead(const Job& job) const {
  Ahead ahead;
  for (const JobPtr& other : live_) {
    // The others come later. A job that is being admitted is not in the list yet.
    if (!Policy::Before(other->view, job.view)) break;
    if ((other->devices & job.devices) == 0 || IsFinal(other->state) || other->view.stalled()) {
      continue;
    }
    ++ahead.jobs;
    ahead.seconds += Policy::RemainingSeconds(other->view);
  }
  return ahead;
}

double JobTable::EtaSeconds(const Job& job, const Ahead& ahead) {
  return ahead.seconds / std::max(1, std::popcount(job.devices)) +
         Policy::RemainingSeconds(job.view);
}

JobStatus JobTable::StatusLocked(const Job& job, const Ahead& ahead) const {
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
    if (job.state == JobState::kQueued) status.queue_position = ahead.jobs;
    status.eta_seconds = EtaSeconds(job, ahead);
  }
  status.submitted = job.submitted_at;
  status.error = job.error;
  return status;
}

Progress JobTable::ProgressLocked(const Job& job) const {
  Progress progress;
  progress.stage = job.state;
  progress.steps = job.request.spec.steps;
  progress.step = progress.steps - job.view.steps_left;
  progress.frames = job.frames;
  progress.num_frames = job.request.spec.num_frames;
  progress.eta_seconds = EtaSeconds(job, CountAhead(job));
  if (job.generation) {
    const ClipStatistics& statistics = job.generation->statistics();
    progress.step_seconds = statistics.last_step_seconds;
    progress.sparsity = statistics.sparsity();
  }
  return progress;
}

std::optional<JobStatus> JobTable::Find(const std::string& id) const {
  const std::lock_guard lock(mutex_);
  if (const Job* job = FindLive(id)) return StatusLocked(*job, CountAhead(*job));
  for (const JobPtr& job : live_) {  // over, but its sink is still being told
    if (job->request.id == id) return StatusLocked(*job, {});
  }
  for (const JobStatus& status : finished_) {
    if (status.id == id) return status;
  }
  return std::nullopt;
}

std::vector<JobStatus> JobTable::List() const {
  const std::lock_guard lock(mutex_);
  std::vector<JobPtr> live = live_;
  std::sort(live.begin(), live.end(),
            [](const JobPtr& a, const JobPtr& b) { return Policy::Before(a->view, b->view); });
  std::vector<JobStatus> list;
  list.reserve(live_.size() + finished_.size());
  // CountAhead for all of them in one pass: sums by set of devices, of which there are few.
  std::map<std::uint64_t, Ahead> sums;
  for (const JobPtr& job : live_) {
    Ahead ahead;
    for (const auto& [devices, sum] : sums) {
      if ((devices & job->devices) == 0) continue;
      ahead.jobs += sum.jobs;
      ahead.seconds += sum.seconds;
    }
    list.push_back(StatusLocked(*job, ahead));
    if (IsFinal(job->state) || job->view.stalled()) continue;
    Ahead& sum = sums[job->devices];
    ++sum.jobs;
    sum.seconds += Policy::RemainingSeconds(job->view);
  }
  list.insert(list.end(), finished_.begin(), finished_.end());
  return list;
}

JobStatus JobTable::Status(const JobPtr& job) const {
  const std::lock_guard lock(mutex_);
  return StatusLocked(*job, CountAhead(*job));
}

SchedulerStats JobTable::Stats() const {
  const std::lock_guard lock(mutex_);
  SchedulerStats stats;
  for (const WorkerRecord& worker : workers_) stats.devices.push_back(worker.stats);
  for (const JobPtr& job : live_) {
    if (job->state == JobState::kQueued) {
      ++stats.queued[static_cast<std::size_t>(job->request.priority)];
    } else if (!IsFinal(job->state)) {
      ++stats.in_flight;
      ++stats.devices[static_cast<std::size_t>(job->owner)].in_flight;
    }
  }
  return stats;
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

}  // namespace slalom
