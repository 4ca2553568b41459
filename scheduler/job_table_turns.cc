// JobTable: what workers and the sweeper do next.
#include <algorithm>
#include <bit>
#include <cmath>

#include "scheduler/job_table.h"
#include "scheduler/job_text.h"

namespace slalom {
namespace {

using Clock = SchedulerClock;

// A job that was left to another device is looked at again so soon: that one may have got other
// work meanwhile.
constexpr auto kPlaceAgain = std::chrono::milliseconds(100);

// How often predictions are renewed: at most a thousandth of the time goes into it.
constexpr auto kReestimateEvery = std::chrono::milliseconds(250);
constexpr auto kReestimatePerJob = std::chrono::microseconds(500);
// A prediction that moves by less is left alone: equals shall not trade places over noise.
constexpr double kMoved = 0.2;

Clock::duration FromSeconds(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
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

// --- Reasons to end ---

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
                                              DescribeSeconds(options_.stall_seconds) + " " +
                                              WhereItStands(job));
    }
    *look_again = std::min(*look_again, limit);
  }
  return std::nullopt;
}

// --- Workers ---

bool JobTable::PlacedHere(const Job& job, int worker, std::vector<double>* handed_on) const {
  const std::uint64_t devices = DevicesOf(job.pool);
  if (std::has_single_bit(devices)) return true;
  std::vector<DeviceOffer> offers;
  std::vector<int> workers;
  std::size_t here = 0;
  JobView view = job.view;
  for (std::uint64_t left = devices; left != 0; left &= left - 1) {
    const int other = std::countr_zero(left);
    if (other == worker) here = offers.size();
    view.cost = CostOn(job, other);
    DeviceOffer offer;
    offer.own_seconds = Policy::RemainingSeconds(view);
    offer.ahead_seconds = (*handed_on)[static_cast<std::size_t>(other)];
    const std::vector<JobPtr>& begun = workers_[static_cast<std::size_t>(other)].begun;
    offer.idle = begun.empty() && offer.ahead_seconds == 0;
    for (const JobPtr& each : begun) {
      RefreshRank(*each);
      if (!each->view.stalled() && Policy::Before(each->view, job.view)) {
        offer.ahead_seconds += Policy::RemainingSeconds(each->view);
      }
    }
    offers.push_back(offer);
    workers.push_back(other);
  }
  const std::size_t place = Place(offers, here);
  if (place == here) return true;
  (*handed_on)[static_cast<std::size_t>(workers[place])] += offers[place].own_seconds;
  return false;
}

bool JobTable::AddCandidates(int worker, Clock::time_point now, std::vector<JobPtr>* jobs,
                             std::vector<JobView>* views) {
  if (queue_.size() == 0) return false;
  queue_.Age(now);
  const WorkerRecord& record = workers_[static_cast<std::size_t>(worker)];
  const auto add = [&](QueuedJob* found) {
    Job& job = static_cast<Job&>(*found);
    const auto same = [&](const JobPtr& other) { return other.get() == &job; };
    if (std::any_of(jobs->begin(), jobs->end(), same)) return;
    job.view.cost = CostOn(job, worker);
    job.view.marginal = costs_.Marginal(KindOf(job, worker), job.prior);
    jobs->push_back(job.shared_from_this());
    views->push_back(job.view);
  };
  const std::size_t begun = jobs->size();
  if (options_.limits.max_batch > 1) {
    for (std::size_t i = 0; i < begun; ++i) {
      const JobView view = (*views)[i];
      if (view.phase != JobView::Phase::kStepping || view.max_batch <= 1) continue;
      if (QueuedJob* mate = queue_.FirstLike((*jobs)[i]->pool, view.likely_key, view.priority)) {
        add(mate);
      }
    }
  }
  std::vector<double> handed_on(workers_.size());
  bool left_to_others = false;
  QueuedJob* first = queue_.First(record.pools, [&](const QueuedJob& job) {
    const bool here = PlacedHere(static_cast<const Job&>(job), worker, &handed_on);
    left_to_others |= !here;
    return here;
  });
  if (first != nullptr) add(first);
  return left_to_others;
}

