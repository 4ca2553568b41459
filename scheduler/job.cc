#include "scheduler/job.h"

#include <utility>

#include "scheduler/job_table.h"

namespace slalom {

const char* PriorityName(Priority priority) {
  switch (priority) {
    case Priority::kLow:
      return "low";
    case Priority::kNormal:
      return "normal";
    case Priority::kHigh:
      return "high";
  }
  return "unknown";
}

const char* JobStateName(JobState state) {
  switch (state) {
    case JobState::kQueued:
      return "queued";
    case JobState::kEncoding:
      return "encoding";
    case JobState::kDenoising:
      return "denoising";
    case JobState::kDecoding:
      return "decoding";
    case JobState::kSucceeded:
      return "succeeded";
    case JobState::kFailed:
      return "failed";
    case JobState::kCancelled:
      return "cancelled";
  }
  return "unknown";
}

JobHandle::JobHandle(std::shared_ptr<Job> job, std::weak_ptr<JobTable> table)
    : job_(std::move(job)), table_(std::move(table)) {}

const std::string& JobHandle::id() const {
  static const std::string kNone;
  return job_ ? job_->request.id : kNone;
}

void JobHandle::Cancel() const { Cancel(Error(ErrorCode::kCancelled, "the job was cancelled")); }

void JobHandle::Cancel(const Error& reason) const {
  if (const auto table = table_.lock()) table->RequestEnd(*job_, reason);
}

void JobHandle::Wake() const {
  if (const auto table = table_.lock()) table->Wake();
}

}  // namespace slalom
