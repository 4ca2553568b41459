#include "server/video_stream.h"

#include <utility>

#include "server/wire.h"

namespace slalom {
namespace {

// The client's clock for the same deadline started when the request left it, ours when it arrived:
// a call that ends so shortly before our deadline has met the client's.
constexpr std::chrono::milliseconds kRequestTravel{250};

class Refusal final : public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  explicit Refusal(const grpc::Status& status) { Finish(status); }
  void OnDone() override { delete this; }
};

}  // namespace

VideoStream::VideoStream(std::shared_ptr<JobRecord> record, std::int64_t offset,
                         std::chrono::system_clock::time_point deadline, StreamPlace place)
    : record_(std::move(record)), deadline_(deadline), place_(std::move(place)) {
  position_.offset = offset;
}

std::shared_ptr<VideoStream> VideoStream::Create(std::shared_ptr<JobRecord> record,
                                                 std::int64_t offset,
                                                 std::chrono::system_clock::time_point deadline,
                                                 StreamPlace place) {
  std::shared_ptr<VideoStream> stream(
      new VideoStream(std::move(record), offset, deadline, std::move(place)));
  stream->self_ = stream;
  stream->reader_ = stream->record_->AddReader([weak = std::weak_ptr(stream)] {
    if (const auto stream = weak.lock()) stream->Pump();
  });
  return stream;
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* VideoStream::Refuse(const grpc::Status& status) {
  return new Refusal(status);
}

void VideoStream::Pump() {
  // Finish may bring OnDone on another thread before this one has left the lock.
  const std::shared_ptr<VideoStream> keep = shared_from_this();
  std::lock_guard lock(mutex_);
  if (writing_ || finished_) return;
  if (gone_) {
    finished_ = true;
    Finish(grpc::Status::CANCELLED);
    return;
  }
  v1::GenerateVideoResponse message;
  grpc::Status status;
  switch (record_->Read(&position_, &message, &status)) {
    case JobRecord::Next::kMessage:
      bytes_ = SerializeMessage(message);
      writing_ = true;
      StartWrite(&bytes_);
      return;
    case JobRecord::Next::kWait:
      return;
    case JobRecord::Next::kEnd:
      finished_ = true;
      Finish(status);
      return;
  }
}

void VideoStream::OnWriteDone(bool ok) {
  {
    std::lock_guard lock(mutex_);
    writing_ = false;
    if (!ok) gone_ = true;
  }
  Pump();
}

void VideoStream::OnCancel() {
  {
    std::lock_guard lock(mutex_);
    gone_ = true;
  }
  Leave();
  Pump();
}

void VideoStream::OnDone() {
  Leave();
  const std::shared_ptr<VideoStream> last = std::move(self_);
}

void VideoStream::Leave() {
  const bool late = std::chrono::system_clock::now() + kRequestTravel >= deadline_;
  record_->RemoveReader(reader_,
                        late ? Error(ErrorCode::kDeadlineExceeded, "the call's deadline has passed")
                             : Error(ErrorCode::kCancelled, "the client went away"));
}

}  // namespace slalom
