#include "server/service.h"

#include <grpcpp/grpcpp.h>
#include <spdlog/spdlog.h>

#include <optional>
#include <utility>

#include "kernels/core/error.h"
#include "scheduler/scheduler.h"
#include "server/admission.h"
#include "server/auth.h"
#include "server/log_text.h"
#include "server/metrics.h"
#include "server/request.h"
#include "server/status.h"
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

std::optional<std::chrono::system_clock::time_point> DeadlineOf(
    const CallbackServerContext& context) {
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
      : metrics_(metrics),
        auth_(options.desk.tenants),
        admission_(options.max_streams),
        desk_(WithMetrics(std::move(options.desk)), archive, metrics) {}

  JobDesk& desk() { return desk_; }

  // --- RPCs ---

  WriteReactor* GenerateVideo(CallbackServerContext* context, const ByteBuffer* bytes) override {
    v1::GenerateVideoRequest request;
    std::string model;  // known to be one of ours
    try {
      const TenantOptions& tenant = Authenticate(*context);
      admission_.CountRequest(tenant);
      StreamPlace place = admission_.OpenStream();
      ParseMessage(*bytes, &request);
      const std::shared_ptr<JobRecord> record =
          desk_.Submit(request, tenant, DeadlineOf(*context), &model);
      return StartStream(*context, record, 0, std::move(place));
    } catch (const Error& error) {
      metrics_->CountRequest(model, AttentionLabel(request), static_cast<int>(error.code()));
      if (const char* reason = desk_.RefusalReason(error)) metrics_->CountRefusal(reason);
      spdlog::info("refused {}: {}", ErrorCodeName(error.code()), OneLine(error.what()));
      return VideoStream::Refuse(ToStatus(error, desk_.RetrySeconds(error)));
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
      const auto record = desk_.Find(request.job_id(), tenant.name);
      if (request.byte_offset() < 0) {
        throw Error({{"byte_offset",
                      std::to_string(request.byte_offset()) + " is negative; give 0 or more"}});
      }
      return StartStream(*context, record, request.byte_offset(), std::move(place));
    } catch (const Error& error) {
      return VideoStream::Refuse(ToStatus(error, desk_.RetrySeconds(error)));
    } catch (const std::exception&) {
      return VideoStream::Refuse(CurrentExceptionToStatus());
    }
  }

  grpc::ServerUnaryReactor* CancelVideo(CallbackServerContext* context, const ByteBuffer* request,
                                        ByteBuffer* response) override {
    return Unary<v1::CancelVideoRequest, v1::CancelVideoResponse>(
        context, request, response, [this](const auto& in, const auto& tenant, auto* out) {
          const auto record = desk_.Find(in.job_id(), tenant.name);
          record->Cancel(Error(ErrorCode::kCancelled, "cancelled by CancelVideo"));
          *out->mutable_job() = record->Snapshot();
        });
  }

  grpc::ServerUnaryReactor* GetJob(CallbackServerContext* context, const ByteBuffer* request,
                                   ByteBuffer* response) override {
    return Unary<v1::GetJobRequest, v1::Job>(
        context, request, response, [this](const auto& in, const auto& tenant, auto* out) {
          *out = desk_.Describe(*desk_.Find(in.job_id(), tenant.name));
        });
  }

  grpc::ServerUnaryReactor* ListJobs(CallbackServerContext* context, const ByteBuffer* request,
                                     ByteBuffer* response) override {
    return Unary<v1::ListJobsRequest, v1::ListJobsResponse>(
        context, request, response, [this](const auto& in, const auto& tenant, auto* out) {
          *out = desk_.List(in, tenant.name);
        });
  }

  grpc::ServerUnaryReactor* ListModels(CallbackServerContext* context, const ByteBuffer* request,
                                       ByteBuffer* response) override {
    return Unary<v1::ListModelsRequest, v1::ListModelsResponse>(
        context, request, response, [this](const auto&, const auto&, auto* out) {
          const Scheduler& scheduler = desk_.Running();
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

  static WriteReactor* StartStream(const CallbackServerContext& context,
                                   const std::shared_ptr<JobRecord>& record, std::int64_t offset,
                                   StreamPlace place) {
    const auto stream = VideoStream::Create(record, offset, context.deadline(), std::move(place));
    stream->Pump();
    return stream.get();
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
      reactor->Finish(ToStatus(error, desk_.RetrySeconds(error)));
    } catch (const std::exception&) {
      reactor->Finish(CurrentExceptionToStatus());
    }
    return reactor;
  }

  // The service's own numbers go out with the desk's tick.
  JobDeskOptions WithMetrics(JobDeskOptions options) {
    options.on_tick = [this, on_tick = std::move(options.on_tick)] {
      const JobStore::Kept kept = desk_.kept();
      metrics_->SetService({admission_.open_streams(), kept.jobs, kept.video_bytes});
      if (on_tick) on_tick();
    };
    return options;
  }

  Metrics* const metrics_;
  const Auth auth_;
  Admission admission_;
  JobDesk desk_;  // last: its thread reads the above
};

VideoService::VideoService(ServiceOptions options, JobArchive* archive, Metrics* metrics)
    : impl_(std::make_unique<Impl>(std::move(options), archive, metrics)) {}
VideoService::~VideoService() = default;
grpc::Service* VideoService::grpc_service() { return impl_.get(); }
void VideoService::Serve(Scheduler* scheduler) { impl_->desk().Serve(scheduler); }
void VideoService::ParkQueue() { impl_->desk().ParkQueue(); }
bool VideoService::Settle(SchedulerClock::time_point deadline) {
  return impl_->desk().Settle(deadline);
}
void VideoService::Stop() { impl_->desk().Stop(); }

}  // namespace slalom
