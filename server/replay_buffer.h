// ReplayBuffer: the bytes of one video, kept so that any reader can have them at its own speed and
// again after a broken connection.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>

namespace slalom {

// An append-only file. One thread appends; any number read what is there, at the same time. It is
// on disk rather than in memory so that a slow client costs the server no memory; it takes no file
// before its first byte and, if it has a name, none open after its last, so that jobs that wait or
// have ended are cheap.
class ReplayBuffer {
 public:
  // An unnamed temporary file, gone with this object.
  ReplayBuffer();
  // A named file, which outlives this object unless Remove is called. What lies there already can
  // be read. A writer that comes makes the video once more from its first byte, and Append compares
  // that with what is there: nobody may get half of one file and half of another. Throws Error.
  explicit ReplayBuffer(std::string path);
  ~ReplayBuffer();

  ReplayBuffer(const ReplayBuffer&) = delete;
  ReplayBuffer& operator=(const ReplayBuffer&) = delete;

  // Throws Error(kResourceExhausted) when the disk is full, kInternal when it fails otherwise,
  // kDataLoss when the video differs from what readers may have of it.
  void Append(std::span<const std::byte> bytes);
  // No more bytes will come. With `sync`, they survive a loss of power when this returns.
  void Close(bool sync);
  // At most `limit` bytes from `offset` on; fewer at the end. Throws Error(kDataLoss).
  std::string Read(std::int64_t offset, std::size_t limit) const;
  std::int64_t size() const { return size_.load(std::memory_order_acquire); }
  // Deletes the file. What comes from then on is refused; to be called when nobody reads any more.
  void Remove();

 private:
  class File;
  std::shared_ptr<File> OpenFile() const;  // an open one of ours, else by its name
  void CheckAgainst(std::span<const std::byte> bytes) const;

  const std::string path_;
  mutable std::mutex mutex_;
  std::shared_ptr<File> file_;  // from the first byte to Close or Remove
  bool removed_ = false;
  std::int64_t end_ = 0;  // the writer's: where the next byte goes
  std::atomic<std::int64_t> size_ = 0;
};

}  // namespace slalom
