// Times operations of the CUDA back end on random data.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cuda/cuda_backend.h"

namespace slalom {

// Those of Wan2.1-1.3B at 480x832x81.
inline constexpr std::int64_t kTokens = 32760;
inline constexpr std::int64_t kWidth = 1536;
inline constexpr std::int64_t kHeads = 12;
inline constexpr std::int64_t kHeadSize = 128;

struct Row {
  std::string name;
  double milliseconds = 0;
  double work = 0;  // FLOP or bytes
  bool bytes = false;
};

// Runs what the filter, a part of its name, wants; prints a row for each. For one thread.
class Bench {
 public:
  Bench(cuda::CudaBackend& backend, std::string filter)
      : backend_(backend), filter_(std::move(filter)) {}

  // Uniform, of standard deviation `scale`.
  Tensor Random(const Shape& shape, DType type, float scale = 1.0f);
  Tensor Empty(const Shape& shape, DType type) { return backend_.Allocate(shape, type); }

  bool Wanted(const std::string& name) const { return name.find(filter_) != std::string::npos; }

  // The median of 7 samples of at least 20 ms each, after a warm-up.
  void Flops(const std::string& name, double flops, const std::function<void()>& run) {
    Time(name, flops, false, run);
  }
  void Bytes(const std::string& name, double bytes, const std::function<void()>& run) {
    Time(name, bytes, true, run);
  }

  // Throws Error(kUnavailable) where `path` cannot be written.
  void WriteJson(const std::string& path) const;

  cuda::CudaBackend& backend() { return backend_; }

 private:
  void Time(const std::string& name, double work, bool bytes, const std::function<void()>& run);
  double Seconds(const std::function<void()>& run, int repeats);

  cuda::CudaBackend& backend_;
  std::string filter_;
  std::uint64_t random_ = 1;
  std::vector<Row> rows_;
};

// Attention dense and sparse, maps, linear branches, gradients, and how time grows.
void BenchAttention(Bench& bench);

}  // namespace slalom
