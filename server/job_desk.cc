#include "server/job_desk.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <charconv>
#include <limits>
#include <map>
#include <unordered_map>
#include <utility>

#include "kernels/core/error.h"
#include "scheduler/scheduler.h"
#include "server/job_archive.h"
#include "server/job_id.h"
#include "server/metrics.h"
#include "server/refusal.h"
#include "server/request.h"
#include "server/video_job.h"

namespace slalom {
namespace {

constexpr auto kTick = std::chrono::seconds(1);
constexpr int kPreviewEverySteps = 2;
constexpr double kLongestRetrySeconds = 60;

void SetPlace(int queue_position, double eta_seconds, v1::Job* job) {
  job->mutable_progress()->set_queue_position(queue_position);
  job->mutable_progress()->set_eta_seconds(eta_seconds);
}

// Clients take answers of 4 MiB unless they are told otherwise; one job is far below a MiB.
constexpr std::size_t kPageBytes = 1 << 20;
constexpr int kPageJobs = 1000;

struct PageStart {
  int most = kPageJobs;
  std::uint64_t before = std::numeric_limits<std::uint64_t>::max();  // a job's sequence
};

PageStart ParsePage(const v1::ListJobsRequest& request) {
  PageStart start;
  std::vector<FieldViolation> violations;
  if (request.page_size() < 0 || request.page_size() > kPageJobs) {
    violations.push_back({"page_size", std::to_string(request.page_size()) + " is not in 0 to " +
                                           std::to_string(kPageJobs)});
  } else if (request.page_size() > 0) {
    start.most = request.page_size();
  }
  const std::string& token = request.page_token();
  const char* end = token.data() + token.size();
  if (!token.empty()) {
    const auto [at, error] = std::from_chars(token.data(), end, start.before);
    if (error != std::errc() || at != end) {
      violations.push_back({"page_token", "is none of ours; give an answer's next_page_token"});
    }
  }
  if (!violations.empty()) throw Error(std::move(violations));
  return start;
}

}  // namespace

JobDesk::JobDesk(JobDeskOptions options, JobArchive* archive, Metrics* metrics)
    : options_(std::move(options)),
      archive_(archive),
      metrics_(metrics),
      store_(archive, options_.retention),
      janitor_([this] { Tick(); }) {}

JobDesk::~JobDesk() { Stop(); }

// --- With the scheduler ---

void JobDesk::Serve(Scheduler* scheduler) {
  int readmitted = 0;
  for (const auto& record : store_.Live()) readmitted += Readmit(*scheduler, record) ? 1 : 0;
  if (readmitted > 0) spdlog::info("{} jobs of an earlier process go on", readmitted);
  metrics_->CountReadmitted(readmitted);
  scheduler_ = scheduler;
}

void JobDesk::ParkQueue() {
  if (!archive_->durable()) return;
  for (const auto& record : store_.Live()) {
    if (record->Snapshot().state() == v1::JOB_STATE_QUEUED) {
      record->Cancel(Error(ErrorCode::kUnavailable, "the server is shutting down"));
    }
  }
}

bool JobDesk::Settle(SchedulerClock::time_point deadline) {
  bool settled = store_.Live().empty();
  while (!settled && SchedulerClock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    settled = store_.Live().empty();
  }
  Sweep();
  return settled;
}

void JobDesk::Stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_one();
  if (janitor_.joinable()) janitor_.join();
  scheduler_ = nullptr;
}

Scheduler& JobDesk::Running() const {
  Scheduler* scheduler = scheduler_;
  if (scheduler == nullptr) {
    throw Error(ErrorCode::kUnavailable, "the server is warming up; try again in a moment");
  }
  return *scheduler;
}

// --- Jobs in ---

