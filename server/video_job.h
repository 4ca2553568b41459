// VideoJob: the scheduler's output of one job, on its way to the job's record.
#pragma once

#include <memory>
#include <mutex>
#include <optional>

#include "scheduler/job.h"
#include "server/job_record.h"
#include "server/media/video_writer.h"

namespace slalom {

class JobArchive;
class Metrics;

// Frames go to the encoder's thread, encoded bytes to the record, checkpoints and the end to the
// archive. A job is accepted once the archive has it, and its end is told once the archive has
// that: what a client has heard is true after a crash too. Thread-safe as JobSink asks for it.
//
// UNAVAILABLE is no end for a job in a durable archive: the server stops or has lost its device,
// and the next process goes on with the job.
class VideoJob final : public JobSink {
 public:
  // `archive` and `metrics` must outlive it.
  VideoJob(std::shared_ptr<JobRecord> record, JobArchive* archive, Metrics* metrics);

  void OnAccepted(const JobHandle& handle, const JobStatus& status) override;
  void OnProgress(const Progress& progress) override;
  void OnPreview(const Tensor& image) override;
  void OnFrames(const FrameBatch& frames) override;
  void OnCheckpoint(const Checkpoint& checkpoint) override;
  void OnDone(const JobResult& result) noexcept override;
  bool WantsFrames() const noexcept override;

 private:
  void StartWriter();
  // From the encoder's thread: the last byte is kept, or encoding has failed.
  void OnEncoded(const std::optional<Error>& error);
  void Fail(const Error& error);
  void Complete();

  const std::shared_ptr<JobRecord> record_;
  JobArchive* const archive_;
  Metrics* const metrics_;

  mutable std::mutex mutex_;
  JobHandle handle_;
  int step_ = 0;
  std::optional<Error> encode_error_;
  std::optional<JobResult> result_;      // once the device has done its part
  std::unique_ptr<VideoWriter> writer_;  // from the first frames on; last: its thread uses the rest
};

}  // namespace slalom
