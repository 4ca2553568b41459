#include "server/service.h"

#include <grpcpp/grpcpp.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "kernels/core/error.h"
#include "scheduler/scheduler.h"
#include "server/admission.h"
#include "server/auth.h"
#include "server/job_archive.h"
#include "server/job_store.h"
#include "server/metrics.h"
#include "server/refusal.h"
#include "server/request.h"
#include "server/status.h"
#include "server/video_job.h"
#include "server/video_stream.h"
#include "server/wire.h"
#include "slalom/v1/video_generation.grpc.pb.h"

namespace slalom {
namespace {

using grpc::ByteBuffer;
using grpc::CallbackServerContext;
using WriteReactor = grpc::ServerWriteReactor<ByteBuffer>;

using Rpc = v1::VideoGeneration;
// Every RPC takes raw bytes; see wire.h.
using RawService = Rpc::WithRawCallbackMethod_GenerateVideo<
    Rpc::WithRawCallbackMethod_ResumeVideo<Rpc::WithRawCallbackMethod_CancelVideo<
        Rpc::WithRawCallbackMethod_GetJob<Rpc::WithRawCallbackMethod_ListJobs<
            Rpc::WithRawCallbackMethod_ListModels<Rpc::Service>>>>>>;

constexpr auto kTick = std::chrono::seconds(1);
constexpr int kPreviewEverySteps = 2;
constexpr double kLongestRetrySeconds = 60;

// Not to be guessed: 120 random bits.
std::string NewJobId() {
  static constexpr char kDigits[] = "0123456789abcdefghijklmnopqrstuv";
  std::random_device random;
  std::string id;
  for (int i = 0; i < 24; ++i) id += kDigits[random() % 32];
  return id;
}

using SystemTime = std::chrono::system_clock::time_point;

std::optional<SystemTime> DeadlineOf(const CallbackServerContext& context) {
  const auto deadline = context.deadline();
  // "No deadline" is the far future.
  if (deadline > std::chrono::system_clock::now() + std::chrono::hours(24 * 365)) {
    return std::nullopt;
  }
  return deadline;
}

}  // namespace

class VideoService::Impl final : public RawService {
 public:
  Impl(ServiceOptions options, JobArchive* archive, Metrics* metrics)
      : options_(std::move(options)),
        archive_(archive),
        metrics_(metrics),
        auth_(options_.tenants),
        admission_(options_.max_streams),
        store_(archive, options_.retention),
        janitor_([this] { Tick(); }) {}

  ~Impl() override { Stop(); }

  void Stop() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    stop_.notify_one();
    if (janitor_.joinable()) janitor_.join();
    scheduler_ = nullptr;
  }

  void Serve(Scheduler* scheduler) {
    int readmitted = 0;
    for (const auto& record : store_.Live()) readmitted += Readmit(*scheduler, record) ? 1 : 0;
    if (readmitted > 0) spdlog::info("{} jobs of an earlier process go on", readmitted);
    metrics_->CountReadmitted(readmitted);
    scheduler_ = scheduler;
  }

  void ParkQueue() {
    if (!archive_->durable()) return;
    for (const auto& record : store_.Live()) {
      if (record->Snapshot().state() == v1::JOB_STATE_QUEUED) {
        record->Cancel(Error(ErrorCode::kUnavailable, "the server is shutting down"));
      }
    }
  }

  void Settle(SchedulerClock::time_point deadline) {
    while (!store_.Live().empty() && SchedulerClock::now() < deadline) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    Sweep();
  }

  // --- RPCs ---

  WriteReactor* GenerateVideo(CallbackServerContext* context, const ByteBuffer* bytes) override {
    v1::GenerateVideoRequest request;
    std::string model;  // known to be one of ours
    try {
      const TenantOptions& tenant = Authenticate(*context);
      admission_.CountRequest(tenant);
      StreamPlace place = admission_.OpenStream();
      ParseMessage(*bytes, &request);
      const std::shared_ptr<JobRecord> record = Submit(*context, request, tenant, &model);
      return StartStream(*context, record, 0, std::move(place));
    } catch (const Error& error) {
      metrics_->CountRequest(model, AttentionLabel(request), static_cast<int>(error.code()));
      if (const char* reason = RefusalReason(error)) metrics_->CountRefusal(reason);
      spdlog::info("refused {}: {}", ErrorCodeName(error.code()), error.what());
      return VideoStream::Refuse(ToStatus(error, RetrySeconds(error)));
    } catch (const std::exception& error) {
      metrics_->CountRequest(model, AttentionLabel(request), grpc::StatusCode::INTERNAL);
      spdlog::error("GenerateVideo: {}", error.what());
      return VideoStream::Refuse({grpc::StatusCode::INTERNAL, error.what()});
    }
  }

