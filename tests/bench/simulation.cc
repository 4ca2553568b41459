#include "tests/bench/simulation.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <memory>
#include <queue>
#include <random>
#include <set>

#include "scheduler/job_queue.h"
#include "scheduler/placement.h"

namespace slalom {
namespace {

using Clock = SchedulerClock;
using Phase = JobView::Phase;

constexpr char kModel[] = "model";
constexpr int kPool = 0;
constexpr double kDecodePieces = 2;  // of a clip

Clock::time_point At(double seconds) {
  return Clock::time_point(
      std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds)));
}

struct SimJob : QueuedJob {
  const TraceJob* trace = nullptr;
  double worked = 0;   // device seconds so far, its share of batches
  double decoded = 0;  // seconds
};

struct SimDevice {
  double speed = 1;
  int kind = 0;  // of costs
  std::vector<SimJob*> begun;
  // The piece of work under way.
  Action::Kind at_work = Action::Kind::kWait;
  std::vector<SimJob*> batch;
  double piece_seconds = 0;
};

class Simulation {
 public:
  Simulation(const Trace& trace, const SimulationOptions& options)
      : trace_(trace), options_(options), queue_(options.limits.order), random_(options.seed) {
    for (const double speed : options.speeds) {
      SimDevice device;
      device.speed = speed;
      device.kind = costs_.Kind("speed " + std::to_string(speed), kModel, AttentionKind::kDense);
      devices_.push_back(device);
      idle_.emplace(-speed, static_cast<int>(devices_.size()) - 1);
    }
    equal_ = std::all_of(options.speeds.begin(), options.speeds.end(),
                         [&](double speed) { return speed == options.speeds.front(); });
  }

  SimulationResult Run() {
    const auto start = std::chrono::steady_clock::now();
    std::size_t next = 0;
    while (next < trace_.jobs.size() || !events_.empty()) {
      const bool arrival = next < trace_.jobs.size() &&
                           (events_.empty() || trace_.jobs[next].arrival <= events_.top().first);
      if (arrival) {
        now_ = trace_.jobs[next].arrival;
        Arrive(trace_.jobs[next++]);
      } else {
        now_ = events_.top().first;
        const int device = events_.top().second;
        events_.pop();
        FinishPiece(devices_[static_cast<std::size_t>(device)]);
        Turn(device);
      }
    }
    SimulationResult result = Summarise();
    result.seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return result;
  }

 private:
  const TraceShape& ShapeOf(const SimJob& job) const {
    return trace_.shapes[static_cast<std::size_t>(job.trace->shape)];
  }

  // What the pipeline would estimate: the work is right, the rate is not.
  ClipCost Prior(const SimJob& job) const {
    const TraceShape& shape = ShapeOf(job);
    ClipCost cost;
    cost.begin_work = shape.begin_seconds;
    cost.step_work = shape.step_seconds;
    cost.decode_work = shape.decode_seconds;
    cost.begin_seconds = cost.begin_work * options_.prior_error;
    cost.step_seconds = cost.step_work * options_.prior_error;
    cost.decode_seconds = cost.decode_work * options_.prior_error;
    return cost;
  }

  void Arrive(const TraceJob& trace) {
    SimJob* job = NewJob();
    job->trace = &trace;
    JobView& view = job->view;
    view.sequence = next_sequence_++;
    view.arrival = At(trace.arrival);
    view.priority = trace.priority;
    if (trace.deadline > 0) view.deadline = At(trace.arrival + trace.deadline);
    view.likely_key = ShapeOf(*job).name;
    view.batch_key = view.likely_key;
    view.max_batch = options_.limits.max_batch;
    view.steps_left = trace.steps;
    job->pool = kPool;
    const SimDevice& fastest = devices_[FastestDevice()];
    view.cost = costs_.Predict(fastest.kind, Prior(*job));
    job->device_seconds = Policy::RemainingSeconds(view);
    const auto tenant = static_cast<std::size_t>(trace.tenant);
    queue_.Admit(job, trace_.tenants[tenant], trace_.weights[tenant]);
    queue_.Push(job);
    WakeIdle();
  }

