#include "server/service.h"

#include <grpcpp/grpcpp.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "kernels/core/error.h"
#include "scheduler/scheduler.h"
#include "server/auth.h"
#include "server/job_store.h"
#include "server/metrics.h"
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

// Not to be guessed: 120 random bits.
std::string NewJobId() {
  static constexpr char kDigits[] = "0123456789abcdefghijklmnopqrstuv";
  std::random_device random;
  std::string id;
  for (int i = 0; i < 24; ++i) id += kDigits[random() % 32];
  return id;
}

std::optional<SchedulerClock::time_point> DeadlineOf(const CallbackServerContext& context) {
  const auto deadline = context.deadline();
  const auto now = std::chrono::system_clock::now();
  // "No deadline" is the far future, which does not fit the other clock.
  if (deadline > now + std::chrono::hours(24 * 365)) return std::nullopt;
  return SchedulerClock::now() + (deadline - now);
}

}  // namespace

class VideoService::Impl final : public RawService {
 public:
  Impl(ServiceOptions options, Metrics* metrics)
      : metrics_(metrics),
        max_queue_(options.max_queue),
        auth_(std::move(options.tenants)),
        store_(std::move(options.state_dir), options.job_retention_seconds, options.max_kept_jobs),
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

  void Serve(Scheduler* scheduler) { scheduler_ = scheduler; }

  void Settle(SchedulerClock::time_point deadline) {
    while (!store_.Live().empty() && SchedulerClock::now() < deadline) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    store_.Sweep();
  }

  // --- RPCs ---

  WriteReactor* GenerateVideo(CallbackServerContext* context, const ByteBuffer* bytes) override {
    v1::GenerateVideoRequest request;
    std::string model;  // known to be one of ours
    try {
      const TenantOptions& tenant = Authenticate(*context);
      ParseMessage(*bytes, &request);
      const std::shared_ptr<JobRecord> record = Submit(*context, request, tenant, &model);
      return StartStream(*context, record, 0);
    } catch (const Error& error) {
      metrics_->CountRequest(model, AttentionLabel(request), static_cast<int>(error.code()));
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
      v1::ResumeVideoRequest request;
      ParseMessage(*bytes, &request);
      const auto record = store_.Find(request.job_id(), tenant.name);
      CheckOffset(request.byte_offset(), *record);
      return StartStream(*context, record, request.byte_offset());
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
    const std::string id = origin.id;
    auto video = store_.NewVideo(id);
    const auto record = std::make_shared<JobRecord>(std::move(origin), std::move(video));
    const std::shared_ptr<JobRecord> kept = store_.Add(record, tenant.max_jobs);
    if (kept != record) {
      record->video().Remove();
      return kept;
    }
    try {
      Start(scheduler, record, spec, DeadlineOf(context));
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

  void Start(Scheduler& scheduler, const std::shared_ptr<JobRecord>& record, const ClipSpec& spec,
             std::optional<SchedulerClock::time_point> deadline) {
    const v1::GenerateVideoRequest& resolved = record->origin().resolved;
    auto sink = std::make_shared<VideoJob>(record, metrics_);
    store_.Attach(record->id(), sink);
    JobRequest job;
    job.id = record->id();
    job.model = resolved.model();
    job.spec = spec;
    job.priority = ToPriority(resolved.priority());
    job.tenant = record->tenant();
    job.deadline = deadline;
    job.preview_every = resolved.previews() ? kPreviewEverySteps : 0;
    job.sink = std::move(sink);
    scheduler.Submit(std::move(job));
    spdlog::info("job {} accepted: {} {}x{}x{} {} steps {}", record->id(), resolved.model(),
                 spec.width, spec.height, spec.num_frames, spec.steps, AttentionLabel(resolved));
  }

  WriteReactor* StartStream(const CallbackServerContext& context,
                            const std::shared_ptr<JobRecord>& record, std::int64_t offset) {
    const auto stream = VideoStream::Create(record, offset, context.deadline());
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

  // When to try again, where waiting helps.
  std::optional<double> RetrySeconds(const Error& error) const {
    const Scheduler* scheduler = scheduler_;
    if (error.code() == ErrorCode::kUnavailable) {
      return scheduler == nullptr || !scheduler->accepting() ? std::optional(5.0) : std::nullopt;
    }
    if (error.code() != ErrorCode::kResourceExhausted || scheduler == nullptr) return std::nullopt;
    int queued = 0;
    for (const int n : scheduler->Stats().queued) queued += n;
    const bool full = queued >= max_queue_;
    const bool quota = std::string_view(error.what()).starts_with("tenant");
    if (!full && !quota) return std::nullopt;
    // Room comes when the next job is done.
    double soonest = 60;
    for (const JobStatus& job : scheduler->List()) {
      if (!IsFinal(job.state)) soonest = std::min(soonest, job.eta_seconds);
    }
    return std::max(1.0, soonest);
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
      if (const Scheduler* scheduler = scheduler_; scheduler != nullptr) {
        for (const auto& record : store_.Live()) {
          const std::optional<JobStatus> status = scheduler->Find(record->id());
          if (status) record->SetQueuePosition(status->queue_position, status->eta_seconds);
        }
      }
      store_.Sweep();
      lock.lock();
    }
  }

  Metrics* const metrics_;
  const int max_queue_;
  const Auth auth_;
  JobStore store_;
  std::atomic<Scheduler*> scheduler_ = nullptr;

  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;
  std::thread janitor_;  // last: it uses all of the above
};

VideoService::VideoService(ServiceOptions options, Metrics* metrics)
    : impl_(std::make_unique<Impl>(std::move(options), metrics)) {}
VideoService::~VideoService() = default;
grpc::Service* VideoService::grpc_service() { return impl_.get(); }
void VideoService::Serve(Scheduler* scheduler) { impl_->Serve(scheduler); }
void VideoService::Settle(SchedulerClock::time_point deadline) { impl_->Settle(deadline); }

void VideoService::Stop() { impl_->Stop(); }

}  // namespace slalom
