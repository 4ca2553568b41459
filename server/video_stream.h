// VideoStream: one client that reads one job.
#pragma once

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include <chrono>
#include <memory>
#include <mutex>

#include "server/admission.h"
#include "server/job_record.h"

namespace slalom {

// At most one message is on its way: the next one is asked from the job's record when gRPC's flow
// control has taken the last, so that a slow client holds up nobody. Owns itself until gRPC is done
// with it.
class VideoStream final : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                          public std::enable_shared_from_this<VideoStream> {
 public:
  // `deadline` is the call's. The stream is registered as a reader when this returns.
  static std::shared_ptr<VideoStream> Create(std::shared_ptr<JobRecord> record, std::int64_t offset,
                                             std::chrono::system_clock::time_point deadline,
                                             StreamPlace place);
  // Ends the call at once.
  static grpc::ServerWriteReactor<grpc::ByteBuffer>* Refuse(const grpc::Status& status);

  // Sends what there is to send; called after Create and whenever there may be more.
  void Pump();

  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  VideoStream(std::shared_ptr<JobRecord> record, std::int64_t offset,
              std::chrono::system_clock::time_point deadline, StreamPlace place);
  void Leave();

  const std::shared_ptr<JobRecord> record_;
  const std::chrono::system_clock::time_point deadline_;
  const StreamPlace place_;
  int reader_ = -1;
  std::shared_ptr<VideoStream> self_;  // until OnDone

  std::mutex mutex_;
  ReadPosition position_;
  grpc::ByteBuffer bytes_;  // must live until OnWriteDone
  bool writing_ = false;
  bool gone_ = false;  // the client
  bool finished_ = false;
};

}  // namespace slalom
