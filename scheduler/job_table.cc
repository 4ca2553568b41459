// JobTable: devices, ends, reports. Admission is in job_table_admission.cc, turns are in
// job_table_turns.cc, questions in job_table_status.cc.
#include "scheduler/job_table.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "scheduler/job_text.h"

namespace slalom {
namespace {

using Clock = SchedulerClock;

std::uint64_t Bit(int worker) { return std::uint64_t{1} << worker; }

// The mean of the first hundred, then one that forgets.
double MeanRate(std::int64_t samples) { return std::max(0.01, 1.0 / static_cast<double>(samples)); }

}  // namespace

JobTable::JobTable(const SchedulerOptions& options)
    : options_(options), queue_(options.limits.order) {
  costs_.Load(options.cost_state);
}

int JobTable::AddWorker(const std::string& device, const std::string& description,
                        std::vector<std::string> models) {
  const std::lock_guard lock(mutex_);
  if (workers_.size() == 64) {
    throw Error(ErrorCode::kInvalidArgument, "one process drives at most 64 devices");
  }
  WorkerRecord record;
  for (const std::string& model : models) {
    const auto known = std::find(models_.begin(), models_.end(), model);
    record.pools.push_back(static_cast<int>(known - models_.begin()));
    if (known == models_.end()) models_.push_back(model);
    std::array<int, 3> kinds;
    for (int a = 0; a < 3; ++a) {
      kinds[static_cast<std::size_t>(a)] =
          costs_.Kind(description, model, static_cast<AttentionKind>(a));
    }
    record.kinds.push_back(kinds);
  }
  record.models = std::move(models);
  record.stats.device = device;
  record.stats.description = description;
  workers_.push_back(std::move(record));
  return static_cast<int>(workers_.size()) - 1;
}

// --- Devices and costs ---

int JobTable::PoolOf(const std::string& model) const {
  return static_cast<int>(std::find(models_.begin(), models_.end(), model) - models_.begin());
}

std::uint64_t JobTable::DevicesOf(int pool) const {
  std::uint64_t bits = 0;
  for (std::size_t i = 0; i < workers_.size(); ++i) {
    const std::vector<int>& pools = workers_[i].pools;
    if (workers_[i].stats.healthy && std::find(pools.begin(), pools.end(), pool) != pools.end()) {
      bits |= Bit(static_cast<int>(i));
    }
  }
  return bits;
}

int JobTable::KindOf(const Job& job, int worker) const {
  const WorkerRecord& record = workers_[static_cast<std::size_t>(worker)];
  const auto place = std::find(record.pools.begin(), record.pools.end(), job.pool);
  return record.kinds[static_cast<std::size_t>(place - record.pools.begin())]
                     [static_cast<std::size_t>(job.request.spec.attention)];
}

ClipCost JobTable::CostOn(const Job& job, int worker) const {
  return costs_.Predict(KindOf(job, worker), job.prior);
}

ClipCost JobTable::LeastCost(const Job& job) const {
  ClipCost least = job.prior;
  double least_seconds = std::numeric_limits<double>::infinity();
  JobView view = job.view;
  for (std::uint64_t left = DevicesOf(job.pool); left != 0; left &= left - 1) {
    view.cost = CostOn(job, std::countr_zero(left));
    const double seconds = Policy::RemainingSeconds(view);
    if (seconds < least_seconds) {
      least = view.cost;
      least_seconds = seconds;
    }
  }
  return least;
}

// --- Ending jobs ---

// Nobody may begin it any more.
void JobTable::LeaveQueue(Job& job) {
  queue_.Remove(&job);
  if (job.view.deadline) queued_deadlines_.erase({*job.view.deadline, &job});
}

bool JobTable::RequestEndLocked(Job& job, const Error& reason) {
  if (IsFinal(job.state)) return false;
  if (!job.end_reason) {
    job.end_reason = reason;
    job.end_requested = Clock::now();
    if (job.lane != nullptr) {
      LeaveQueue(job);
      to_sweep_.push_back(job.shared_from_this());
    }
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
  for (const auto& [sequence, job] : live_) count += RequestEndLocked(*job, reason) ? 1 : 0;
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

void JobTable::RemoveFromWorker(const JobPtr& job) {
  if (job->owner >= 0) std::erase(workers_[static_cast<std::size_t>(job->owner)].begun, job);
}

// For Stats: how well the end was foretold, how long a cancel took.
void JobTable::CountEnd(const Job& job) {
  const JobResult& result = job.result;
  if (result.cancel_to_free_seconds) {
    DurationStats& stats = cancel_to_free_;
    ++stats.count;
    stats.last = *result.cancel_to_free_seconds;
    stats.mean += (stats.last - stats.mean) / static_cast<double>(stats.count);
    stats.max = std::max(stats.max, stats.last);
  }
  if (result.state == JobState::kSucceeded && result.total_seconds > 0) {
    EtaError& eta = eta_error_;
    const double rate = MeanRate(++eta.samples);
    const double error = (job.promised_seconds - result.total_seconds) / result.total_seconds;
    eta.mean_error += rate * (std::abs(error) - eta.mean_error);
    eta.bias += rate * (error - eta.bias);
  }
}

void JobTable::End(const JobPtr& job, const std::optional<Error>& error) {
  const auto now = Clock::now();
  JobResult& result = job->result;
  result.error = error;
  result.device_seconds = result.begin_seconds + result.denoise_seconds + result.decode_seconds;
  result.total_seconds = InSeconds(now - job->submitted);
  {
    const std::lock_guard lock(mutex_);
    if (job->state == JobState::kQueued) {
      result.queue_seconds = InSeconds(now - job->submitted);
      LeaveQueue(*job);
      --queued_;
    }
    if (!error) {
      job->state = JobState::kSucceeded;
      ++observed_;
      costs_.ObserveDecode(KindOf(*job, job->owner), job->prior, job->decode_seconds);
    } else {
      job->state =
          error->code() == ErrorCode::kCancelled ? JobState::kCancelled : JobState::kFailed;
      if (job->end_reason) result.cancel_to_free_seconds = InSeconds(now - job->end_requested);
    }
    job->error = error;
    result.state = job->state;
    result.frames = job->frames;
    CountEnd(*job);
    queue_.Settle(job.get(), result.device_seconds);
    queue_.Retire(job.get());
    RemoveFromWorker(job);
    by_id_.erase(job->request.id);
    Changed();
  }
  job->request.sink->OnDone(result);
  // The sink may hold a handle, which holds the job: break the circle. Handles live on, with
  // nothing in them that is large.
  job->request.sink.reset();
  job->checkpoint.reset();

  const std::lock_guard lock(mutex_);
  finished_.push_front(StatusLocked(*job, {}));
  while (static_cast<int>(finished_.size()) > options_.keep_finished) finished_.pop_back();
  live_.erase(job->view.sequence);
  Changed();
}

// --- Reports ---

Progress JobTable::ReportBegun(const JobPtr& job, int max_batch) {
  const std::lock_guard lock(mutex_);
  JobView& view = job->view;
  job->batch_key = job->request.model + "/" + job->generation->batch_key();
  view.batch_key = job->batch_key;
  view.max_batch = max_batch;
  view.steps_left = job->request.spec.steps - job->generation->step();
  const bool denoised = job->generation->denoised();
  view.phase = denoised ? JobView::Phase::kDenoised : JobView::Phase::kStepping;
  job->state = JobState::kDenoising;
  queue_.Progress(job.get(), Policy::FractionLeft(view, job->request.spec.steps));
  return ProgressLocked(*job);
}

Progress JobTable::ReportStep(const JobPtr& job, int batch) {
  const std::lock_guard lock(mutex_);
  const int kind = KindOf(*job, job->owner);
  JobView& view = job->view;
  view.steps_left = job->request.spec.steps - job->generation->step();
  view.cost.step_seconds = costs_.StepSeconds(kind, job->prior, batch) / batch;
  view.marginal = costs_.Marginal(kind, job->prior);
  if (job->generation->denoised()) view.phase = JobView::Phase::kDenoised;
  queue_.Progress(job.get(), Policy::FractionLeft(view, job->request.spec.steps));
  return ProgressLocked(*job);
}

Progress JobTable::ReportFrames(const JobPtr& job, int sent) {
  const std::lock_guard lock(mutex_);
  job->frames += sent;
  const int all = std::max(1, job->request.spec.num_frames);
  if (job->decoded > 0) {
    job->view.cost.decode_seconds = job->decode_seconds * all / job->decoded;
  }
  job->view.decode_left = std::max(0.0, 1.0 - static_cast<double>(job->decoded) / all);
  queue_.Progress(job.get(), Policy::FractionLeft(job->view, job->request.spec.steps));
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

void JobTable::ObserveBegin(const Job& job, double seconds) {
  const std::lock_guard lock(mutex_);
  ++observed_;
  costs_.ObserveBegin(KindOf(job, job.owner), job.prior, seconds);
}

void JobTable::ObserveStep(const Job& job, int batch, double seconds) {
  const std::lock_guard lock(mutex_);
  ++observed_;
  costs_.ObserveStep(KindOf(job, job.owner), job.prior, batch, seconds);
}

void JobTable::ObserveBytes(const Job& job, CostPhase phase, int batch, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  const ClipCost cost = CostOn(job, job.owner);
  const std::size_t each = phase == CostPhase::kDecode ? cost.decode_bytes : cost.step_bytes;
  costs_.ObserveBytes(KindOf(job, job.owner), phase, static_cast<double>(each) * batch,
                      static_cast<double>(bytes));
}

void JobTable::ObserveOutOfMemory(const Job& job, CostPhase phase) {
  const std::lock_guard lock(mutex_);
  costs_.ObserveOutOfMemory(KindOf(job, job.owner), phase);
}

// --- Lost devices ---

void JobTable::MarkLost(int worker) {
  const std::lock_guard lock(mutex_);
  workers_[static_cast<std::size_t>(worker)].stats.healthy = false;
  for (const auto& [sequence, job] : live_) {
    if (job->lane != nullptr && DevicesOf(job->pool) == 0) to_sweep_.push_back(job);
  }
  Changed();
}

bool JobTable::CanRunElsewhere(const JobPtr& job) const {
  const std::lock_guard lock(mutex_);
  return !job->end_reason && DevicesOf(job->pool) != 0;
}

void JobTable::Requeue(const JobPtr& job) {
  const std::lock_guard lock(mutex_);
  const JobResult& result = job->result;
  queue_.Settle(job.get(), result.begin_seconds + result.denoise_seconds + result.decode_seconds);
  RemoveFromWorker(job);
  job->owner = Job::kNoWorker;
  job->state = JobState::kQueued;
  job->stalled_since.reset();
  job->decoded = 0;
  job->decode_seconds = 0;
  JobView& view = job->view;
  view.phase = JobView::Phase::kQueued;
  view.alone = false;
  view.wants_frames = true;
  view.steps_left = job->request.spec.steps;
  view.decode_left = 1.0;
  view.cost = LeastCost(*job);
  ++queued_;
  ++requeued_;
  if (job->end_reason) {
    to_sweep_.push_back(job);
  } else {
    queue_.Push(job.get());
    if (view.deadline) queued_deadlines_.emplace(*view.deadline, job.get());
    if (DevicesOf(job->pool) == 0) to_sweep_.push_back(job);
  }
  Changed();
}

}  // namespace slalom
