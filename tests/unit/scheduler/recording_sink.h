// A sink that writes everything down and can play the slow client.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "scheduler/job.h"

namespace slalom {

// Thread-safe. Keep it until its job is done.
class RecordingSink : public JobSink {
 public:
  static constexpr int kNoLimit = 1 << 30;
  // `room`: how many FrameBatches it takes before WantsFrames turns false.
  explicit RecordingSink(int room = kNoLimit) : room_(room) {}

  void OnAccepted(const JobHandle& handle, const JobStatus& status) override {
    const Call call(*this);
    accepted_ = status;
    handle_ = handle;
  }
  void OnProgress(const Progress& progress) override {
    const Call call(*this);
    progress_.push_back(progress);
    if (fail_at_step_ && progress.step == *fail_at_step_) {
      throw Error(ErrorCode::kDataLoss, "the sink's disk is full");
    }
  }
  void OnPreview(const Tensor& image) override {
    const Call call(*this);
    ++previews_;
  }
  void OnFrames(const FrameBatch& frames) override {
    const Call call(*this);
    if (frames.first_frame != frames_) ++violations_;
    frames_ += frames.num_frames();
    --room_;
  }
  void OnDone(const JobResult& result) noexcept override {
    const Call call(*this);
    ++done_;
    result_ = result;
  }
  void OnCheckpoint(const Checkpoint& checkpoint) override {
    const Call call(*this);
    ++checkpoints_;
    checkpoint_ = checkpoint;
  }
  bool WantsFrames() const noexcept override {
    const std::lock_guard lock(mutex_);
    return room_ > 0;
  }

  // Makes room for so many batches more, as a client does that reads on. Calls Wake with its own
  // lock held: that must be allowed.
  void MakeRoom(int batches) {
    const std::lock_guard lock(mutex_);
    room_ += batches;
    handle_.Wake();
  }
  void FailAtStep(int step) { fail_at_step_ = step; }

  // Waits for OnDone. False after ten seconds.
  bool WaitDone() const {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(10), [&] { return done_ > 0; });
  }
  bool WaitFrames(int frames) const {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(10), [&] { return frames_ >= frames; });
  }

  int done() const { return Locked(done_); }
  int frames() const { return Locked(frames_); }
  int previews() const { return Locked(previews_); }
  // Calls after OnDone, before OnAccepted, overlapping ones, frames out of order: must stay 0.
  int violations() const { return Locked(violations_); }
  JobStatus accepted() const { return Locked(accepted_).value(); }
  int checkpoints() const { return Locked(checkpoints_); }
  // The newest one, not kept by this sink.
  std::weak_ptr<const std::vector<std::byte>> checkpoint() const { return Locked(checkpoint_); }
  JobResult result() const { return Locked(result_).value(); }
  std::vector<Progress> progress() const { return Locked(progress_); }
  std::optional<ErrorCode> code() const {
    const JobResult result = this->result();
    return result.error ? std::optional(result.error->code()) : std::nullopt;
  }

 private:
  // Locks, checks the order of calls, and tells who waits.
  class Call {
   public:
    explicit Call(RecordingSink& sink) : sink_(sink) {
      if (sink_.inside_.exchange(true)) ++sink_.overlaps_;
      sink_.mutex_.lock();
      sink_.violations_ += sink_.overlaps_.exchange(0);
      if (sink_.done_ > 0) ++sink_.violations_;
    }
    ~Call() {
      sink_.changed_.notify_all();
      sink_.mutex_.unlock();
      sink_.inside_ = false;
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

   private:
    RecordingSink& sink_;
  };

  template <typename T>
  T Locked(const T& value) const {
    const std::lock_guard lock(mutex_);
    return value;
  }

  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::atomic<bool> inside_ = false;
  std::atomic<int> overlaps_ = 0;
  int room_;
  int done_ = 0;
  int frames_ = 0;
  int previews_ = 0;
  int violations_ = 0;
  std::optional<int> fail_at_step_;
  std::optional<JobStatus> accepted_;
  int checkpoints_ = 0;
  std::weak_ptr<const std::vector<std::byte>> checkpoint_;
  std::optional<JobResult> result_;
  std::vector<Progress> progress_;
  JobHandle handle_;
};

}  // namespace slalom
