#include "scheduler/policy.h"

#include <algorithm>
#include <optional>

namespace slalom {
namespace {

using Phase = JobView::Phase;
using Clock = SchedulerClock;

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

// The most that a begun job takes beside its latent.
std::size_t WorkingBytes(const ClipCost& cost) {
  return std::max(cost.step_bytes, cost.decode_bytes);
}

// One call of Plan: the jobs in their order, and what they hold.
class Planner {
 public:
  Planner(std::span<const JobView> jobs, Clock::time_point now, const PolicyLimits& limits)
      : jobs_(jobs), limits_(limits) {
    order_.reserve(jobs.size());
    for (std::size_t i = 0; i < jobs.size(); ++i) {
      if (!jobs[i].deadline || *jobs[i].deadline > now) order_.push_back(i);
      Count(jobs[i]);
    }
    std::sort(order_.begin(), order_.end(),
              [&](std::size_t a, std::size_t b) { return Policy::Before(jobs_[a], jobs_[b]); });
  }

  Action Plan() const {
    bool queue_blocked = false;
    for (const std::size_t i : order_) {
      const JobView& job = jobs_[i];
      switch (job.phase) {
        case Phase::kQueued:
          if (!queue_blocked && CanBegin(job)) return {Action::Kind::kBegin, {i}};
          // Whatever is queued behind it waits too, or large clips would starve.
          queue_blocked = true;
          break;
        case Phase::kStepping:
          if (Fits(job.cost.step_bytes)) return Step(i, queue_blocked);
          break;
        case Phase::kDenoised:
          if (job.stalled()) break;
          if (decoding_ < limits_.max_decoding && Fits(job.cost.decode_bytes)) {
            return {Action::Kind::kDecode, {i}};
          }
          // Help out the decoder that is in the way, however low its priority.
          if (const auto holder = FirstDecoding()) return {Action::Kind::kDecode, {*holder}};
          break;
        case Phase::kDecoding:
          if (!job.stalled()) return {Action::Kind::kDecode, {i}};
          break;
      }
    }
    return {};
  }

 private:
  void Count(const JobView& job) {
    if (!job.begun()) return;
    ++in_flight_;
    resident_bytes_ += job.cost.waiting_bytes;
    if (job.phase == Phase::kDecoding) {
      resident_bytes_ += job.cost.decode_bytes;
      if (!job.stalled()) ++decoding_;
    } else {
      largest_work_ = std::max(largest_work_, WorkingBytes(job.cost));
    }
  }

  // Whether a job in flight may take so many bytes more. One that has the device to itself always
  // may: admission has checked it, and nothing would ever free more.
  bool Fits(std::size_t bytes) const {
    return limits_.memory_bytes == 0 || in_flight_ <= 1 ||
           resident_bytes_ + bytes <= limits_.memory_bytes;
  }

  // Leaves enough memory for the hungriest job in flight to take its next piece, so that jobs which
  // wait for each other's memory always find an end.
  bool CanBegin(const JobView& job) const {
    if (in_flight_ >= limits_.max_in_flight) return false;
    if (limits_.memory_bytes == 0 || in_flight_ == 0) return true;
    return resident_bytes_ + job.cost.waiting_bytes +
               std::max(largest_work_, WorkingBytes(job.cost)) <=
           limits_.memory_bytes;
  }

  std::optional<std::size_t> FirstDecoding() const {
    for (const std::size_t i : order_) {
      if (jobs_[i].phase == Phase::kDecoding && !jobs_[i].stalled()) return i;
    }
    return std::nullopt;
  }

  // Only equals share: a job of a lower class would slow the lead down.
  bool MayShare(const JobView& lead, const JobView& other) const {
    return !other.alone && other.priority == lead.priority &&
           (other.begun() ? other.batch_key == lead.batch_key
                          : other.likely_key == lead.likely_key);
  }

  // A step of the lead and of those that may share it, or the beginning of one more to share it.
  Action Step(std::size_t lead_index, bool queue_blocked) const {
    const JobView& lead = jobs_[lead_index];
    const auto room =
        static_cast<std::size_t>(std::max(1, std::min(limits_.max_batch, lead.max_batch)));
    Action action{Action::Kind::kDenoise, {lead_index}};
    if (lead.alone || room == 1 || lead.marginal > 1.0 - limits_.min_batch_gain) return action;

    std::size_t bytes = lead.cost.step_bytes;
    for (const std::size_t i : order_) {
      if (action.jobs.size() == room) break;
      if (i == lead_index || jobs_[i].phase != Phase::kStepping || !MayShare(lead, jobs_[i])) {
        continue;
      }
      if (!Fits(bytes + jobs_[i].cost.step_bytes)) continue;
      bytes += jobs_[i].cost.step_bytes;
      action.jobs.push_back(i);
    }
    if (action.jobs.size() < room && !queue_blocked) {
      if (const auto joiner = Joiner(lead, bytes)) return {Action::Kind::kBegin, {*joiner}};
    }
    return action;
  }

  // A queued job that is worth beginning now so that it shares the lead's later steps. The last
  // place in flight is not for joiners: it is kept for a job that goes before all of them.
  std::optional<std::size_t> Joiner(const JobView& lead, std::size_t batch_bytes) const {
    if (in_flight_ + 1 >= limits_.max_in_flight && in_flight_ > 1) return std::nullopt;
    for (const std::size_t i : order_) {
      const JobView& job = jobs_[i];
      if (job.phase != Phase::kQueued || !MayShare(lead, job)) continue;
      const bool pays = job.cost.begin_seconds <= lead.steps_left * lead.cost.step_seconds;
      const bool fits = Fits(batch_bytes + job.cost.waiting_bytes + job.cost.step_bytes);
      if (pays && fits && CanBegin(job)) return i;
      break;
    }
    return std::nullopt;
  }

  const std::span<const JobView> jobs_;
  const PolicyLimits& limits_;
  std::vector<std::size_t> order_;
  int in_flight_ = 0;
  int decoding_ = 0;                // decoders whose client reads
  std::size_t resident_bytes_ = 0;  // held between pieces of work
  std::size_t largest_work_ = 0;    // WorkingBytes of the begun jobs that do not decode yet
};

}  // namespace

Action Policy::Plan(std::span<const JobView> jobs, Clock::time_point now,
                    const PolicyLimits& limits) {
  return Planner(jobs, now, limits).Plan();
}

bool Policy::Before(const JobView& a, const JobView& b) {
  if (a.priority != b.priority) return a.priority > b.priority;
  if (a.rank != b.rank) return a.rank < b.rank;
  return a.sequence < b.sequence;
}

double Policy::BaseRank(Clock::time_point arrival, double device_seconds, double weight,
                        std::optional<Clock::time_point> deadline, const PolicyOrder& order) {
  double rank = Seconds(arrival.time_since_epoch());
  if (order.stretch <= 0) return rank;
  rank += order.stretch * device_seconds / weight;
  if (deadline) rank = std::min(rank, Seconds(deadline->time_since_epoch()));
  return rank;
}

double Policy::RemainingSeconds(const JobView& job) {
  const double begin = job.begun() ? 0.0 : job.cost.begin_seconds;
  return begin + job.steps_left * job.cost.step_seconds + job.decode_left * job.cost.decode_seconds;
}

double Policy::FractionLeft(const JobView& job, int steps) {
  const ClipCost& cost = job.cost;
  const double all = cost.begin_seconds + steps * cost.step_seconds + cost.decode_seconds;
  return all > 0 ? std::min(1.0, RemainingSeconds(job) / all) : 1.0;
}

}  // namespace slalom