  WriteReactor* ResumeVideo(CallbackServerContext* context, const ByteBuffer* bytes) override {
    try {
      const TenantOptions& tenant = Authenticate(*context);
      StreamPlace place = admission_.OpenStream();
      v1::ResumeVideoRequest request;
      ParseMessage(*bytes, &request);
      const auto record = store_.Find(request.job_id(), tenant.name);
      CheckOffset(request.byte_offset(), *record);
      return StartStream(*context, record, request.byte_offset(), std::move(place));
    } catch (const Error& error) {
      return VideoStream::Refuse(ToStatus(error, RetrySeconds(error)));
    } catch (const std::exception&) {
      return VideoStream::Refuse(CurrentExceptionToStatus());
    }
  }

  grpc::ServerUnaryReactor* CancelVideo(CallbackServerContext* context, const ByteBuffer* request,
                                        ByteBuffer* response) override {
    return Unary<v1::CancelVideoRequest, v1::CancelVideoResponse>(
        context, request, response, [this](const auto& in, const auto& tenant, auto* out) {
          const auto record = store_.Find(in.job_id(), tenant.name);
          record->Cancel(Error(ErrorCode::kCancelled, "cancelled by CancelVideo"));
          *out->mutable_job() = record->Snapshot();
        });
  }

  grpc::ServerUnaryReactor* GetJob(CallbackServerContext* context, const ByteBuffer* request,
                                   ByteBuffer* response) override {
    return Unary<v1::GetJobRequest, v1::Job>(
        context, request, response, [this](const auto& in, const auto& tenant, auto* out) {
          *out = store_.Find(in.job_id(), tenant.name)->Snapshot();
          AddLive(out);
        });
  }

  grpc::ServerUnaryReactor* ListJobs(CallbackServerContext* context, const ByteBuffer* request,
                                     ByteBuffer* response) override {
    return Unary<v1::ListJobsRequest, v1::ListJobsResponse>(
        context, request, response, [this](const auto&, const auto& tenant, auto* out) {
          for (const auto& record : store_.List(tenant.name)) {
            *out->add_jobs() = record->Snapshot();
            AddLive(out->mutable_jobs(out->jobs_size() - 1));
          }
        });
  }

  grpc::ServerUnaryReactor* ListModels(CallbackServerContext* context, const ByteBuffer* request,
                                       ByteBuffer* response) override {
    return Unary<v1::ListModelsRequest, v1::ListModelsResponse>(
        context, request, response, [this](const auto&, const auto&, auto* out) {
          const Scheduler& scheduler = Running();
          for (const ModelInfo& info : scheduler.Models()) {
            const Pipeline& pipeline = scheduler.pipeline(info.name);
            *out->add_models() =
                ToModel(info, ToString(pipeline.device()) + ": " + pipeline.device_description(),
                        out->models().empty());
          }
        });
  }

 private:
  const TenantOptions& Authenticate(const CallbackServerContext& context) const {
    const auto& metadata = context.client_metadata();
    const auto found = metadata.find("authorization");
    if (found == metadata.end()) return auth_.Authenticate("");
    return auth_.Authenticate({found->second.data(), found->second.size()});
  }

  // The scheduler, or UNAVAILABLE.
  Scheduler& Running() const {
    Scheduler* scheduler = scheduler_;
    if (scheduler == nullptr) {
      throw Error(ErrorCode::kUnavailable, "the server is warming up; try again in a moment");
    }
    return *scheduler;
  }