  std::size_t FastestDevice() const {
    if (equal_) return 0;
    return static_cast<std::size_t>(
        std::max_element(devices_.begin(), devices_.end(),
                         [](const SimDevice& a, const SimDevice& b) { return a.speed < b.speed; }) -
        devices_.begin());
  }

  // Idle devices, the fastest first, until one finds nothing to do.
  void WakeIdle() {
    const std::set<std::pair<double, int>> idle = equal_ ? decltype(idle_){} : idle_;
    if (equal_) {
      if (!idle_.empty()) Turn(idle_.begin()->second);
      return;
    }
    for (const auto& [speed, device] : idle) {
      if (queue_.size() == 0) return;
      Turn(device);
    }
  }

  bool PlacedHere(const QueuedJob& job, int here, std::vector<double>* handed_on) const {
    std::vector<DeviceOffer> offers(devices_.size());
    const ClipCost prior = Prior(static_cast<const SimJob&>(job));
    JobView view = job.view;
    for (std::size_t i = 0; i < devices_.size(); ++i) {
      view.cost = costs_.Predict(devices_[i].kind, prior);
      offers[i].own_seconds = Policy::RemainingSeconds(view);
      offers[i].ahead_seconds = (*handed_on)[i];
      offers[i].idle = devices_[i].begun.empty() && (*handed_on)[i] == 0;
      for (const SimJob* begun : devices_[i].begun) {
        if (Policy::Before(begun->view, job.view)) {
          offers[i].ahead_seconds += Policy::RemainingSeconds(begun->view);
        }
      }
    }
    const std::size_t place = Place(offers, static_cast<std::size_t>(here));
    if (place == static_cast<std::size_t>(here)) return true;
    (*handed_on)[place] += offers[place].own_seconds;
    return false;
  }

  void AddCandidates(int index, const SimDevice& device) {
    queue_.Age(At(now_));
    const auto add = [&](QueuedJob* found) {
      auto* job = static_cast<SimJob*>(found);
      if (std::find(jobs_.begin(), jobs_.end(), job) != jobs_.end()) return;
      const ClipCost prior = Prior(*job);
      job->view.cost = costs_.Predict(device.kind, prior);
      job->view.marginal = costs_.Marginal(device.kind, prior);
      jobs_.push_back(job);
      views_.push_back(job->view);
    };
    const std::size_t begun = jobs_.size();
    for (std::size_t i = 0; i < begun && options_.limits.max_batch > 1; ++i) {
      if (views_[i].phase != Phase::kStepping) continue;
      const JobView& view = views_[i];
      if (QueuedJob* mate = queue_.FirstLike(kPool, view.likely_key, view.priority)) add(mate);
    }
    QueuedJob* first = nullptr;
    if (equal_) {
      first = queue_.First(kPools);
    } else {
      std::vector<double> handed_on(devices_.size());
      first = queue_.First(
          kPools, [&](const QueuedJob& job) { return PlacedHere(job, index, &handed_on); });
    }
    if (first != nullptr) add(first);
  }

