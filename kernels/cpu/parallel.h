// Loops over cores. The one place that knows about OpenMP.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace slalom {

// A fixed number of threads for the loops of one backend. Const and cheap to copy; each calling
// thread has its own pool below. Bodies must not throw.
class Parallel {
 public:
  explicit Parallel(int threads) : threads_(threads) {}

  int threads() const { return threads_; }

  // body(index, thread) for every index in [0, n), handed out one by one; thread < threads().
  template <typename Body>
  void Tasks(std::int64_t n, const Body& body) const {
    Job<Body> job{body};
    job.fence.store(1, std::memory_order_release);
    Run(n, &Job<Body>::Call, &job);
    job.fence.load(std::memory_order_acquire);
  }

  // body(begin, end) over pieces of [0, n) that are `grain` long.
  template <typename Body>
  void Ranges(std::int64_t n, std::int64_t grain, const Body& body) const {
    const std::int64_t step = std::max<std::int64_t>(grain, 1);
    Tasks((n + step - 1) / step, [&](std::int64_t piece, int /*thread*/) {
      body(piece * step, std::min(n, (piece + 1) * step));
    });
  }

  // As Ranges, with pieces of about 16 K elements when a row has `row_elements`.
  template <typename Body>
  void Rows(std::int64_t rows, std::int64_t row_elements, const Body& body) const {
    constexpr std::int64_t kElementsPerPiece = 16384;
    Ranges(rows, kElementsPerPiece / std::max<std::int64_t>(row_elements, 1), body);
  }

 private:
  // The fence repeats in C++ atomics what OpenMP's fork and join already guarantee: thread
  // sanitizer does not see into libgomp.
  template <typename Body>
  struct Job {
    const Body& body;
    std::atomic<int> fence{0};
    static void Call(void* self, std::int64_t index, int thread) {
      auto* job = static_cast<Job*>(self);
      job->fence.load(std::memory_order_acquire);
      job->body(index, thread);
      job->fence.fetch_add(1, std::memory_order_acq_rel);
    }
  };

  void Run(std::int64_t n, void (*call)(void*, std::int64_t, int), void* context) const;

  int threads_;
};

// While it lives, oneDNN calls on this thread use `threads` threads.
class ThreadCountScope {
 public:
  explicit ThreadCountScope(int threads);
  ~ThreadCountScope();
  ThreadCountScope(const ThreadCountScope&) = delete;
  ThreadCountScope& operator=(const ThreadCountScope&) = delete;

 private:
  int previous_;
};

}  // namespace slalom
