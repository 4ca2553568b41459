#include "server/media/video_writer.h"

#include <pthread.h>

#include <chrono>
#include <string>
#include <utility>

namespace slalom {

VideoWriter::VideoWriter(const VideoFormat& format, int max_queued, Callbacks callbacks)
    : format_(format),
      max_queued_(max_queued),
      callbacks_(std::move(callbacks)),
      thread_([this] { Run(); }) {}

VideoWriter::~VideoWriter() {
  Abort();
  thread_.join();
}

void VideoWriter::Push(Tensor frames) {
  {
    std::lock_guard lock(mutex_);
    if (finished_ || aborted_) return;
    queue_.push_back(std::move(frames));
  }
  changed_.notify_one();
}

void VideoWriter::Finish() {
  {
    std::lock_guard lock(mutex_);
    finished_ = true;
  }
  changed_.notify_one();
}

void VideoWriter::Abort() {
  {
    std::lock_guard lock(mutex_);
    aborted_ = true;
    queue_.clear();
  }
  changed_.notify_one();
}

bool VideoWriter::has_room() const {
  std::lock_guard lock(mutex_);
  return aborted_ || static_cast<int>(queue_.size()) < max_queued_;
}

double VideoWriter::encode_seconds() const {
  std::lock_guard lock(mutex_);
  return encode_seconds_;
}

std::optional<Tensor> VideoWriter::Next() {
  bool room = false;
  std::optional<Tensor> frames;
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return aborted_ || finished_ || !queue_.empty(); });
    if (aborted_ || queue_.empty()) return std::nullopt;
    frames = std::move(queue_.front());
    queue_.pop_front();
    room = static_cast<int>(queue_.size()) == max_queued_ - 1;
  }
  if (room) callbacks_.on_room();
  return frames;
}

void VideoWriter::EncodeAll() {
  using Clock = std::chrono::steady_clock;
  const auto timed = [this](auto&& work) {
    const auto start = Clock::now();
    work();
    std::lock_guard lock(mutex_);
    encode_seconds_ += std::chrono::duration<double>(Clock::now() - start).count();
  };
  const auto aborted = [this] {
    std::lock_guard lock(mutex_);
    return aborted_;
  };
  Mp4Encoder encoder(format_, callbacks_.on_bytes);
  while (const std::optional<Tensor> frames = Next()) {
    const std::size_t frame_bytes = frames->NumBytes() / static_cast<std::size_t>(frames->dim(0));
    const auto* pixels = frames->data<std::byte>();
    for (std::int64_t i = 0; i < frames->dim(0) && !aborted(); ++i) {
      timed([&] { encoder.AddFrame({pixels + i * frame_bytes, frame_bytes}); });
    }
    timed([&] { encoder.Flush(); });
  }
  if (aborted()) return;
  timed([&] { encoder.Finish(); });
}

void VideoWriter::Run() {
  pthread_setname_np(pthread_self(), "encoder");
  std::optional<Error> error;
  try {
    EncodeAll();
  } catch (const Error& e) {
    error = e;
  } catch (const std::exception& e) {
    error = Error(ErrorCode::kInternal, std::string("video encoder: ") + e.what());
  }
  {
    std::lock_guard lock(mutex_);
    if (aborted_) return;
    aborted_ = error.has_value();
    queue_.clear();
  }
  callbacks_.on_end(error);
}

}  // namespace slalom
