#include "server/job_record.h"

#include <google/protobuf/util/time_util.h>

#include <algorithm>
#include <cstdlib>
#include <utility>
#include <vector>

#include "server/status.h"

namespace slalom {
namespace {

// gRPC holds one chunk for every reader that does not take it: a thousand of them cost 64 MB.
constexpr std::size_t kChunkBytes = 64 * 1024;

// A waiting client hears of its place again when that has moved by one part in so many.
constexpr int kTellingMove = 10;

google::protobuf::Timestamp ToTimestamp(std::chrono::system_clock::time_point time) {
  return google::protobuf::util::TimeUtil::MicrosecondsToTimestamp(
      std::chrono::duration_cast<std::chrono::microseconds>(time.time_since_epoch()).count());
}

// On the clock that never jumps; at the latest now.
SchedulerClock::time_point ToSteady(std::chrono::system_clock::time_point time) {
  const auto ago = std::chrono::system_clock::now() - time;
  return SchedulerClock::now() - std::max(ago, decltype(ago)::zero());
}

google::protobuf::Timestamp Now() { return ToTimestamp(std::chrono::system_clock::now()); }

double SecondsSince(SchedulerClock::time_point start) {
  return std::chrono::duration<double>(SchedulerClock::now() - start).count();
}

bool Ended(const v1::Job& job) { return job.state() >= v1::JOB_STATE_SUCCEEDED; }

}  // namespace

JobRecord::JobRecord(Origin origin, std::unique_ptr<ReplayBuffer> video)
    : origin_(std::move(origin)), video_(std::move(video)), created_(ToSteady(origin_.created)) {
  const v1::GenerateVideoRequest& request = origin_.resolved;
  job_.set_job_id(origin_.id);
  job_.set_state(v1::JOB_STATE_QUEUED);
  job_.mutable_progress()->set_stage(v1::STAGE_QUEUED);
  job_.mutable_progress()->set_steps(request.steps());
  job_.set_model(request.model());
  job_.set_prompt(request.prompt());
  job_.set_width(request.width());
  job_.set_height(request.height());
  job_.set_num_frames(request.num_frames());
  job_.set_fps(request.fps());
  job_.set_priority(request.priority());
  job_.set_detached(request.detached());
  job_.set_request_id(request.request_id());
  *job_.mutable_create_time() = ToTimestamp(origin_.created);
}

JobRecord::JobRecord(Origin origin, std::unique_ptr<ReplayBuffer> video, v1::Job ended)
    : origin_(std::move(origin)),
      video_(std::move(video)),
      created_(ToSteady(origin_.created)),
      job_(std::move(ended)) {
  accepted_.emplace();
  accepted_->set_job_id(origin_.id);
  *accepted_->mutable_resolved() = origin_.resolved;
  end_time_ = ToSteady(std::chrono::system_clock::time_point(std::chrono::microseconds(
      google::protobuf::util::TimeUtil::TimestampToMicroseconds(job_.end_time()))));
  SetError();
}

// From job_, which has ended.
void JobRecord::SetError() {
  if (job_.has_error()) {
    error_.emplace(static_cast<ErrorCode>(job_.error().code()), job_.error().message());
  }
}

void JobRecord::Accept(const JobHandle& handle, int queue_position, double estimated_seconds) {
  std::optional<Error> cancel;
  {
    std::lock_guard lock(mutex_);
    handle_ = handle;
    accepted_.emplace();
    accepted_->set_job_id(origin_.id);
    accepted_->set_queue_position(queue_position);
    accepted_->set_estimated_seconds(estimated_seconds);
    *accepted_->mutable_resolved() = origin_.resolved;
    job_.mutable_progress()->set_queue_position(queue_position);
    job_.mutable_progress()->set_eta_seconds(estimated_seconds);
    cancel = cancel_reason_;
  }
  if (cancel) handle.Cancel(*cancel);
  WakeAll();
}

void JobRecord::SetProgress(const v1::Progress& progress) {
  {
    std::lock_guard lock(mutex_);
    if (Ended(job_)) return;
    if (job_.state() == v1::JOB_STATE_QUEUED && progress.stage() != v1::STAGE_QUEUED) {
      job_.set_state(v1::JOB_STATE_RUNNING);
      *job_.mutable_start_time() = Now();
    }
    *job_.mutable_progress() = progress;
    ++progress_version_;
  }
  WakeAll();
}

void JobRecord::SetQueuePosition(int position, double eta_seconds) {
  {
    std::lock_guard lock(mutex_);
    if (job_.state() != v1::JOB_STATE_QUEUED) return;
    v1::Progress* progress = job_.mutable_progress();
    // Where a thousand wait, each would be told each second that it is one place further.
    const int told = progress->queue_position();
    if (position == told || kTellingMove * std::abs(position - told) < told) return;
    progress->set_queue_position(position);
    progress->set_eta_seconds(eta_seconds);
    ++progress_version_;
  }
  WakeAll();
}

void JobRecord::SetPreview(v1::Preview preview) {
  {
    std::lock_guard lock(mutex_);
    preview_ = std::move(preview);
    ++preview_version_;
  }
  WakeAll();
}

void JobRecord::AppendVideo(std::span<const std::byte> bytes) {
  video_->Append(bytes);
  {
    std::lock_guard lock(mutex_);
    // Of a job that an earlier process began: the first that this one knows of.
    if (first_byte_seconds_ == 0) first_byte_seconds_ = SecondsSince(created_);
  }
  WakeAll();
}

v1::Job JobRecord::Succeeded(v1::Statistics statistics) const {
  std::lock_guard lock(mutex_);
  statistics.set_bytes(video_->size());
  statistics.set_first_byte_seconds(first_byte_seconds_);
  statistics.set_total_seconds(SecondsSince(created_));
  v1::Job job = job_;
  job.set_state(v1::JOB_STATE_SUCCEEDED);
  job.mutable_progress()->set_stage(v1::STAGE_ENCODE);
  job.mutable_progress()->set_eta_seconds(0);
  *job.mutable_statistics() = std::move(statistics);
  *job.mutable_end_time() = Now();
  return job;
}

v1::Job JobRecord::Failed(const Error& error) const {
  std::lock_guard lock(mutex_);
  v1::Job job = job_;
  const bool cancelled = error.code() == ErrorCode::kCancelled;
  job.set_state(cancelled ? v1::JOB_STATE_CANCELLED : v1::JOB_STATE_FAILED);
  job.mutable_progress()->set_eta_seconds(0);
  job.mutable_error()->set_code(static_cast<int>(error.code()));
  job.mutable_error()->set_message(error.what());
  *job.mutable_end_time() = Now();
  return job;
}

void JobRecord::End(v1::Job ended) {
  std::optional<JobHandle> dropped;  // after the lock
  {
    std::lock_guard lock(mutex_);
    if (Ended(job_)) return;
    dropped.swap(handle_);
    job_ = std::move(ended);
    end_time_ = SchedulerClock::now();
    SetError();
  }
  WakeAll();
}

JobRecord::Next JobRecord::Read(ReadPosition* position, v1::GenerateVideoResponse* message,
                                grpc::Status* status) const {
  std::unique_lock lock(mutex_);
  if (error_) {
    *status = ToStatus(*error_);
    return Next::kEnd;
  }
  if (job_.state() == v1::JOB_STATE_SUCCEEDED && position->offset > video_->size()) {
    *status = ToStatus(Error(ErrorCode::kOutOfRange,
                             "byte_offset: " + std::to_string(position->offset) +
                                 " is beyond the video's " + std::to_string(video_->size()) +
                                 " bytes; give at most that"));
    return Next::kEnd;
  }
  if (!position->accepted) {
    if (!accepted_) return Next::kWait;
    position->accepted = true;
    position->progress = 0;
    *message->mutable_accepted() = *accepted_;
    return Next::kMessage;
  }
  if (position->progress != progress_version_ && !Ended(job_)) {
    position->progress = progress_version_;
    *message->mutable_progress() = job_.progress();
    return Next::kMessage;
  }
  if (position->preview != preview_version_ && !Ended(job_)) {
    position->preview = preview_version_;
    *message->mutable_preview() = preview_;
    return Next::kMessage;
  }
  if (position->offset < video_->size()) {
    lock.unlock();
    v1::VideoChunk* chunk = message->mutable_video_chunk();
    try {
      chunk->set_data(video_->Read(position->offset, kChunkBytes));
    } catch (const Error& error) {
      *status = ToStatus(error);
      return Next::kEnd;
    }
    chunk->set_offset(position->offset);
    position->offset += static_cast<std::int64_t>(chunk->data().size());
    return Next::kMessage;
  }
  if (job_.state() != v1::JOB_STATE_SUCCEEDED) return Next::kWait;
  if (position->completed) {
    *status = grpc::Status::OK;
    return Next::kEnd;
  }
  position->completed = true;
  fetched_ = true;
  *message->mutable_completed()->mutable_statistics() = job_.statistics();
  return Next::kMessage;
}

int JobRecord::AddReader(std::function<void()> wake) {
  std::lock_guard lock(mutex_);
  readers_.emplace(next_reader_, std::move(wake));
  return next_reader_++;
}

void JobRecord::RemoveReader(int reader, const Error& reason) {
  bool cancel = false;
  {
    std::lock_guard lock(mutex_);
    if (readers_.erase(reader) == 0) return;
    cancel = readers_.empty() && !detached() && !Ended(job_);
  }
  if (cancel) Cancel(reason);
}

void JobRecord::Cancel(const Error& reason) {
  std::optional<JobHandle> handle;
  {
    std::lock_guard lock(mutex_);
    if (Ended(job_)) return;
    if (!cancel_reason_) cancel_reason_ = reason;
    handle = handle_;
  }
  if (handle) handle->Cancel(reason);
}

v1::Job JobRecord::Snapshot() const {
  std::lock_guard lock(mutex_);
  v1::Job job = job_;
  job.set_bytes(video_->size());
  return job;
}

bool JobRecord::ended() const {
  std::lock_guard lock(mutex_);
  return Ended(job_);
}

std::optional<ErrorCode> JobRecord::error_code() const {
  std::lock_guard lock(mutex_);
  return error_ ? std::optional(error_->code()) : std::nullopt;
}

bool JobRecord::has_readers() const {
  std::lock_guard lock(mutex_);
  return !readers_.empty();
}

bool JobRecord::fetched() const {
  std::lock_guard lock(mutex_);
  return fetched_;
}

bool JobRecord::succeeded() const {
  std::lock_guard lock(mutex_);
  return job_.state() == v1::JOB_STATE_SUCCEEDED;
}

double JobRecord::seconds_since_end() const {
  std::lock_guard lock(mutex_);
  return Ended(job_) ? SecondsSince(end_time_) : 0;
}

double JobRecord::seconds_since_created() const { return SecondsSince(created_); }

double JobRecord::first_byte_seconds() const {
  std::lock_guard lock(mutex_);
  return first_byte_seconds_;
}

void JobRecord::WakeAll() {
  std::vector<std::function<void()>> wakes;
  {
    std::lock_guard lock(mutex_);
    wakes.reserve(readers_.size());
    for (const auto& [id, wake] : readers_) wakes.push_back(wake);
  }
  for (const auto& wake : wakes) wake();
}

}  // namespace slalom
