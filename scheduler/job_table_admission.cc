// JobTable: what comes in, or is refused.
#include <algorithm>
#include <cstdio>
#include <random>
#include <sstream>

#include "scheduler/job_table.h"
#include "scheduler/job_text.h"

namespace slalom {
namespace {

using Clock = SchedulerClock;

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

}  // namespace

void JobTable::CheckRoom(const Job& job) const {
  const JobRequest& request = job.request;
  if (!accepting_) throw Error(ErrorCode::kUnavailable, "the server is shutting down");
  if (DevicesOf(job.pool) == 0) {
    throw Error(ErrorCode::kUnavailable, "no working device serves model " + request.model);
  }
  if (FindLive(request.id) != nullptr) {
    throw Error(ErrorCode::kAlreadyExists, "job " + request.id + " is live already");
  }
  const ClipCost& cost = job.view.cost;
  const std::size_t need = cost.waiting_bytes + std::max(cost.step_bytes, cost.decode_bytes);
  if (options_.limits.memory_bytes != 0 && need > options_.limits.memory_bytes) {
    throw Error(ErrorCode::kResourceExhausted,
                "the clip needs " + std::to_string(need >> 20) + " MiB of device memory, at most " +
                    std::to_string(options_.limits.memory_bytes >> 20) + " MiB are there");
  }
  if (queued_ >= options_.max_queue && !request.readmitted) {
    throw QueueFull("the queue is full: " + std::to_string(queued_) + " jobs wait, at most " +
                    std::to_string(options_.max_queue) + " may");
  }
}

void JobTable::CheckDeadline(const Job& job, double eta) const {
  const auto& deadline = job.request.deadline;
  if (!deadline || job.request.readmitted) return;
  const double left = std::max(0.0, InSeconds(*deadline - job.submitted));
  if (eta <= left && left > 0.0) return;
  const double own = Policy::RemainingSeconds(job.view);
  throw Error(ErrorCode::kDeadlineExceeded, "the job would take about " + DescribeSeconds(eta) +
                                                " (" + DescribeSeconds(eta - own) +
                                                " of it waiting), its deadline is in " +
                                                DescribeSeconds(left));
}

JobPtr JobTable::Insert(JobRequest request, const ClipCost& prior) {
  if (!(request.tenant_weight > 0)) {
    throw Error(ErrorCode::kInternal, "a tenant's weight must be positive");
  }
  auto job = std::make_shared<Job>();
  job->submitted = Clock::now();
  job->submitted_at = std::chrono::system_clock::now();
  job->request = std::move(request);
  job->checkpoint = std::move(job->request.checkpoint);
  if (job->request.id.empty()) job->request.id = MakeId();
  job->likely_key = LikelyKey(job->request.model, job->request.spec);
  job->prior = prior;
  job->view.arrival = job->submitted;
  job->view.priority = job->request.priority;
  job->view.deadline = job->request.deadline;
  job->view.likely_key = job->likely_key;
  job->view.steps_left = job->request.spec.steps;

  const std::lock_guard lock(mutex_);
  job->pool = PoolOf(job->request.model);
  job->view.cost = LeastCost(*job);
  CheckRoom(*job);
  job->view.sequence = next_sequence_++;
  job->device_seconds = Policy::RemainingSeconds(job->view);
  queue_.Admit(job.get(), job->request.tenant, job->request.tenant_weight);
  job->promised_seconds = WaitOf(*job).seconds + job->device_seconds;
  try {
    CheckDeadline(*job, job->promised_seconds);
  } catch (...) {
    queue_.Retire(job.get());
    throw;
  }
  live_.emplace(job->view.sequence, job);
  by_id_[job->request.id] = job.get();
  ++queued_;
  return job;
}

void JobTable::Publish(const JobPtr& job) {
  const std::lock_guard lock(mutex_);
  if (job->end_reason) {
    to_sweep_.push_back(job);
  } else {
    queue_.Push(job.get());
    if (job->view.deadline) queued_deadlines_.emplace(*job->view.deadline, job.get());
    if (DevicesOf(job->pool) == 0) to_sweep_.push_back(job);
  }
  Changed();
}

void JobTable::Withdraw(const JobPtr& job) {
  job->request.sink.reset();  // it may hold a handle: break the circle
  const std::lock_guard lock(mutex_);
  queue_.Retire(job.get());
  by_id_.erase(job->request.id);
  live_.erase(job->view.sequence);
  --queued_;
  Changed();
}

void JobTable::StopAccepting() {
  const std::lock_guard lock(mutex_);
  accepting_ = false;
}

}  // namespace slalom
