// The queue and the policy together, on devices that do not exist, against a clock that is only a
// number: whatever the load, the promises of scheduler/README.md hold.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "scheduler/job_queue.h"

namespace slalom {
namespace {

using Kind = Action::Kind;
using Phase = JobView::Phase;

constexpr int kPools[] = {0};
constexpr std::size_t kMiB = 1 << 20;

struct PlayJob : QueuedJob {
  std::string tenant;
  double arrival = 0;
  double weight = 1;
  int steps = 1;
  double begun_at = -1;
  double done_at = -1;
};

// Devices that take turns in the order in which they become free.
class Play {
 public:
  Play(const PolicyLimits& limits, int devices)
      : limits_(limits), queue_(limits.order), devices_(static_cast<std::size_t>(devices)) {}
  ~Play() {
    for (const auto& job : jobs_) {
      if (job->tenant_entered()) queue_.Retire(job.get());
    }
  }

  PlayJob* Add(double arrival, double step_seconds, int steps, const std::string& tenant) {
    jobs_.push_back(std::make_unique<Entry>());
    Entry* job = jobs_.back().get();
    JobView& view = job->view;
    job->tenant = tenant;
    job->arrival = arrival;
    job->steps = steps;
    view.sequence = jobs_.size();
    view.arrival = At(arrival);
    view.likely_key = view.batch_key = "key";
    view.max_batch = 1;
    view.steps_left = steps;
    view.cost.step_seconds = step_seconds;
    view.cost.decode_seconds = step_seconds;
    view.cost.waiting_bytes = kMiB;
    view.cost.step_bytes = 10 * kMiB;
    view.cost.decode_bytes = 100 * kMiB;
    return job;
  }

  // Until everything is done; false when that takes too many turns.
  bool Run() {
    std::vector<Entry*> coming;
    for (const auto& job : jobs_) coming.push_back(job.get());
    std::stable_sort(coming.begin(), coming.end(),
                     [](const Entry* a, const Entry* b) { return a->arrival < b->arrival; });
    std::size_t next = 0;
    std::size_t done = 0;
    for (int turn = 0; done < jobs_.size(); ++turn) {
      if (turn > 200000) return false;
      Device& device =
          *std::min_element(devices_.begin(), devices_.end(),
                            [](const Device& a, const Device& b) { return a.free_at < b.free_at; });
      now_ = std::max(now_, device.free_at);
      for (; next < coming.size() && coming[next]->arrival <= now_; ++next) Arrive(coming[next]);
      if (Turn(device, &done)) continue;
      // Nothing to do: until the next job comes, or another device has done something.
      double later = next < coming.size() ? coming[next]->arrival : HUGE_VAL;
      for (const Device& other : devices_) {
        if (other.begun.empty()) continue;
        later = std::min(later, std::max(other.free_at, device.free_at) + 1e-6);
      }
      if (later == HUGE_VAL) return false;
      device.free_at = later;
    }
    return true;
  }

  const std::vector<std::string>& faults() const { return faults_; }
  double used(const std::string& tenant) { return used_[tenant]; }
  double now() const { return now_; }
  // Called after each piece of work.
  std::function<void()> after_piece;

 private:
  struct Entry : PlayJob {
    bool entered = false;
    bool tenant_entered() const { return entered && done_at < 0; }
  };
  struct Device {
    double free_at = 0;
    std::vector<Entry*> begun;
  };

  static SchedulerClock::time_point At(double seconds) {
    return SchedulerClock::time_point(std::chrono::microseconds(std::llround(1e6 * seconds)));
  }

  void Arrive(Entry* job) {
    job->device_seconds = Policy::RemainingSeconds(job->view);
    job->entered = true;
    queue_.Admit(job, job->tenant, job->weight);
    queue_.Push(job);
  }

