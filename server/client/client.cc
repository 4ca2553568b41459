#include "server/client/client.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cmath>
#include <mutex>
#include <thread>
#include <utility>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "kernels/core/error.h"
#include "slalom/v1/video_generation.grpc.pb.h"

namespace slalom::client {
namespace {

constexpr int kResumeAttempts = 5;
constexpr auto kResumePause = std::chrono::milliseconds(500);
// Of calls that only ask.
constexpr auto kQuickDeadline = std::chrono::seconds(20);
// Connecting is tried again for so long: a server may be about to listen, and gRPC before 1.61 now
// and then takes an attempt that is under way for a failed one (grpc/grpc pull request 35064).
constexpr auto kConnectPatience = std::chrono::seconds(2);
constexpr int kReconnectMs = 100;

CallError ToError(const grpc::Status& status) {
  std::optional<double> retry;
  google::rpc::Status details;
  if (details.ParseFromString(status.error_details())) {
    google::rpc::RetryInfo info;
    for (const auto& detail : details.details()) {
      if (detail.UnpackTo(&info)) retry = static_cast<double>(info.retry_delay().seconds());
    }
  }
  return {status.error_code(), status.error_message(), retry};
}

}  // namespace

CallError::CallError(int code, const std::string& message, std::optional<double> retry_seconds)
    : std::runtime_error(message), code_(code), retry_seconds_(retry_seconds) {}

CallError::CallError(int code, const std::string& message, std::string advice)
    : std::runtime_error(message), code_(code), advice_(std::move(advice)) {}

const char* CallError::code_name() const { return ErrorCodeName(static_cast<ErrorCode>(code_)); }

std::string CallError::advice() const {
  if (!advice_.empty()) return advice_;
  if (retry_seconds_) {
    return "try again in " + std::to_string(static_cast<int>(std::ceil(*retry_seconds_))) + " s";
  }
  switch (code_) {
    case grpc::StatusCode::INVALID_ARGUMENT:
    case grpc::StatusCode::OUT_OF_RANGE:
      return "change what the message names; `slalom models` shows the limits";
    case grpc::StatusCode::NOT_FOUND:
      return "`slalom models` and `slalom jobs` show what there is";
    case grpc::StatusCode::FAILED_PRECONDITION:
      return "`slalom models` shows the attention modes that each model has";
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return "make the clip smaller or shorter, unless the message names something else that ran "
             "out";
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return "give a longer --deadline, fewer --steps or a smaller --size";
    case grpc::StatusCode::UNAVAILABLE:
      return "check that slalomd runs and that --server names its address";
    case grpc::StatusCode::UNAUTHENTICATED:
    case grpc::StatusCode::PERMISSION_DENIED:
      return "check the token in --token-file";
    case grpc::StatusCode::ALREADY_EXISTS:
      return "give another --request-id";
    case grpc::StatusCode::CANCELLED:
      return "start it again if it was not meant to end";
    default:
      return "see the log of slalomd";
  }
}

class Client::Impl {
 public:
  explicit Impl(const ClientOptions& options) : token_(options.token) {
    grpc::ChannelArguments arguments;
    // A preview or a chunk is small; a statistics message grows with the layers.
    arguments.SetMaxReceiveMessageSize(16 << 20);
    arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kReconnectMs);
    channel_ =
        grpc::CreateCustomChannel(options.server, grpc::InsecureChannelCredentials(), arguments);
    stub_ = v1::VideoGeneration::NewStub(channel_);
  }

  // Whether it succeeds or not: the call then says what is wrong.
  void Connect() const {
    channel_->WaitForConnected(std::chrono::system_clock::now() + kConnectPatience);
  }

  std::unique_ptr<grpc::ClientContext> NewContext() const {
    auto context = std::make_unique<grpc::ClientContext>();
    if (!token_.empty()) context->AddMetadata("authorization", "Bearer " + token_);
    return context;
  }

  // Reads one call's stream. The message that it ended with, OK or not.
  template <typename Start>
  grpc::Status ReadStream(std::optional<double> deadline_seconds, const Start& start,
                          const OnEvent& on_event) {
    const std::shared_ptr<grpc::ClientContext> context = NewContext();
    if (deadline_seconds) {
      context->set_deadline(
          std::chrono::system_clock::now() +
          std::chrono::microseconds(static_cast<std::int64_t>(*deadline_seconds * 1e6)));
    }
    {
      std::lock_guard lock(mutex_);
      if (interrupted_) return grpc::Status::CANCELLED;
      current_ = context;
    }
    Connect();
    const auto reader = start(context.get());
    v1::GenerateVideoResponse event;
    try {
      while (reader->Read(&event)) on_event(event);
    } catch (...) {
      // Without this, the reader's end would wait for the server's.
      context->TryCancel();
      while (reader->Read(&event)) {
      }
      reader->Finish();
      throw;
    }
    const grpc::Status status = reader->Finish();
    std::lock_guard lock(mutex_);
    current_.reset();
    return status;
  }