  void Turn(int index) {
    SimDevice& device = devices_[static_cast<std::size_t>(index)];
    for (;;) {
      jobs_ = device.begun;
      views_.clear();
      for (SimJob* job : jobs_) {
        job->view.rank = queue_.RankOf(*job);
        views_.push_back(job->view);
      }
      AddCandidates(index, device);
      if (!DropExpired(device)) break;
    }
    ++turns_;
    const Action action = Policy::Plan(views_, At(now_), options_.limits);
    idle_.erase({-device.speed, index});
    device.at_work = action.kind;
    if (action.kind == Action::Kind::kWait) {
      idle_.emplace(-device.speed, index);
      return;
    }
    device.batch.clear();
    for (const std::size_t i : action.jobs) device.batch.push_back(jobs_[i]);
    SimJob& lead = *device.batch.front();
    const TraceShape& shape = ShapeOf(lead);
    double seconds = 0;
    if (action.kind == Action::Kind::kBegin) {
      queue_.Begin(&lead);
      device.begun.push_back(&lead);
      seconds = shape.begin_seconds;
    } else if (action.kind == Action::Kind::kDenoise) {
      seconds = shape.step_seconds *
                (1 + options_.marginal * static_cast<double>(device.batch.size() - 1));
    } else {
      lead.view.phase = Phase::kDecoding;
      seconds = shape.decode_seconds / kDecodePieces;
    }
    device.piece_seconds = seconds / device.speed * Noise();
    busy_ += device.piece_seconds;
    events_.emplace(now_ + device.piece_seconds, index);
  }

  double Noise() { return options_.noise > 0 ? std::exp(options_.noise * normal_(random_)) : 1.0; }

  // True when there was one: ask again.
  bool DropExpired(SimDevice& device) {
    bool dropped = false;
    for (SimJob* job : jobs_) {
      if (!job->view.deadline || *job->view.deadline > At(now_)) continue;
      std::erase(device.begun, job);
      Done(job, /*expired=*/true);
      dropped = true;
    }
    return dropped;
  }

  void FinishPiece(SimDevice& device) {
    Observe(device);
    for (SimJob* job : device.batch)
      queue_.Progress(job, Policy::FractionLeft(job->view, job->trace->steps));
    SimJob* lead = device.batch.front();
    if (lead->view.decode_left <= 0) {
      std::erase(device.begun, lead);
      Done(lead, /*expired=*/false);
    }
  }

  // What the piece of work took, and where it leaves its jobs.
  void Observe(SimDevice& device) {
    const double seconds = device.piece_seconds;
    SimJob& lead = *device.batch.front();
    const int size = static_cast<int>(device.batch.size());
    const ClipCost prior = Prior(lead);
    for (SimJob* job : device.batch) job->worked += seconds / size;
    switch (device.at_work) {
      case Action::Kind::kWait:
        break;
      case Action::Kind::kBegin:
        costs_.ObserveBegin(device.kind, prior, seconds);
        lead.view.phase = Phase::kStepping;
        break;
      case Action::Kind::kDenoise:
        costs_.ObserveStep(device.kind, prior, size, seconds);
        for (SimJob* job : device.batch) {
          JobView& view = job->view;
          view.cost.step_seconds = costs_.StepSeconds(device.kind, prior, size) / size;
          view.marginal = costs_.Marginal(device.kind, prior);
          if (--view.steps_left == 0) view.phase = Phase::kDenoised;
        }
        break;
      case Action::Kind::kDecode:
        lead.decoded += seconds;
        lead.view.decode_left -= 1 / kDecodePieces;
        if (lead.view.decode_left > 1e-9) break;
        lead.view.decode_left = 0;
        costs_.ObserveDecode(device.kind, prior, lead.decoded);
        break;
    }
  }

  void Done(SimJob* job, bool expired) {
    queue_.Settle(job, job->worked);
    queue_.Retire(job);
    const double latency = now_ - job->trace->arrival;
    Tally& tally = tallies_[{job->trace->shape, job->trace->priority}];
    if (expired) {
      ++tally.expired;
    } else {
      tally.latency.push_back(latency);
      tally.wait.push_back(std::max(0.0, latency - job->worked));
      const double slowdown = latency / trace_.Seconds(*job->trace);
      worst_slowdown_ = std::max(worst_slowdown_, slowdown);
      TenantSum& sum = tenants_[job->trace->tenant];
      sum.slowdown += slowdown;
      sum.worked += job->worked;
      ++sum.jobs;
      makespan_ = std::max(makespan_, now_);
    }
    free_.push_back(job);
  }

