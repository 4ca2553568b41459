// Host memory to the device at the speed of the link: weights, above all.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/core/dtype.h"

namespace slalom::cuda {

// A copy from pageable memory passes through one driver thread's staging buffer, page faults of a
// mapped file included: 3 to 6 GB/s. Here several threads fill pinned buffers of their own, each
// sending one while it fills the other, so that faults and copies run side by side with the
// transfer. f32 becomes bf16 on the way: half the bytes cross the link, and no f32 copy takes
// device memory.
//
// Threads live as long as one Copy. One Copy at a time.
class Uploader {
 public:
  // Where buffers come from and what sends them; a seam for tests without a device. `buffer` is the
  // index of one of threads * kBuffersPerThread buffers.
  struct Link {
    std::function<std::byte*(std::size_t bytes)> allocate;  // null when there is no pinned memory
    std::function<void(std::byte*)> release;
    std::function<void()> enter;  // a thread begins
    // Queues a copy; it reads `from` until wait(buffer) has returned.
    std::function<void(int buffer, const std::byte* from, std::byte* to, std::size_t bytes)> send;
    std::function<void(int buffer)> wait;
  };

  static constexpr std::size_t kBufferBytes = std::size_t{2} << 20;
  static constexpr int kBuffersPerThread = 2;

  Uploader(Link link, int threads);
  // No send may be under way.
  ~Uploader();
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;

  // False when there was no pinned memory: use the plain way then.
  bool ready() const { return memory_ != nullptr; }

  // n elements; the types are equal, or f32 and bf16. Returns when `from` has been read; the last
  // sends may still be under way. Throws what the link throws.
  void Copy(const void* from, DType from_type, void* to, DType to_type, std::int64_t n);

 private:
  struct Piece;
  void Send(int buffer, const Piece& piece);

  Link link_;
  int threads_;
  std::byte* memory_ = nullptr;  // threads_ * kBuffersPerThread buffers
};

// Sends on `stream` of `device`.
Uploader::Link MakeUploadLink(int device, cudaStream_t stream, int threads);

}  // namespace slalom::cuda
