// JobQueue: the queued jobs, indexed so that a device finds its candidates in microseconds however
// many wait. It keeps the policy's order; what a device does with its candidates is Policy::Plan's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "scheduler/fair_share.h"
#include "scheduler/policy.h"

namespace slalom {

struct JobLane;
struct LaneBefore {
  bool operator()(const JobLane* a, const JobLane* b) const;
};

// A job as the queue knows it. Its owner keeps it in place from Admit to Retire.
struct QueuedJob {
  JobView view;               // set before Admit, its keys included
  int pool = 0;               // which devices may run it: the queue only compares it
  double device_seconds = 0;  // predicted, for all of it

  // The queue's own.
  double base_rank = 0;      // of what is left of it
  bool by_deadline = false;  // which is sooner than its size alone would say
  int tenant = -1;
  double weight = 1.0;
  JobLane* lane = nullptr;  // set while it is queued
  double left = 0;          // device seconds, of those predicted
  double charged = 0;       // to its tenant so far
};

// The order is class, then rank, then arrival (Policy::Before). A rank is
//
//     arrival + stretch * (what is left of the job) + usage_stretch * (what its tenant has used)
//
// with device seconds divided by the tenant's weight, or the deadline in place of arrival and size
// when that is sooner. It ages with the clock against those who come later; among one tenant's jobs
// the shortest goes first; among tenants the one that has used least. What a job works moves from
// its own part to its tenant's, so that a job which runs never loses rank: nobody takes turns with
// his equals, step by step. A job that runs for its deadline keeps the rank it began with.
//
// Jobs that agree in pool, class, tenant and likely key form a lane, whose order never changes;
// only lanes move. Push, Begin, Progress and First cost the logarithm of the number of lanes.
//
// A state machine without clock or threads: time comes with the calls.
class JobQueue {
 public:
  explicit JobQueue(const PolicyOrder& order);
  ~JobQueue();
  JobQueue(const JobQueue&) = delete;
  JobQueue& operator=(const JobQueue&) = delete;

  // --- A job's way ---

  // The tenant has one job more; view.rank becomes what the job would have if pushed now.
  void Admit(QueuedJob* job, const std::string& tenant, double weight);
  void Push(QueuedJob* job);
  // Takes it out of the queue (no more); nothing if it is not in it.
  void Remove(QueuedJob* job);
  // Takes it out because a device begins it.
  void Begin(QueuedJob* job);
  // Of a begun job, that part is left; it never grows.
  void Progress(QueuedJob* job, double fraction_left);
  // All of it is predicted anew: a job that came while nothing was known does not wait for that.
  void Resize(QueuedJob* job, double device_seconds);
  // It is over, or back from a lost device: what it has really used counts, and all of it is left.
  void Settle(QueuedJob* job, double device_seconds);
  // Its tenant has one job less.
  void Retire(QueuedJob* job);

  // --- Candidates ---

  // Raises the oldest job to the highest class if it has waited long enough behind higher ones and
  // it is the turn of the aged. Before asking for candidates.
  void Age(SchedulerClock::time_point now);
  using Accept = std::function<bool(const QueuedJob&)>;
  // The first job of these pools, in order, that `accept` takes (null: any). Looks at
  // `most` jobs at most. view.rank is up to date. Null when there is none.
  QueuedJob* First(std::span<const int> pools, const Accept& accept = nullptr, int most = 64) const;
  // The first job of the pool, in order, with that likely key and priority.
  QueuedJob* FirstLike(int pool, std::string_view likely_key, Priority priority) const;
  // Its rank as of now, whether it is queued or not. view.rank is as old as the last call that said
  // it would set it.
  double RankOf(const QueuedJob& job) const;

  std::size_t size() const { return size_; }
  const FairShare& fair_share() const { return fair_share_; }

 private:
  using Lanes = std::set<JobLane*, LaneBefore>;
  struct ClassLanes {
    Lanes all;
    std::map<std::string, Lanes, std::less<>> by_key;
  };
  struct Pool {
    ClassLanes classes[kNumPriorities];
    // Those below the highest class, by arrival and sequence.
    std::map<std::pair<SchedulerClock::time_point, std::uint64_t>, QueuedJob*> may_age;
  };

  double Usage(int tenant) const;
  void SetBaseRank(QueuedJob* job) const;
  void Link(JobLane* lane);
  void Unlink(JobLane* lane);
  void Move(JobLane* lane);  // after its rank may have changed
  static bool HigherClassWaits(const Pool& pool, const QueuedJob& job);
  void PushIntoLane(QueuedJob* job);
  void Remove(QueuedJob* job, bool begins);
  void RemoveFromLane(QueuedJob* job);
  void Charge(int tenant, double device_seconds);
  QueuedJob* Front(const JobLane& lane) const;

  const PolicyOrder order_;
  FairShare fair_share_;
  using LaneName = std::tuple<int, int, int, std::string>;  // pool, class, tenant, likely key
  std::map<LaneName, std::unique_ptr<JobLane>> lanes_;
  std::vector<std::vector<JobLane*>> tenant_lanes_;  // by tenant number
  std::unordered_map<int, Pool> pools_;
  double aged_credit_ = 0;  // device seconds that the aged may have
  std::size_t size_ = 0;
};

}  // namespace slalom