std::shared_ptr<JobRecord> JobDesk::Submit(
    const v1::GenerateVideoRequest& request, const TenantOptions& tenant,
    const std::optional<std::chrono::system_clock::time_point>& deadline, std::string* model) {
  Scheduler& scheduler = Running();
  const Pipeline& pipeline = scheduler.pipeline(request.model());
  *model = pipeline.info().name;
  const ClipSpec spec = ResolveRequest(request, pipeline);

  JobRecord::Origin origin;
  origin.id = NewJobId();
  origin.tenant = tenant.name;
  origin.fingerprint = request.SerializeAsString();
  origin.resolved = ToResolved(request, spec, *model);
  origin.created = std::chrono::system_clock::now();
  origin.deadline = deadline;
  const std::string id = origin.id;
  auto video = archive_->Video(id);
  const auto record = std::make_shared<JobRecord>(std::move(origin), std::move(video));
  const std::shared_ptr<JobRecord> kept = store_.Add(record, tenant.max_jobs);
  if (kept != record) return kept;
  try {
    Start(scheduler, record, spec, nullptr);
  } catch (const Error& error) {
    record->Fail(error);  // for those that follow it by its request_id already
    store_.Remove(id);
    throw;
  }
  if (request.attention().mode() == v1::ATTENTION_MODE_AUTO &&
      spec.attention == AttentionKind::kDense) {
    metrics_->CountDenseFallback("no_adapter");
  }
  return record;
}

// A job that an earlier process has accepted. False when it has ended over it.
bool JobDesk::Readmit(Scheduler& scheduler, const std::shared_ptr<JobRecord>& record) {
  const v1::GenerateVideoRequest& resolved = record->origin().resolved;
  try {
    const ClipSpec spec = ResolveRequest(resolved, scheduler.pipeline(resolved.model()));
    Start(scheduler, record, spec, archive_->LoadCheckpoint(record->id()));
    return true;
  } catch (const Error& error) {
    spdlog::warn("job {} of an earlier process cannot go on: {}", record->id(), error.what());
    archive_->KeepEnd(record->Failed(error), [record, error] { record->Fail(error); });
    return false;
  }
}

double JobDesk::WeightOf(const std::string& tenant) const {
  for (const TenantOptions& known : options_.tenants) {
    if (known.name == tenant) return known.weight;
  }
  return 1;
}

void JobDesk::Start(Scheduler& scheduler, const std::shared_ptr<JobRecord>& record,
                    const ClipSpec& spec, Checkpoint checkpoint) {
  const JobRecord::Origin& origin = record->origin();
  const v1::GenerateVideoRequest& resolved = origin.resolved;
  auto sink = std::make_shared<VideoJob>(record, archive_, metrics_);
  store_.Attach(record->id(), sink);
  JobRequest job;
  job.id = record->id();
  job.model = resolved.model();
  job.spec = spec;
  job.priority = ToPriority(resolved.priority());
  job.tenant = record->tenant();
  job.tenant_weight = WeightOf(record->tenant());
  if (origin.deadline) {
    job.deadline = SchedulerClock::now() + (*origin.deadline - std::chrono::system_clock::now());
  }
  job.readmitted = origin.readmitted;
  job.checkpoint = std::move(checkpoint);
  job.checkpoint_seconds = archive_->durable() ? options_.checkpoint_seconds : 0;
  job.preview_every = resolved.previews() ? kPreviewEverySteps : 0;
  job.sink = std::move(sink);
  scheduler.Submit(std::move(job));
  spdlog::info("job {} accepted: {} {}x{}x{} {} steps {}", record->id(), resolved.model(),
               spec.width, spec.height, spec.num_frames, spec.steps, AttentionLabel(resolved));
}

// --- Questions ---

std::shared_ptr<JobRecord> JobDesk::Find(const std::string& id, const std::string& tenant) const {
  return store_.Find(id, tenant);
}

