#include "kernels/cuda/upload.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "kernels/cuda/check.h"

namespace slalom::cuda {
namespace {

// One event per buffer, on the device that was current when they were made.
class Events {
 public:
  explicit Events(int n) : events_(static_cast<std::size_t>(n)) {
    for (cudaEvent_t& event : events_) {
      Check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    }
  }
  ~Events() {
    for (cudaEvent_t event : events_) {
      if (event != nullptr) cudaEventDestroy(event);
    }
  }
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;
  cudaEvent_t operator[](int i) const { return events_[static_cast<std::size_t>(i)]; }

 private:
  std::vector<cudaEvent_t> events_;
};

}  // namespace

struct Uploader::Piece {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  std::int64_t elements = 0;
  std::size_t element_bytes = 0;  // of the target
  bool narrow = false;            // f32 to bf16
};

Uploader::Uploader(Link link, int threads) : link_(std::move(link)), threads_(threads) {
  const auto buffers = static_cast<std::size_t>(threads * kBuffersPerThread);
  memory_ = link_.allocate(buffers * kBufferBytes);
}

Uploader::~Uploader() {
  if (memory_ != nullptr) link_.release(memory_);
}

void Uploader::Send(int buffer, const Piece& piece) {
  std::byte* staging = memory_ + static_cast<std::size_t>(buffer) * kBufferBytes;
  const std::size_t bytes = static_cast<std::size_t>(piece.elements) * piece.element_bytes;
  link_.wait(buffer);
  if (piece.narrow) {
    const auto* from = reinterpret_cast<const float*>(piece.from);
    auto* to = reinterpret_cast<BFloat16*>(staging);
    for (std::int64_t i = 0; i < piece.elements; ++i) to[i] = BFloat16(from[i]);
  } else {
    std::memcpy(staging, piece.from, bytes);
  }
  link_.send(buffer, staging, piece.to, bytes);
}

void Uploader::Copy(const void* from, DType from_type, void* to, DType to_type, std::int64_t n) {
  const std::size_t from_bytes = ByteSize(from_type);
  const std::size_t to_bytes = ByteSize(to_type);
  const auto per_piece = static_cast<std::int64_t>(kBufferBytes / to_bytes);
  const std::int64_t pieces = (n + per_piece - 1) / per_piece;
  std::atomic<std::int64_t> next = 0;
  std::exception_ptr failure;
  std::mutex mutex;

  const auto work = [&](int thread) {
    try {
      link_.enter();
      int turn = 0;
      for (std::int64_t i = next++; i < pieces; i = next++, ++turn) {
        const std::int64_t begin = i * per_piece;
        Send(thread * kBuffersPerThread + turn % kBuffersPerThread,
             {.from = static_cast<const std::byte*>(from) + begin * from_bytes,
              .to = static_cast<std::byte*>(to) + begin * to_bytes,
              .elements = std::min(per_piece, n - begin),
              .element_bytes = to_bytes,
              .narrow = from_type != to_type});
      }
    } catch (...) {
      next = pieces;  // the others stop as well
      const std::lock_guard lock(mutex);
      if (failure == nullptr) failure = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> pool;
    const auto wanted = static_cast<int>(std::min<std::int64_t>(threads_, pieces));
    for (int thread = 1; thread < wanted; ++thread) pool.emplace_back(work, thread);
    work(0);
  }
  if (failure != nullptr) std::rethrow_exception(failure);
}

Uploader::Link MakeUploadLink(int device, cudaStream_t stream, int threads) {
  const auto events = std::make_shared<const Events>(threads * Uploader::kBuffersPerThread);
  Uploader::Link link;
  link.allocate = [](std::size_t bytes) -> std::byte* {
    void* memory = nullptr;
    if (cudaHostAlloc(&memory, bytes, cudaHostAllocDefault) != cudaSuccess) {
      cudaGetLastError();  // too little lockable memory is an answer, not an error of the next call
      return nullptr;
    }
    return static_cast<std::byte*>(memory);
  };
  // A failure to free has nobody to go to.
  link.release = [](std::byte* memory) { cudaFreeHost(memory); };
  link.enter = [device] { Check(cudaSetDevice(device), "cudaSetDevice"); };
  link.send = [stream, events](int buffer, const std::byte* from, std::byte* to,
                               std::size_t bytes) {
    Check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream), "upload");
    Check(cudaEventRecord((*events)[buffer], stream), "cudaEventRecord");
  };
  // An event that was never recorded counts as done.
  link.wait = [events](int buffer) {
    Check(cudaEventSynchronize((*events)[buffer]), "cudaEventSynchronize");
  };
  return link;
}

}  // namespace slalom::cuda
