#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/cuda/check.h"
#include "kernels/cuda/fastest_same.h"

namespace slalom::cuda {
namespace {

constexpr int kRounds = 3;         // of all candidates in turn, so that a change of clock hits all
constexpr int kRunsPerRound = 2;   // timed together
constexpr float kClearly = 0.99f;  // of candidate 0's time
constexpr int kThreads = 256;
constexpr int kBlocks = 1024;

// A sum of mixed words: the order of its terms does not matter, the place of each word does.
__global__ void __launch_bounds__(kThreads)
    SumBitsKernel(const std::uint32_t* words, std::size_t count, unsigned long long* sum) {
  const std::size_t step = std::size_t{gridDim.x} * kThreads;
  unsigned long long mine = 0;
  for (std::size_t i = std::size_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    unsigned long long x = (i << 32 | words[i]) * 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 29) * 0xbf58476d1ce4e5b9ull;
    mine += x ^ x >> 32;
  }
  atomicAdd(sum, mine);
}

class Event {
 public:
  Event() { Check(cudaEventCreate(&event_), "cudaEventCreate"); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { cudaEventDestroy(event_); }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

// Milliseconds of one run.
float Time(cudaStream_t stream, const Event& begin, const Event& end,
           const std::function<bool(int)>& run, int candidate) {
  Check(cudaEventRecord(begin.get(), stream), "cudaEventRecord");
  for (int i = 0; i < kRunsPerRound; ++i) run(candidate);
  Check(cudaEventRecord(end.get(), stream), "cudaEventRecord");
  Check(cudaEventSynchronize(end.get()), "cudaEventSynchronize");
  float milliseconds = 0;
  Check(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()), "cudaEventElapsedTime");
  return milliseconds / kRunsPerRound;
}

}  // namespace

int FastestOfSame(cudaStream_t stream, int candidates, const std::function<bool(int)>& run,
                  const void* out, std::size_t bytes, void* sum) {
  const auto bits = [&](int candidate) -> std::optional<unsigned long long> {
    if (!run(candidate)) return std::nullopt;
    Check(cudaMemsetAsync(sum, 0, sizeof(unsigned long long), stream), "FastestOfSame");
    SumBitsKernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<const std::uint32_t*>(out),
                                                    bytes / sizeof(std::uint32_t),
                                                    static_cast<unsigned long long*>(sum));
    CheckLaunch("FastestOfSame");
    unsigned long long host = 0;
    Check(cudaMemcpyAsync(&host, sum, sizeof(host), cudaMemcpyDeviceToHost, stream),
          "FastestOfSame");
    Check(cudaStreamSynchronize(stream), "FastestOfSame");
    return host;
  };
  const auto first = bits(0);
  if (!first) return 0;
  std::vector<int> same = {0};
  for (int i = 1; i < candidates; ++i) {
    if (bits(i) == first) same.push_back(i);
  }

  const Event begin, end;
  std::vector<std::array<float, kRounds>> times(same.size());
  for (int round = 0; round < kRounds; ++round) {
    for (std::size_t i = 0; i < same.size(); ++i) {
      times[i][static_cast<std::size_t>(round)] = Time(stream, begin, end, run, same[i]);
    }
  }
  const auto median = [](std::array<float, kRounds> values) {
    std::sort(values.begin(), values.end());
    return values[kRounds / 2];
  };
  int best = 0;
  float best_time = kClearly * median(times[0]);
  for (std::size_t i = 1; i < same.size(); ++i) {
    if (const float time = median(times[i]); time < best_time) {
      best = same[i];
      best_time = time;
    }
  }
  return best;
}

}  // namespace slalom::cuda
