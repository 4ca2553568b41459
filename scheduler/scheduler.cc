#include "scheduler/scheduler.h"

#include <algorithm>
#include <utility>

#include "scheduler/job_table.h"
#include "scheduler/worker.h"

namespace slalom {
namespace {

void CheckOptions(const SchedulerOptions& options) {
  std::vector<FieldViolation> violations;
  const auto at_least_one = [&](const char* field, int value) {
    if (value < 1) {
      violations.push_back(
          {field, std::string(field) + " is " + std::to_string(value) + ", it must be at least 1"});
    }
  };
  at_least_one("max_queue", options.max_queue);
  at_least_one("max_in_flight", options.limits.max_in_flight);
  at_least_one("max_decoding", options.limits.max_decoding);
  at_least_one("max_batch", options.limits.max_batch);
  if (!violations.empty()) throw Error(std::move(violations));
}

using Pipelines = std::vector<std::unique_ptr<Pipeline>>;

// One group per device, in the order given.
std::vector<Pipelines> GroupByDevice(Pipelines pipelines) {
  std::vector<Pipelines> groups;
  for (auto& pipeline : pipelines) {
    auto group = std::find_if(groups.begin(), groups.end(), [&](const Pipelines& g) {
      return g.front()->device() == pipeline->device();
    });
    if (group == groups.end()) group = groups.emplace(groups.end());
    for (const auto& other : *group) {
      if (other->info().name == pipeline->info().name) {
        throw Error({{"models", "model " + other->info().name + " is loaded twice on " +
                                    ToString(other->device())}});
      }
    }
    group->push_back(std::move(pipeline));
  }
  return groups;
}

}  // namespace

Scheduler::Scheduler(std::vector<std::unique_ptr<Pipeline>> pipelines, SchedulerOptions options)
    : table_(std::make_shared<JobTable>(options)) {
  CheckOptions(options);
  if (pipelines.empty()) throw Error(ErrorCode::kInvalidArgument, "there is no model to serve");
  for (const auto& pipeline : pipelines) {
    const std::string& name = pipeline->info().name;
    if (std::find(models_.begin(), models_.end(), name) == models_.end()) models_.push_back(name);
  }
  for (auto& group : GroupByDevice(std::move(pipelines))) {
    workers_.push_back(std::make_unique<Worker>(std::move(group), options, table_));
  }
  try {
    for (const auto& worker : workers_) worker->Start();
    sweeper_ = std::thread([this] { SweepLoop(); });
  } catch (...) {
    table_->Stop();  // so that the workers that did start can be joined
    throw;
  }
}

Scheduler::~Scheduler() {
  Drain(SchedulerClock::now());
  table_->Stop();
  sweeper_.join();
}

void Scheduler::SweepLoop() {
  for (;;) {
    const JobTable::Turn turn = table_->NextSweep();
    if (turn.stop) return;
    for (const auto& [job, reason] : turn.endings) table_->End(job, reason);
  }
}

std::vector<ModelInfo> Scheduler::Models() const {
  std::vector<ModelInfo> infos;
  for (const std::string& model : models_) infos.push_back(pipeline(model).info());
  return infos;
}

const Pipeline& Scheduler::pipeline(const std::string& model) const {
  const std::string& name = model.empty() ? models_.front() : model;
  for (const auto& worker : workers_) {
    if (const Pipeline* found = worker->Find(name)) return *found;
  }
  std::string known;
  for (const std::string& each : models_) known += (known.empty() ? "" : ", ") + each;
  throw Error(ErrorCode::kNotFound, "there is no model " + name + "; this server has " + known);
}

JobHandle Scheduler::Submit(JobRequest request) {
  if (!request.sink) throw Error(ErrorCode::kInternal, "a job needs a sink");
  const Pipeline& served_by = pipeline(request.model);
  request.model = served_by.info().name;
  const ClipCost cost = served_by.Estimate(request.spec);

  const std::shared_ptr<JobSink> sink = request.sink;
  const JobPtr job = table_->Insert(std::move(request), cost);
  const JobHandle handle(job, table_);
  try {
    sink->OnAccepted(handle, table_->Status(job));
  } catch (...) {
    table_->Withdraw(job);
    throw;
  }
  table_->Publish(job);
  return handle;
}

bool Scheduler::Cancel(const std::string& id) {
  return table_->RequestEnd(id, Error(ErrorCode::kCancelled, "the job was cancelled"));
}

std::optional<JobStatus> Scheduler::Find(const std::string& id) const { return table_->Find(id); }
std::vector<JobStatus> Scheduler::List() const { return table_->List(); }
std::vector<JobPlace> Scheduler::Places() const { return table_->Places(); }
SchedulerStats Scheduler::Stats() const {
  SchedulerStats stats = table_->Stats();
  // The table counts its workers in the order in which they were made.
  for (std::size_t i = 0; i < workers_.size(); ++i) {
    stats.devices[i].memory = workers_[i]->Memory();
    stats.devices[i].prompt_cache = workers_[i]->PromptCacheUse();
  }
  return stats;
}
std::string Scheduler::CostState() const { return table_->CostState(); }
bool Scheduler::accepting() const { return table_->accepting(); }
bool Scheduler::healthy() const { return table_->healthy(); }
bool Scheduler::lost() const { return table_->lost(); }
void Scheduler::StopAccepting() { table_->StopAccepting(); }

bool Scheduler::Drain(SchedulerClock::time_point deadline) {
  table_->StopAccepting();
  if (table_->WaitUntilEmpty(deadline)) return true;
  const int ended =
      table_->RequestEndOfAll(Error(ErrorCode::kUnavailable, "the server is shutting down"));
  table_->WaitUntilEmpty(std::nullopt);
  return ended == 0;
}

}  // namespace slalom