  // False when the policy said to wait.
  bool Turn(Device& device, std::size_t* done) {
    std::vector<Entry*> jobs = device.begun;
    std::vector<JobView> views;
    for (Entry* job : jobs) {
      job->view.rank = queue_.RankOf(*job);
      views.push_back(job->view);
    }
    queue_.Age(At(now_));
    if (QueuedJob* first = queue_.First(kPools)) {
      jobs.push_back(static_cast<Entry*>(first));
      views.push_back(first->view);
    }
    const Action action = Policy::Plan(views, At(now_), limits_);
    Check(device, views, action);
    if (action.kind == Kind::kWait) return false;
    Entry* job = jobs[action.jobs.front()];
    double seconds = 0;
    if (action.kind == Kind::kBegin) {
      queue_.Begin(job);
      device.begun.push_back(job);
      job->view.phase = Phase::kStepping;
      job->begun_at = now_;
    } else if (action.kind == Kind::kDenoise) {
      seconds = job->view.cost.step_seconds;
      if (--job->view.steps_left == 0) job->view.phase = Phase::kDenoised;
    } else {
      seconds = job->view.cost.decode_seconds / 2;
      job->view.phase = Phase::kDecoding;
      job->view.decode_left -= 0.5;
    }
    used_[job->tenant] += seconds;
    device.free_at = now_ + seconds;
    queue_.Progress(job, Policy::FractionLeft(job->view, job->steps));
    if (job->view.decode_left <= 0) {
      job->done_at = device.free_at;
      std::erase(device.begun, job);
      queue_.Settle(job, job->device_seconds);
      queue_.Retire(job);
      ++*done;
    }
    if (after_piece) after_piece();
    return true;
  }

  void Check(const Device& device, const std::vector<JobView>& views, const Action& action) {
    if (action.kind == Kind::kWait) {
      if (!views.empty()) faults_.push_back("a device waits while there is work");
      return;
    }
    int decoding = 0;
    std::size_t bytes = 0;
    for (const Entry* job : device.begun) {
      bytes += job->view.cost.waiting_bytes;
      if (job->view.phase == Phase::kDecoding) {
        ++decoding;
        bytes += job->view.cost.decode_bytes;
      }
    }
    const JobView& view = views[action.jobs.front()];
    if (action.kind == Kind::kDecode && view.phase == Phase::kDenoised) {
      ++decoding;
      bytes += view.cost.decode_bytes;
    }
    if (action.kind == Kind::kDenoise) bytes += view.cost.step_bytes;
    if (action.kind == Kind::kBegin &&
        static_cast<int>(device.begun.size()) >= limits_.max_in_flight) {
      faults_.push_back("too many in flight");
    }
    if (decoding > limits_.max_decoding) faults_.push_back("too many decoders");
    if (limits_.memory_bytes != 0 && bytes > limits_.memory_bytes) faults_.push_back("memory");
  }

