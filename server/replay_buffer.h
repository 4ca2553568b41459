// ReplayBuffer: the bytes of one video, kept so that any reader can have them at its own speed and
// again after a broken connection.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace slalom {

// An append-only file. One thread appends; any number read what is there, at the same time. It is
// on disk rather than in memory so that a slow client costs the server no memory.
class ReplayBuffer {
 public:
  // An unnamed temporary file, gone with this object. Throws Error.
  ReplayBuffer();
  // A new file, which outlives this object unless Remove is called. Throws Error.
  explicit ReplayBuffer(const std::string& path);
  // Opens a file that an earlier process has completed, for reading. Throws Error.
  static std::unique_ptr<ReplayBuffer> Open(const std::string& path);
  ~ReplayBuffer();

  ReplayBuffer(const ReplayBuffer&) = delete;
  ReplayBuffer& operator=(const ReplayBuffer&) = delete;

  // Throws Error(kResourceExhausted) when the disk is full, kInternal when it fails otherwise.
  void Append(std::span<const std::byte> bytes);
  // At most `limit` bytes from `offset` on; fewer at the end. Throws Error(kDataLoss).
  std::string Read(std::int64_t offset, std::size_t limit) const;
  std::int64_t size() const { return size_.load(std::memory_order_acquire); }
  // Deletes the file's name, if it has one.
  void Remove();

 private:
  ReplayBuffer(int fd, std::string path, std::int64_t size);

  int fd_ = -1;
  std::string path_;
  std::atomic<std::int64_t> size_ = 0;
};

}  // namespace slalom
