#include "scheduler/job_queue.h"

#include <algorithm>
#include <iterator>
#include <queue>
#include <utility>

namespace slalom {

// Jobs that agree in all that can change their order among others.
struct JobLane {
  struct Earlier {
    bool operator()(const QueuedJob* a, const QueuedJob* b) const {
      if (a->base_rank != b->base_rank) return a->base_rank < b->base_rank;
      return a->view.sequence < b->view.sequence;
    }
  };
  int pool = 0;
  int current_class = 0;
  int tenant = 0;
  std::string likely_key;
  std::set<QueuedJob*, Earlier> jobs;
  // Of its first job; as long as the lane is linked only Move changes it.
  double rank = 0;
  std::uint64_t sequence = 0;
  // Where it is linked.
  using Lanes = std::set<JobLane*, LaneBefore>;
  Lanes* all = nullptr;
  Lanes* like = nullptr;  // of one likely key
  Lanes::iterator in_all;
  Lanes::iterator in_like;
};

bool LaneBefore::operator()(const JobLane* a, const JobLane* b) const {
  if (a->rank != b->rank) return a->rank < b->rank;
  return a->sequence < b->sequence;
}

JobQueue::JobQueue(const PolicyOrder& order) : order_(order) {}
JobQueue::~JobQueue() = default;

// --- A job's way ---

void JobQueue::Admit(QueuedJob* job, const std::string& tenant, double weight) {
  job->tenant = fair_share_.Enter(tenant, weight);
  job->weight = weight;
  const auto tenants = static_cast<std::size_t>(job->tenant) + 1;
  if (tenant_lanes_.size() < tenants) tenant_lanes_.resize(tenants);
  job->left = job->device_seconds;
  if (!order_.classes) job->view.priority = Priority::kNormal;
  SetBaseRank(job);
  job->view.rank = RankOf(*job);
}

void JobQueue::SetBaseRank(QueuedJob* job) const {
  const JobView& view = job->view;
  const double by_size =
      Policy::BaseRank(view.arrival, job->left, job->weight, std::nullopt, order_);
  job->base_rank = Policy::BaseRank(view.arrival, job->left, job->weight, view.deadline, order_);
  job->by_deadline = job->base_rank < by_size;
}

void JobQueue::Push(QueuedJob* job) {
  // Who comes back to the queue may have to move to the level; it has no lanes yet.
  fair_share_.Wait(job->tenant);
  PushIntoLane(job);
  if (job->view.priority != Priority::kHigh) {
    pools_[job->pool].may_age.emplace(std::pair(job->view.arrival, job->view.sequence), job);
  }
  ++size_;
}

void JobQueue::Remove(QueuedJob* job) { Remove(job, /*begins=*/false); }

void JobQueue::Remove(QueuedJob* job, bool begins) {
  if (job->lane == nullptr) return;
  job->view.rank = RankOf(*job);
  RemoveFromLane(job);
  pools_[job->pool].may_age.erase({job->view.arrival, job->view.sequence});
  fair_share_.StopWaiting(job->tenant, begins);
  --size_;
}

void JobQueue::Begin(QueuedJob* job) {
  aged_credit_ = std::min(0.0, aged_credit_ + order_.ageing_share * job->device_seconds);
  Remove(job, /*begins=*/true);
}

void JobQueue::Progress(QueuedJob* job, double fraction_left) {
  const double left = std::min(job->left, fraction_left * job->device_seconds);
  const double done = std::exchange(job->left, left) - left;
  if (!job->by_deadline) job->base_rank -= order_.stretch * done / job->weight;
  job->charged += done;
  Charge(job->tenant, done);
}

void JobQueue::Resize(QueuedJob* job, double device_seconds) {
  const double part = job->device_seconds > 0 ? job->left / job->device_seconds : 1.0;
  const double before = std::exchange(job->left, part * device_seconds);
  job->device_seconds = device_seconds;
  if (job->view.begun()) {
    if (!job->by_deadline) {
      job->base_rank += order_.stretch * (job->left - before) / job->weight;
    }
    return;
  }
  const bool queued = job->lane != nullptr;
  if (queued) RemoveFromLane(job);
  SetBaseRank(job);
  if (queued) PushIntoLane(job);
}

void JobQueue::Settle(QueuedJob* job, double device_seconds) {
  Charge(job->tenant, device_seconds - job->charged);
  job->charged = device_seconds;
  if (!job->by_deadline) {
    job->base_rank += order_.stretch * (job->device_seconds - job->left) / job->weight;
  }
  job->left = job->device_seconds;
}

void JobQueue::Retire(QueuedJob* job) {
  Remove(job);
  fair_share_.Leave(job->tenant);
  job->tenant = -1;
}

// --- Candidates ---

// Credit is given out before it is there and earned back by what begins: one aged job at a time.
void JobQueue::Age(SchedulerClock::time_point now) {
  if (order_.ageing_seconds <= 0) return;
  for (auto& [number, pool] : pools_) {
    if (aged_credit_ < 0) return;
    if (pool.may_age.empty()) continue;
    QueuedJob* const job = pool.may_age.begin()->second;
    const double waited = std::chrono::duration<double>(now - job->view.arrival).count();
    if (waited < order_.ageing_seconds || !HigherClassWaits(pool, *job)) continue;
    pool.may_age.erase(pool.may_age.begin());
    aged_credit_ -= job->device_seconds;
    RemoveFromLane(job);
    job->view.priority = Priority::kHigh;
    PushIntoLane(job);
  }
}

bool JobQueue::HigherClassWaits(const Pool& pool, const QueuedJob& job) {
  for (int c = static_cast<int>(job.view.priority) + 1; c < kNumPriorities; ++c) {
    if (!pool.classes[c].all.empty()) return true;
  }
  return false;
}

QueuedJob* JobQueue::First(std::span<const int> pools, const Accept& accept, int most) const {
  struct Place {
    double rank;
    std::uint64_t sequence;
    const JobLane* lane;
    decltype(JobLane::jobs)::const_iterator job;
    bool operator>(const Place& other) const {
      return rank != other.rank ? rank > other.rank : sequence > other.sequence;
    }
  };
  for (int c = kNumPriorities - 1; c >= 0; --c) {
    // Each pool's lanes come in order; they are merged with what follows in lanes already open.
    std::priority_queue<Place, std::vector<Place>, std::greater<>> open;
    std::vector<std::pair<Lanes::const_iterator, Lanes::const_iterator>> rest;
    const auto open_next = [&](auto& lanes) {
      if (lanes.first == lanes.second) return;
      const JobLane* lane = *lanes.first++;
      open.push({lane->rank, lane->sequence, lane, lane->jobs.begin()});
    };
    const JobLane* first = nullptr;
    for (const int pool : pools) {
      const auto found = pools_.find(pool);
      if (found == pools_.end()) continue;
      const Lanes& lanes = found->second.classes[c].all;
      if (lanes.empty()) continue;
      if (first == nullptr || LaneBefore()(*lanes.begin(), first)) first = *lanes.begin();
      rest.emplace_back(lanes.begin(), lanes.end());
    }
    if (first == nullptr) continue;
    QueuedJob* best = Front(*first);
    if (!accept || accept(*best)) return best;
    // The long way: somebody else is the better place for the first.
    for (auto& lanes : rest) open_next(lanes);
    for (int seen = 0; !open.empty() && seen < most; ++seen) {
      Place place = open.top();
      open.pop();
      if (place.job == place.lane->jobs.begin()) {
        // A lane's successor in its pool becomes a candidate with it.
        for (auto& lanes : rest) {
          if (lanes.first != lanes.second && (*lanes.first)->pool == place.lane->pool) {
            open_next(lanes);
          }
        }
      }
      QueuedJob* job = *place.job;
      job->view.rank = place.rank;
      // The very first has been asked about already.
      if (seen > 0 && accept(*job)) return job;
      if (++place.job != place.lane->jobs.end()) {
        place.rank = (*place.job)->base_rank + Usage(place.lane->tenant);
        place.sequence = (*place.job)->view.sequence;
        open.push(place);
      }
    }
  }
  return nullptr;
}

QueuedJob* JobQueue::FirstLike(int pool, std::string_view likely_key, Priority priority) const {
  const auto found = pools_.find(pool);
  if (found == pools_.end()) return nullptr;
  const auto& by_key = found->second.classes[static_cast<int>(priority)].by_key;
  const auto lanes = by_key.find(likely_key);
  return lanes == by_key.end() ? nullptr : Front(**lanes->second.begin());
}

double JobQueue::RankOf(const QueuedJob& job) const {
  if (job.lane != nullptr) return job.base_rank + Usage(job.tenant);
  const bool begun = job.view.begun();
  if (begun && job.by_deadline) return job.view.rank;
  if (begun) return job.base_rank + Usage(job.tenant);
  // A tenant that had nothing in the queue comes in at the level.
  const double used = std::max(fair_share_.used(job.tenant), fair_share_.level());
  return job.base_rank + order_.usage_stretch * used;
}

// --- Lanes ---

double JobQueue::Usage(int tenant) const { return order_.usage_stretch * fair_share_.used(tenant); }

QueuedJob* JobQueue::Front(const JobLane& lane) const {
  QueuedJob* job = *lane.jobs.begin();
  job->view.rank = lane.rank;
  return job;
}

// Sorts the lane in, by its first job.
void JobQueue::Link(JobLane* lane) {
  const QueuedJob* first = *lane->jobs.begin();
  lane->rank = first->base_rank + Usage(lane->tenant);
  lane->sequence = first->view.sequence;
  lane->in_all = lane->all->insert(lane).first;
  lane->in_like = lane->like->insert(lane).first;
}

void JobQueue::Unlink(JobLane* lane) {
  lane->all->erase(lane->in_all);
  lane->like->erase(lane->in_like);
}

// A charge is small, mostly: then the lane stays between its neighbours, and nothing is sorted.
void JobQueue::Move(JobLane* lane) {
  const double rank = (*lane->jobs.begin())->base_rank + Usage(lane->tenant);
  const auto stays = [&](const Lanes& lanes, Lanes::iterator place) {
    const auto next = std::next(place);
    return (place == lanes.begin() || (*std::prev(place))->rank < rank) &&
           (next == lanes.end() || rank < (*next)->rank);
  };
  if (stays(*lane->all, lane->in_all) && stays(*lane->like, lane->in_like)) {
    lane->rank = rank;
    return;
  }
  Unlink(lane);
  Link(lane);
}

void JobQueue::PushIntoLane(QueuedJob* job) {
  const int c = static_cast<int>(job->view.priority);
  LaneName name(job->pool, c, job->tenant, std::string(job->view.likely_key));
  std::unique_ptr<JobLane>& lane = lanes_[std::move(name)];
  if (lane == nullptr) {
    lane = std::make_unique<JobLane>();
    lane->pool = job->pool;
    lane->current_class = c;
    lane->tenant = job->tenant;
    lane->likely_key = job->view.likely_key;
    ClassLanes& lanes = pools_[job->pool].classes[c];
    lane->all = &lanes.all;
    lane->like = &lanes.by_key[lane->likely_key];
    tenant_lanes_[static_cast<std::size_t>(job->tenant)].push_back(lane.get());
  } else {
    const JobLane::Earlier earlier;
    if (!earlier(job, *lane->jobs.begin())) {
      lane->jobs.insert(job);
      job->lane = lane.get();
      return;
    }
    Unlink(lane.get());
  }
  lane->jobs.insert(job);
  job->lane = lane.get();
  Link(lane.get());
}

void JobQueue::RemoveFromLane(QueuedJob* job) {
  JobLane* lane = std::exchange(job->lane, nullptr);
  const bool first = *lane->jobs.begin() == job;
  if (first) Unlink(lane);
  lane->jobs.erase(job);
  if (!lane->jobs.empty()) {
    if (first) Link(lane);
    return;
  }
  std::erase(tenant_lanes_[static_cast<std::size_t>(lane->tenant)], lane);
  if (lane->like->empty()) {
    pools_[lane->pool].classes[lane->current_class].by_key.erase(lane->likely_key);
  }
  lanes_.erase(LaneName(lane->pool, lane->current_class, lane->tenant, lane->likely_key));
}

void JobQueue::Charge(int tenant, double device_seconds) {
  if (device_seconds == 0) return;
  const std::vector<JobLane*>& lanes = tenant_lanes_[static_cast<std::size_t>(tenant)];
  fair_share_.Charge(tenant, device_seconds);
  for (JobLane* lane : lanes) Move(lane);
}

}  // namespace slalom