  SimulationResult Summarise() {
    SimulationResult result;
    std::int64_t jobs = 0;
    for (auto& [key, tally] : tallies_) {
      SimulatedClass summary;
      summary.shape = trace_.shapes[static_cast<std::size_t>(key.first)].name;
      summary.priority = key.second;
      summary.jobs = static_cast<std::int64_t>(tally.latency.size());
      summary.expired = tally.expired;
      jobs += summary.jobs;
      summary.latency = PercentilesOf(&tally.latency);
      summary.wait = PercentilesOf(&tally.wait);
      result.classes.push_back(summary);
    }
    result.makespan = makespan_;
    result.busy_seconds = busy_;
    const double begin = trace_.jobs.front().arrival;
    const double span = std::max(1e-9, makespan_ - begin);
    result.utilisation = busy_ / (span * static_cast<double>(devices_.size()));
    result.jobs_per_second = static_cast<double>(jobs) / span;
    TenantSum heaviest;
    TenantSum others;
    for (const auto& [tenant, sum] : tenants_) {
      if (sum.worked > heaviest.worked) heaviest = sum;
      others.slowdown += sum.slowdown;
      others.jobs += sum.jobs;
    }
    others.slowdown -= heaviest.slowdown;
    others.jobs -= heaviest.jobs;
    const auto mean = [](const TenantSum& sum) {
      return sum.jobs == 0 ? 0.0 : sum.slowdown / static_cast<double>(sum.jobs);
    };
    result.heaviest_slowdown = mean(heaviest);
    result.others_slowdown = mean(others);
    result.worst_slowdown = worst_slowdown_;
    result.turns = turns_;
    result.cost_errors = costs_.Errors();
    return result;
  }

  SimJob* NewJob() {
    if (free_.empty()) {
      jobs_made_.push_back(std::make_unique<SimJob>());
      return jobs_made_.back().get();
    }
    SimJob* job = free_.back();
    free_.pop_back();
    *job = SimJob();
    return job;
  }

  static constexpr int kPools[] = {kPool};
  struct Tally {
    std::vector<double> latency;
    std::vector<double> wait;
    std::int64_t expired = 0;
  };
  struct TenantSum {
    double slowdown = 0;
    double worked = 0;
    std::int64_t jobs = 0;
  };

  const Trace& trace_;
  const SimulationOptions& options_;
  JobQueue queue_;
  CostModel costs_;
  std::mt19937_64 random_;
  std::normal_distribution<double> normal_;
  std::vector<SimDevice> devices_;
  bool equal_ = true;
  std::set<std::pair<double, int>> idle_;  // the fastest first
  using Event = std::pair<double, int>;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
  std::vector<std::unique_ptr<SimJob>> jobs_made_;
  std::vector<SimJob*> free_;
  std::uint64_t next_sequence_ = 0;
  double now_ = 0;
  // Of the turn under way: kept for their memory.
  std::vector<SimJob*> jobs_;
  std::vector<JobView> views_;

  std::map<std::pair<int, Priority>, Tally> tallies_;
  std::map<int, TenantSum> tenants_;
  double worst_slowdown_ = 0;
  double makespan_ = 0;
  double busy_ = 0;
  std::int64_t turns_ = 0;
};

}  // namespace

Percentiles PercentilesOf(std::vector<double>* values) {
  Percentiles result;
  if (values->empty()) return result;
  std::sort(values->begin(), values->end());
  const auto at = [&](double q) {
    const double place = q * static_cast<double>(values->size() - 1);
    return (*values)[static_cast<std::size_t>(std::llround(place))];
  };
  result.p50 = at(0.50);
  result.p95 = at(0.95);
  result.p99 = at(0.99);
  for (const double value : *values) result.mean += value;
  result.mean /= static_cast<double>(values->size());
  return result;
}

SimulationResult Simulate(const Trace& trace, const SimulationOptions& options) {
  return Simulation(trace, options).Run();
}

}  // namespace slalom