  template <typename Request, typename Response, typename Method>
  Response Quick(Method method, const Request& request) const {
    const auto context = NewContext();
    context->set_deadline(std::chrono::system_clock::now() + kQuickDeadline);
    Connect();
    Response response;
    const grpc::Status status = (stub_.get()->*method)(context.get(), request, &response);
    if (!status.ok()) throw ToError(status);
    return response;
  }

  void Interrupt() {
    std::lock_guard lock(mutex_);
    interrupted_ = true;
    if (current_) current_->TryCancel();
  }

  bool interrupted() const {
    std::lock_guard lock(mutex_);
    return interrupted_;
  }

  v1::VideoGeneration::Stub& stub() { return *stub_; }

 private:
  const std::string token_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::VideoGeneration::Stub> stub_;
  mutable std::mutex mutex_;
  std::shared_ptr<grpc::ClientContext> current_;
  bool interrupted_ = false;
};

Client::Client(const ClientOptions& options) : impl_(std::make_unique<Impl>(options)) {}
Client::~Client() = default;

void Client::Generate(const v1::GenerateVideoRequest& request,
                      std::optional<double> deadline_seconds, const OnEvent& on_event) {
  std::string job_id;
  std::int64_t received = 0;
  const auto track = [&](const v1::GenerateVideoResponse& event) {
    if (event.has_accepted()) {
      // A resumed stream introduces itself again.
      if (!job_id.empty()) return;
      job_id = event.accepted().job_id();
    }
    on_event(event);
    if (event.has_video_chunk()) {
      received = event.video_chunk().offset() +
                 static_cast<std::int64_t>(event.video_chunk().data().size());
    }
  };
  grpc::Status status = impl_->ReadStream(
      deadline_seconds,
      [&](grpc::ClientContext* context) { return impl_->stub().GenerateVideo(context, request); },
      track);
  for (int i = 0; i < kResumeAttempts && request.detached() && !job_id.empty() &&
                  status.error_code() == grpc::StatusCode::UNAVAILABLE;
       ++i) {
    std::this_thread::sleep_for(kResumePause);
    v1::ResumeVideoRequest resume;
    resume.set_job_id(job_id);
    resume.set_byte_offset(received);
    status = impl_->ReadStream(
        deadline_seconds,
        [&](grpc::ClientContext* context) { return impl_->stub().ResumeVideo(context, resume); },
        track);
  }
  if (!status.ok()) throw ToError(status);
}

void Client::Resume(const std::string& job_id, std::int64_t offset, const OnEvent& on_event) {
  v1::ResumeVideoRequest request;
  request.set_job_id(job_id);
  request.set_byte_offset(offset);
  const grpc::Status status = impl_->ReadStream(
      std::nullopt,
      [&](grpc::ClientContext* context) { return impl_->stub().ResumeVideo(context, request); },
      on_event);
  if (!status.ok()) throw ToError(status);
}

v1::Job Client::Cancel(const std::string& job_id) {
  v1::CancelVideoRequest request;
  request.set_job_id(job_id);
  return impl_
      ->Quick<v1::CancelVideoRequest, v1::CancelVideoResponse>(
          &v1::VideoGeneration::Stub::CancelVideo, request)
      .job();
}

v1::Job Client::GetJob(const std::string& job_id) {
  v1::GetJobRequest request;
  request.set_job_id(job_id);
  return impl_->Quick<v1::GetJobRequest, v1::Job>(&v1::VideoGeneration::Stub::GetJob, request);
}

std::vector<v1::Job> Client::ListJobs() {
  std::vector<v1::Job> jobs;
  v1::ListJobsRequest request;
  do {
    const auto page = impl_->Quick<v1::ListJobsRequest, v1::ListJobsResponse>(
        &v1::VideoGeneration::Stub::ListJobs, request);
    jobs.insert(jobs.end(), page.jobs().begin(), page.jobs().end());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  return jobs;
}

std::vector<v1::Model> Client::ListModels() {
  const auto response = impl_->Quick<v1::ListModelsRequest, v1::ListModelsResponse>(
      &v1::VideoGeneration::Stub::ListModels, {});
  return {response.models().begin(), response.models().end()};
}

void Client::Interrupt() { impl_->Interrupt(); }
bool Client::interrupted() const { return impl_->interrupted(); }

}  // namespace slalom::client