v1::Job JobDesk::Describe(const JobRecord& record) const {
  v1::Job job = record.Snapshot();
  const Scheduler* scheduler = scheduler_;
  if (scheduler == nullptr || job.state() >= v1::JOB_STATE_SUCCEEDED) return job;
  const std::optional<JobStatus> status = scheduler->Find(job.job_id());
  if (status && !IsFinal(status->state)) {
    SetPlace(status->queue_position, status->eta_seconds, &job);
  }
  return job;
}

v1::ListJobsResponse JobDesk::List(const v1::ListJobsRequest& request,
                                   const std::string& tenant) const {
  const PageStart start = ParsePage(request);
  v1::ListJobsResponse page;
  std::size_t bytes = 0;
  std::uint64_t last = 0;
  bool live = false;
  const auto most = static_cast<std::size_t>(start.most) + 1;  // one more tells of a next page
  for (const auto& [sequence, record] : store_.List(tenant, start.before, most)) {
    if (page.jobs_size() == start.most || bytes > kPageBytes) {
      page.set_next_page_token(std::to_string(last));
      break;
    }
    v1::Job& job = *page.add_jobs() = record->Snapshot();
    last = sequence;
    live |= job.state() < v1::JOB_STATE_SUCCEEDED;
    bytes += job.ByteSizeLong();
  }
  if (live) SetPlaces(&page);
  return page;
}

void JobDesk::SetPlaces(v1::ListJobsResponse* page) const {
  const Scheduler* scheduler = scheduler_;
  if (scheduler == nullptr) return;
  std::unordered_map<std::string, JobPlace> places;
  for (JobPlace& place : scheduler->Places()) places[place.id] = std::move(place);
  for (v1::Job& job : *page->mutable_jobs()) {
    const auto place = places.find(job.job_id());
    if (place != places.end() && job.state() < v1::JOB_STATE_SUCCEEDED) {
      SetPlace(place->second.queue_position, place->second.eta_seconds, &job);
    }
  }
}

const char* JobDesk::RefusalReason(const Error& error) const {
  if (const auto* refusal = dynamic_cast<const Refusal*>(&error)) return refusal->reason();
  return dynamic_cast<const QueueFull*>(&error) != nullptr ? "queue" : nullptr;
}

std::optional<double> JobDesk::RetrySeconds(const Error& error) const {
  const Scheduler* scheduler = scheduler_;
  if (error.code() == ErrorCode::kUnavailable) {
    return scheduler == nullptr || !scheduler->accepting() ? std::optional(5.0) : std::nullopt;
  }
  if (RefusalReason(error) == nullptr) return std::nullopt;
  const auto* refusal = dynamic_cast<const Refusal*>(&error);
  if (refusal != nullptr && refusal->retry_seconds()) return refusal->retry_seconds();
  return std::max(1.0, next_end_seconds_.load());
}

// --- The janitor ---

void JobDesk::Tick() {
  std::unique_lock lock(mutex_);
  while (!stop_.wait_for(lock, kTick, [this] { return stopping_; })) {
    lock.unlock();
    if (const Scheduler* scheduler = scheduler_; scheduler != nullptr) TellPlaces(*scheduler);
    Sweep();
    if (options_.on_tick) options_.on_tick();
    lock.lock();
  }
}

void JobDesk::TellPlaces(const Scheduler& scheduler) {
  std::map<std::string, std::shared_ptr<JobRecord>> live;
  for (const auto& record : store_.Live()) live[record->id()] = record;
  double soonest = kLongestRetrySeconds;
  for (const JobPlace& place : scheduler.Places()) {
    soonest = std::min(soonest, place.eta_seconds);
    if (!place.queued) continue;
    const auto record = live.find(place.id);
    if (record != live.end()) {
      record->second->SetQueuePosition(place.queue_position, place.eta_seconds);
    }
  }
  next_end_seconds_ = soonest;
}

void JobDesk::Sweep() {
  try {
    store_.Sweep();
  } catch (const Error& error) {  // a full disk: the next sweep tries again
    spdlog::error("cannot forget old jobs: {}", error.what());
  }
}

}  // namespace slalom
