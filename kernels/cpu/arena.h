// A caching allocator for host memory.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>

#include "kernels/backend.h"

namespace slalom {

// Hands out 64-byte aligned blocks and keeps returned ones for the next request of about the same
// size. Blocks hold a reference to the arena, so that they may outlive the backend, and may be
// dropped on any thread. Thread-safe.
class Arena : public std::enable_shared_from_this<Arena> {
 public:
  static std::shared_ptr<Arena> Create();
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Uninitialised memory. Throws Error(kResourceExhausted) when there is none, even after the
  // cached blocks were given back.
  std::shared_ptr<std::byte> Allocate(std::size_t bytes);
  MemoryStats Stats() const;
  void ResetPeak();

 private:
  Arena();
  void Return(std::byte* block, std::size_t size, std::size_t counted);
  void ReleaseCache();  // needs mutex_

  const std::size_t total_;
  mutable std::mutex mutex_;
  std::multimap<std::size_t, std::byte*> free_;
  std::size_t in_use_ = 0;  // as asked for
  std::size_t slack_ = 0;   // what the blocks in use have beside
  std::size_t cached_ = 0;
  std::size_t peak_ = 0;
};

}  // namespace slalom
