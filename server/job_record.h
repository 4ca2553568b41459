// JobRecord: what the server knows about one job, from its acceptance until it is forgotten; and
// how streams read it.
#pragma once

#include <google/protobuf/timestamp.pb.h>
#include <grpcpp/support/status.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>

#include "kernels/core/error.h"
#include "scheduler/job.h"
#include "server/replay_buffer.h"
#include "slalom/v1/job.pb.h"
#include "slalom/v1/video_generation.pb.h"

namespace slalom {

// How far one reader is.
struct ReadPosition {
  bool accepted = false;
  std::uint64_t progress = 0;  // versions seen
  std::uint64_t preview = 0;
  std::int64_t offset = 0;
  bool completed = false;
};

// The video's bytes lie in a ReplayBuffer; of progress and previews only the newest is kept. So a
// reader that is slow misses intermediate progress, but no byte, and costs no memory.
//
// Thread-safe. A reader's `wake` is called without locks held, from any thread, whenever there may
// be something new for it.
class JobRecord {
 public:
  struct Origin {
    std::string id;
    std::string tenant;
    std::string fingerprint;            // the request's bytes, to tell a repeated request
    v1::GenerateVideoRequest resolved;  // every field decided
    std::chrono::system_clock::time_point created;
    std::optional<std::chrono::system_clock::time_point> deadline;
    bool readmitted = false;  // accepted by an earlier process
  };

  JobRecord(Origin origin, std::unique_ptr<ReplayBuffer> video);
  // A job of an earlier process that has ended.
  JobRecord(Origin origin, std::unique_ptr<ReplayBuffer> video, v1::Job ended);

  const Origin& origin() const { return origin_; }
  const std::string& id() const { return origin_.id; }
  const std::string& tenant() const { return origin_.tenant; }
  bool detached() const { return origin_.resolved.detached(); }

  // --- the job's side ---
  void Accept(const JobHandle& handle, int queue_position, double estimated_seconds);
  void SetProgress(const v1::Progress& progress);
  // A job that waits moves up. Readers are told of moves that matter to where they stand.
  void SetQueuePosition(int position, double eta_seconds);
  void SetPreview(v1::Preview preview);
  // One thread at a time. Throws Error when the video cannot be kept.
  void AppendVideo(std::span<const std::byte> bytes);
  // The job as it will be reported once it has ended so: for whoever keeps it before it is told.
  v1::Job Succeeded(v1::Statistics statistics) const;  // completes the statistics
  v1::Job Failed(const Error& error) const;
  // Ends the job as one of these, and tells the readers; the first end counts.
  void End(v1::Job ended);
  void Succeed(v1::Statistics statistics) { End(Succeeded(std::move(statistics))); }
  void Fail(const Error& error) { End(Failed(error)); }

  // --- the readers' side ---
  enum class Next { kMessage, kWait, kEnd };
  // The next message for a reader, or the status that its stream ends with.
  Next Read(ReadPosition* position, v1::GenerateVideoResponse* message, grpc::Status* status) const;
  int AddReader(std::function<void()> wake);
  // When the last reader of a job that is not detached has gone, the job is cancelled with
  // `reason`.
  void RemoveReader(int reader, const Error& reason);

  void Cancel(const Error& reason);
  v1::Job Snapshot() const;
  bool ended() const;
  bool succeeded() const;
  std::optional<ErrorCode> error_code() const;  // once it has failed or was cancelled
  bool has_readers() const;
  // Somebody has read it to its last byte.
  bool fetched() const;
  // Seconds since the end; 0 before.
  double seconds_since_end() const;
  double seconds_since_created() const;
  double first_byte_seconds() const;
  ReplayBuffer& video() const { return *video_; }

 private:
  void WakeAll();
  void SetError();

  const Origin origin_;
  const std::unique_ptr<ReplayBuffer> video_;
  const SchedulerClock::time_point created_;

  mutable std::mutex mutex_;
  std::optional<JobHandle> handle_;
  std::optional<Error> cancel_reason_;  // asked for before Accept
  std::optional<v1::Accepted> accepted_;
  v1::Job job_;  // state, progress, error, statistics and times
  std::uint64_t progress_version_ = 0;
  v1::Preview preview_;
  std::uint64_t preview_version_ = 0;
  std::optional<Error> error_;
  double first_byte_seconds_ = 0;
  SchedulerClock::time_point end_time_;
  mutable bool fetched_ = false;
  std::map<int, std::function<void()>> readers_;
  int next_reader_ = 0;
};

}  // namespace slalom