JobTable::Turn JobTable::NextTurn(int worker, std::uint64_t epoch) {
  std::unique_lock lock(mutex_);
  Turn turn;
  turn.stop = stop_;
  if (stop_) return turn;

  const auto now = Clock::now();
  Reestimate(now);
  auto look_again = Clock::time_point::max();
  std::vector<JobPtr> jobs = workers_[static_cast<std::size_t>(worker)].begun;
  std::vector<JobView> views;
  for (const JobPtr& job : jobs) {
    UpdateStall(*job, now);
    if (const auto why = WhyEnd(*job, now, &look_again)) turn.endings.push_back({job, *why});
    job->view.rank = queue_.RankOf(*job);
    views.push_back(job->view);
  }
  if (!turn.endings.empty()) return turn;
  if (AddCandidates(worker, now, &jobs, &views)) {
    look_again = std::min(look_again, now + kPlaceAgain);
  }
  const Action action = Policy::Plan(views, now, options_.limits);
  Take(worker, action, jobs, &turn);
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

void JobTable::Reestimate(Clock::time_point now) {
  // The first measurements say most: after one, two, four, eight, and so on; then by the clock.
  if (observed_ < reestimate_after_ && (now < reestimate_at_ || observed_ == 0)) return;
  if (observed_ >= reestimate_after_) reestimate_after_ = 2 * observed_;
  reestimate_at_ =
      now + std::max<Clock::duration>(kReestimateEvery, live_.size() * kReestimatePerJob);
  for (const auto& [sequence, job] : live_) {
    if (IsFinal(job->state) || DevicesOf(job->pool) == 0) continue;
    JobView whole;
    whole.steps_left = job->request.spec.steps;
    whole.cost = job->owner >= 0 ? CostOn(*job, job->owner) : LeastCost(*job);
    const double seconds = Policy::RemainingSeconds(whole);
    if (std::abs(seconds - job->device_seconds) <= kMoved * job->device_seconds) continue;
    queue_.Resize(job.get(), seconds);
    if (job->owner == Job::kNoWorker) job->view.cost = whole.cost;
  }
}

// Turns the policy's answer into the worker's: of the jobs that it was shown, those it shall run.
void JobTable::Take(int worker, const Action& action, const std::vector<JobPtr>& shown,
                    Turn* turn) {
  turn->kind = action.kind;
  for (const std::size_t i : action.jobs) turn->jobs.push_back(shown[i]);
  for (const JobPtr& job : turn->jobs) {
    if (action.kind == Action::Kind::kBegin) {
      queue_.Begin(job.get());
      LeaveQueue(*job);
      --queued_;
      job->owner = worker;
      job->state = JobState::kEncoding;
      workers_[static_cast<std::size_t>(worker)].begun.push_back(job);
    } else if (action.kind == Action::Kind::kDecode) {
      job->view.phase = JobView::Phase::kDecoding;
      job->state = JobState::kDecoding;
    }
  }
}

// --- The sweeper ---

JobTable::Turn JobTable::NextSweep() {
  std::unique_lock lock(mutex_);
  for (;;) {
    Turn turn;
    turn.stop = stop_;
    if (stop_) return turn;
    const auto now = Clock::now();
    while (!queued_deadlines_.empty() && queued_deadlines_.begin()->first <= now) {
      Job& job = *queued_deadlines_.begin()->second;
      LeaveQueue(job);
      to_sweep_.push_back(job.shared_from_this());
    }
    for (const JobPtr& job : std::exchange(to_sweep_, {})) {
      // It may have ended, or have been begun, since somebody put it here.
      if (job->owner != Job::kNoWorker || IsFinal(job->state)) continue;
      auto look_again = Clock::time_point::max();
      auto why = WhyEnd(*job, now, &look_again);
      if (!why && DevicesOf(job->pool) == 0) {
        why = Error(ErrorCode::kUnavailable,
                    "no working device serves model " + job->request.model + " any more");
      }
      if (!why) continue;
      LeaveQueue(*job);
      job->owner = Job::kSweeper;
      turn.endings.push_back({job, *why});
    }
    if (!turn.endings.empty()) return turn;
    if (queued_deadlines_.empty()) {
      changed_.wait(lock);
    } else {
      // A copy: the job may leave, and its deadline with it, while this waits.
      const auto next = queued_deadlines_.begin()->first;
      changed_.wait_until(lock, next);
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

}  // namespace slalom