  std::shared_ptr<JobRecord> Submit(const CallbackServerContext& context,
                                    const v1::GenerateVideoRequest& request,
                                    const TenantOptions& tenant, std::string* model) {
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
    origin.deadline = DeadlineOf(context);
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
  bool Readmit(Scheduler& scheduler, const std::shared_ptr<JobRecord>& record) {
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

  double WeightOf(const std::string& tenant) const {
    for (const TenantOptions& known : options_.tenants) {
      if (known.name == tenant) return known.weight;
    }
    return 1;
  }

  void Start(Scheduler& scheduler, const std::shared_ptr<JobRecord>& record, const ClipSpec& spec,
             Checkpoint checkpoint) {
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

  static WriteReactor* StartStream(const CallbackServerContext& context,
                                   const std::shared_ptr<JobRecord>& record, std::int64_t offset,
                                   StreamPlace place) {
    const auto stream = VideoStream::Create(record, offset, context.deadline(), std::move(place));
    stream->Pump();
    return stream.get();
  }

  static void CheckOffset(std::int64_t offset, const JobRecord& record) {
    if (offset < 0) {
      throw Error({{"byte_offset", std::to_string(offset) + " is negative; give 0 or more"}});
    }
    if (record.ended() && offset > record.video().size()) {
      throw Error(ErrorCode::kOutOfRange, "byte_offset: " + std::to_string(offset) +
                                              " is beyond the video's " +
                                              std::to_string(record.video().size()) + " bytes");
    }
  }

  // What only the scheduler knows of a live job.
  void AddLive(v1::Job* job) const {
    const Scheduler* scheduler = scheduler_;
    if (scheduler == nullptr || job->state() >= v1::JOB_STATE_SUCCEEDED) return;
    const std::optional<JobStatus> status = scheduler->Find(job->job_id());
    if (!status || IsFinal(status->state)) return;
    job->mutable_progress()->set_queue_position(status->queue_position);
    job->mutable_progress()->set_eta_seconds(status->eta_seconds);
  }

  // A metric's label; null when waiting does not help.
  const char* RefusalReason(const Error& error) const {
    if (const auto* refusal = dynamic_cast<const Refusal*>(&error)) return refusal->reason();
    const Scheduler* scheduler = scheduler_;
    if (error.code() != ErrorCode::kResourceExhausted || scheduler == nullptr) return nullptr;
    int queued = 0;
    for (const int n : scheduler->Stats().queued) queued += n;
    return queued >= options_.max_queue ? "queue" : nullptr;
  }

  // When to try again, where waiting helps.
  std::optional<double> RetrySeconds(const Error& error) const {
    const Scheduler* scheduler = scheduler_;
    if (error.code() == ErrorCode::kUnavailable) {
      return scheduler == nullptr || !scheduler->accepting() ? std::optional(5.0) : std::nullopt;
    }
    if (RefusalReason(error) == nullptr) return std::nullopt;
    const auto* refusal = dynamic_cast<const Refusal*>(&error);
    if (refusal != nullptr && refusal->retry_seconds()) return refusal->retry_seconds();
    return std::max(1.0, next_end_seconds_.load());
  }

  template <typename Request, typename Response, typename Handler>
  grpc::ServerUnaryReactor* Unary(CallbackServerContext* context, const ByteBuffer* bytes,
                                  ByteBuffer* response, const Handler& handler) {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    try {
      const TenantOptions& tenant = Authenticate(*context);
      Request request;
      ParseMessage(*bytes, &request);
      Response message;
      handler(request, tenant, &message);
      *response = SerializeMessage(message);
      reactor->Finish(grpc::Status::OK);
    } catch (const Error& error) {
      reactor->Finish(ToStatus(error, RetrySeconds(error)));
    } catch (const std::exception&) {
      reactor->Finish(CurrentExceptionToStatus());
    }
    return reactor;
  }

  // Once a second: jobs that wait learn their place, ended ones are forgotten in time.
  void Tick() {
    std::unique_lock lock(mutex_);
    while (!stop_.wait_for(lock, kTick, [this] { return stopping_; })) {
      lock.unlock();
      if (const Scheduler* scheduler = scheduler_; scheduler != nullptr) TellPlaces(*scheduler);
      Sweep();
      const JobStore::Kept kept = store_.kept();
      metrics_->SetService({admission_.open_streams(), kept.jobs, kept.video_bytes});
      if (options_.on_tick) options_.on_tick();
      lock.lock();
    }
  }

  void TellPlaces(const Scheduler& scheduler) {
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

  void Sweep() {
    try {
      store_.Sweep();
    } catch (const Error& error) {  // a full disk: the next sweep tries again
      spdlog::error("cannot forget old jobs: {}", error.what());
    }
  }

  const ServiceOptions options_;
  JobArchive* const archive_;
  Metrics* const metrics_;
  const Auth auth_;
  Admission admission_;
  JobStore store_;
  std::atomic<Scheduler*> scheduler_ = nullptr;
  std::atomic<double> next_end_seconds_ = 1;  // of some job: then there is room

  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;
  std::thread janitor_;  // last: it uses all of the above
};

VideoService::VideoService(ServiceOptions options, JobArchive* archive, Metrics* metrics)
    : impl_(std::make_unique<Impl>(std::move(options), archive, metrics)) {}
VideoService::~VideoService() = default;
grpc::Service* VideoService::grpc_service() { return impl_.get(); }
void VideoService::Serve(Scheduler* scheduler) { impl_->Serve(scheduler); }
void VideoService::ParkQueue() { impl_->ParkQueue(); }
void VideoService::Settle(SchedulerClock::time_point deadline) { impl_->Settle(deadline); }

void VideoService::Stop() { impl_->Stop(); }

}  // namespace slalom
