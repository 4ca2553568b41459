#include "tests/bench/load_call.h"

#include <utility>

namespace slalom::bench {
namespace {

using Clock = std::chrono::steady_clock;

// Owns itself until gRPC is done with it.
class Call final : public grpc::ClientReadReactor<v1::GenerateVideoResponse> {
 public:
  Call(CallPlan plan, std::function<void(const CallResult&)> done)
      : plan_(std::move(plan)), done_(std::move(done)) {
    result_.load_class = plan_.load_class;
  }

  void Start(v1::VideoGeneration::Stub& stub) {
    if (!plan_.token.empty()) context_.AddMetadata("authorization", "Bearer " + plan_.token);
    if (plan_.deadline_seconds) {
      context_.set_deadline(
          std::chrono::system_clock::now() +
          std::chrono::microseconds(static_cast<std::int64_t>(*plan_.deadline_seconds * 1e6)));
    }
    start_ = Clock::now();
    stub.async()->GenerateVideo(&context_, &plan_.request, this);
    AddHold();  // while a slow reader sleeps no read is under way
    StartRead(&event_);
    grpc::ClientReadReactor<v1::GenerateVideoResponse>::StartCall();
  }

  void OnReadDone(bool ok) override {
    if (!ok) return RemoveHold();
    if (event_.has_accepted()) result_.accepted = Now();
    if (event_.has_video_chunk()) {
      if (result_.first_byte < 0) result_.first_byte = Now();
      result_.bytes += static_cast<std::int64_t>(event_.video_chunk().data().size());
    }
    if (++messages_ == plan_.disconnect_after) {
      result_.disconnected = true;
      context_.TryCancel();
    }
    if (plan_.pause_seconds <= 0 || result_.disconnected) return StartRead(&event_);
    const auto until =
        std::chrono::system_clock::now() +
        std::chrono::microseconds(static_cast<std::int64_t>(plan_.pause_seconds * 1e6));
    alarm_.Set(until, [this](bool) { StartRead(&event_); });
  }

  void OnDone(const grpc::Status& status) override {
    result_.code = status.error_code();
    result_.total = Now();
    done_(result_);
    delete this;
  }

 private:
  double Now() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

  const CallPlan plan_;
  const std::function<void(const CallResult&)> done_;
  grpc::ClientContext context_;
  grpc::Alarm alarm_;
  Clock::time_point start_;
  v1::GenerateVideoResponse event_;
  CallResult result_;
  int messages_ = 0;
};

}  // namespace

void StartCall(v1::VideoGeneration::Stub& stub, CallPlan plan,
               std::function<void(const CallResult&)> done) {
  (new Call(std::move(plan), std::move(done)))->Start(stub);
}

}  // namespace slalom::bench
