#include "server/video_job.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <utility>

#include "server/job_archive.h"
#include "server/media/jpeg.h"
#include "server/metrics.h"
#include "server/request.h"

namespace slalom {
namespace {

// Batches of decoded frames (a few frames each) that may wait for the encoder.
constexpr int kMaxQueuedBatches = 4;

v1::Stage ToStage(JobState state) {
  switch (state) {
    case JobState::kQueued:
      return v1::STAGE_QUEUED;
    case JobState::kEncoding:
      return v1::STAGE_TEXT_ENCODE;
    case JobState::kDenoising:
      return v1::STAGE_DENOISE;
    case JobState::kDecoding:
      return v1::STAGE_DECODE;
    default:
      return v1::STAGE_ENCODE;
  }
}

}  // namespace

VideoJob::VideoJob(std::shared_ptr<JobRecord> record, JobArchive* archive, Metrics* metrics)
    : record_(std::move(record)), archive_(archive), metrics_(metrics) {}

void VideoJob::OnAccepted(const JobHandle& handle, const JobStatus& status) {
  {
    std::lock_guard lock(mutex_);
    handle_ = handle;
  }
  if (!record_->origin().readmitted) archive_->Accept(record_->origin());
  record_->Accept(handle, status.queue_position, status.eta_seconds);
}

void VideoJob::OnProgress(const Progress& progress) {
  step_ = progress.step;
  v1::Progress message;
  message.set_stage(ToStage(progress.stage));
  message.set_step(progress.step);
  message.set_steps(progress.steps);
  message.set_eta_seconds(progress.eta_seconds);
  message.set_step_seconds(progress.step_seconds);
  message.set_sparsity(progress.sparsity);
  message.set_frames(progress.frames);
  record_->SetProgress(message);
}

void VideoJob::OnPreview(const Tensor& image) {
  v1::Preview preview;
  preview.set_step(step_);
  preview.set_media_type("image/jpeg");
  preview.set_image(EncodeJpeg(image));
  preview.set_width(static_cast<int>(image.dim(1)));
  preview.set_height(static_cast<int>(image.dim(0)));
  record_->SetPreview(std::move(preview));
}

void VideoJob::StartWriter() {
  const v1::GenerateVideoRequest& request = record_->origin().resolved;
  VideoFormat format;
  format.width = request.width();
  format.height = request.height();
  format.fps = request.fps();
  format.quality = request.output().quality();
  // A GPU decodes 832x480 at 150 frames a second; one core encodes 35 to 40 of them when they are
  // rich in detail, so that seven cores keep up with room to spare. By size and not by cores, so
  // that a clip has the same bytes everywhere.
  constexpr int kPixelsPerThread = 1 << 16;
  format.threads = std::clamp(format.width * format.height / kPixelsPerThread + 1, 1, 8);
  VideoWriter::Callbacks callbacks;
  callbacks.on_bytes = [this](std::span<const std::byte> bytes) {
    const bool first = record_->video().size() == 0;
    record_->AppendVideo(bytes);
    if (first) metrics_->ObserveFirstByte(record_->first_byte_seconds());
  };
  callbacks.on_room = [this] {
    std::lock_guard lock(mutex_);
    handle_.Wake();
  };
  callbacks.on_end = [this](const std::optional<Error>& error) { OnEncoded(error); };
  writer_ = std::make_unique<VideoWriter>(format, kMaxQueuedBatches, std::move(callbacks));
}

void VideoJob::OnFrames(const FrameBatch& frames) {
  if (frames.num_frames() == 0) return;
  std::lock_guard lock(mutex_);
  if (encode_error_) throw *encode_error_;
  if (!writer_) StartWriter();
  writer_->Push(frames.pixels);
}

void VideoJob::OnCheckpoint(const Checkpoint& checkpoint) {
  archive_->KeepCheckpoint(record_->id(), checkpoint);
}

bool VideoJob::WantsFrames() const noexcept {
  std::lock_guard lock(mutex_);
  return !writer_ || writer_->has_room();
}

void VideoJob::OnDone(const JobResult& result) noexcept {
  metrics_->ObserveJob(record_->origin().resolved.model(), record_->tenant(), result);
  std::optional<Error> error;
  {
    std::lock_guard lock(mutex_);
    result_ = result;
    if (result.state == JobState::kSucceeded) {
      error = encode_error_;
      if (!error && writer_) {
        writer_->Finish();
        return;
      }
      if (!error) error = Error(ErrorCode::kInternal, "the model made no frames");
    } else {
      if (writer_) writer_->Abort();
      error = result.error.value_or(Error(ErrorCode::kInternal, "the job ended without a reason"));
    }
  }
  Fail(*error);
}

void VideoJob::OnEncoded(const std::optional<Error>& error) {
  JobHandle handle;
  bool on_device = false;
  {
    std::lock_guard lock(mutex_);
    encode_error_ = error;
    on_device = !result_.has_value();
    // OnDone has reported a job that failed on the device.
    if (result_ && result_->state != JobState::kSucceeded) return;
    handle = handle_;
  }
  if (!error) {
    Complete();
  } else if (on_device) {
    // The device is still at work: it learns of the failure, and OnDone reports it.
    handle.Cancel(*error);
  } else {
    Fail(*error);
  }
}

void VideoJob::Fail(const Error& error) {
  const v1::GenerateVideoRequest& request = record_->origin().resolved;
  metrics_->CountRequest(request.model(), AttentionLabel(request), static_cast<int>(error.code()));
  if (archive_->durable() && error.code() == ErrorCode::kUnavailable) {
    record_->Fail(Error(error.code(), std::string(error.what()) +
                                          "; the job is kept and goes on with the next start: "
                                          "follow it by ResumeVideo"));
    return;
  }
  // Called on the device's thread too, which must not wait for a disk.
  archive_->KeepEnd(record_->Failed(error), [record = record_, error] {
    record->Fail(error);
    record->video().Remove();
  });
}

void VideoJob::Complete() {
  const v1::GenerateVideoRequest& request = record_->origin().resolved;
  double encode_seconds = 0;
  v1::Statistics statistics;
  {
    std::lock_guard lock(mutex_);
    encode_seconds = writer_->encode_seconds();
    statistics = ToStatistics(*result_, request);
  }
  statistics.set_encode_seconds(encode_seconds);
  v1::Job ended;
  try {
    record_->video().Close(/*sync=*/archive_->durable());
    ended = record_->Succeeded(std::move(statistics));
    archive_->End(ended);
  } catch (const Error& error) {
    return Fail(error);
  }
  const int frames = ended.statistics().frames();
  metrics_->ObserveVideo(encode_seconds, record_->seconds_since_created(), frames, request.fps());
  metrics_->CountRequest(request.model(), AttentionLabel(request), 0);
  spdlog::info("job {} succeeded: {} frames, {} bytes, {:.2f} s", record_->id(), frames,
               record_->video().size(), record_->seconds_since_created());
  record_->End(std::move(ended));
}

}  // namespace slalom