  const PolicyLimits limits_;
  JobQueue queue_;
  std::vector<Device> devices_;
  std::vector<std::unique_ptr<Entry>> jobs_;
  std::map<std::string, double> used_;
  std::vector<std::string> faults_;
  double now_ = 0;
};

std::string Tenant(int number) { return std::string("t").append(std::to_string(number)); }

// Thousands of random loads.
TEST(Play, KeepsEveryLimitNeverIdlesAndFinishesEverything) {
  for (unsigned seed = 0; seed < 3000; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&](unsigned n) { return static_cast<int>(random() % n); };
    PolicyLimits limits;
    limits.max_in_flight = 1 + below(6);
    limits.max_decoding = 1 + below(2);
    limits.memory_bytes = below(2) == 0 ? 0 : static_cast<std::size_t>(112 + below(200)) * kMiB;
    limits.order.ageing_seconds = 1 + below(100);
    Play play(limits, 1 + below(3));
    for (int i = 0; i < 30; ++i) {
      PlayJob* job =
          play.Add(0.5 * below(100), 0.1 * (1 + below(30)), 1 + below(6), Tenant(below(4)));
      job->view.priority = static_cast<Priority>(below(kNumPriorities));
      job->weight = 1 + below(3);
    }
    ASSERT_TRUE(play.Run()) << "seed " << seed;
    ASSERT_TRUE(play.faults().empty()) << "seed " << seed << ": " << play.faults().front();
  }
}

// Against a stream of small jobs that fills the device for ever, a large one waits for at most
// stretch times what it takes more than they do (and what comes at once).
TEST(Play, SmallJobsDoNotStarveALargeOne) {
  PolicyLimits limits;
  limits.order.stretch = 10;
  limits.order.usage_stretch = 2;
  Play play(limits, 1);
  for (int i = 0; i < 1000; ++i) play.Add(2.0 * i, 1.0, 1, "many");  // 2 s each: load 1
  PlayJob* large = play.Add(5, 10, 3, "one");                        // 40 s
  ASSERT_TRUE(play.Run());
  EXPECT_GT(large->begun_at, 100);  // it does yield
  EXPECT_LT(large->begun_at, 5 + 10 * 40 + 10);
}

// High jobs fill the device for ever, and yet low ones get their 20th part.
TEST(Play, HighPriorityDoesNotStarveLow) {
  PolicyLimits limits;
  limits.order.ageing_seconds = 50;
  Play play(limits, 1);
  for (int i = 0; i < 3000; ++i) {
    play.Add(2.0 * i, 1.05, 1, "a")->view.priority = Priority::kHigh;  // load 1.05
  }
  std::vector<PlayJob*> low;
  for (int i = 0; i < 20; ++i) {
    low.push_back(play.Add(0, 1.05, 1, "b"));
    low.back()->view.priority = Priority::kLow;
  }
  ASSERT_TRUE(play.Run());
  for (std::size_t i = 0; i < low.size(); ++i) {
    // 2.1 s of work each, 20 times that for others in between.
    EXPECT_LT(low[i]->done_at, 60 + 1.2 * 21 * 2.1 * static_cast<double>(i + 1)) << i;
  }
}

// Two tenants with more work than there is room for: at every moment each has had its share of
// device seconds, by weight, whatever the sizes of their jobs.
TEST(Play, TenantsGetTheirShares) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&](unsigned n) { return static_cast<int>(random() % n); };
    const double weights[] = {1.0, 1.0 + below(4)};
    // The sizes differ by at most 3 s a step between tenants, 5 steps and a decode: what the
    // shortest-first rule makes of that is the bound, beside one job's length.
    const double step[] = {0.5 + 0.1 * below(30), 0.5 + 0.1 * below(30)};
    PolicyLimits limits;
    Play play(limits, 1);
    for (int i = 0; i < 400; ++i) {
      for (int t = 0; t < 2; ++t) {
        play.Add(0, step[t], 4, Tenant(t))->weight = weights[t];
      }
    }
    const double sizes[] = {5 * step[0] / weights[0], 5 * step[1] / weights[1]};
    const PolicyOrder& order = limits.order;
    const double bound = std::abs(sizes[0] - sizes[1]) * order.stretch / order.usage_stretch +
                         std::max(sizes[0], sizes[1]) * (1 + order.stretch / order.usage_stretch);
    // While both still have work.
    const double until = 0.9 * 400 * std::min(5 * step[0], 5 * step[1]);
    double worst = 0;
    play.after_piece = [&] {
      if (play.now() > until) return;
      worst =
          std::max(worst, std::abs(play.used("t0") / weights[0] - play.used("t1") / weights[1]));
    };
    ASSERT_TRUE(play.Run());
    ASSERT_LE(worst, bound) << "seed " << seed;
    ASSERT_GT(until, 3 * bound);  // the bound says something
  }
}

// What can be done in time is, when deadlines are all that matters: earliest deadline first is
// optimal on one device that can be taken away between steps.
TEST(Play, FeasibleDeadlinesAreMet) {
  int checked = 0;
  for (unsigned seed = 0; seed < 1000; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&](unsigned n) { return static_cast<int>(random() % n); };
    PolicyLimits limits;
    limits.max_in_flight = 100;
    limits.max_decoding = 100;
    Play play(limits, 1);
    // Deadlines by making a schedule first: the jobs in any order, each due when it would be done
    // there, or later. Tight enough to go before the jobs' own places.
    std::vector<std::pair<PlayJob*, double>> due;
    double end = 0;
    for (int i = 0; i < 12; ++i) {
      const double step = 0.5 * (1 + below(4));
      const int steps = 1 + below(4);
      PlayJob* job = play.Add(0, step, steps, Tenant(0));
      end += step * (steps + 1);
      // One piece of a job with a later deadline may be at work, none here: all come at once.
      due.emplace_back(job, end + below(3));
      job->view.deadline = SchedulerClock::time_point(
          std::chrono::microseconds(std::llround(1e6 * (due.back().second + 0.001))));
    }
    const bool bind = std::all_of(due.begin(), due.end(), [&](const auto& each) {
      return each.second <
             limits.order.stretch * each.first->view.cost.step_seconds * (each.first->steps + 1);
    });
    if (!bind) continue;
    ++checked;
    ASSERT_TRUE(play.Run()) << "seed " << seed;
    for (const auto& [job, at] : due) ASSERT_LE(job->done_at, at + 0.001) << "seed " << seed;
  }
  EXPECT_GT(checked, 200);
}

}  // namespace
}  // namespace slalom
