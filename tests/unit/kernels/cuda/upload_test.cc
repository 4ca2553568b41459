#include "kernels/cuda/upload.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <vector>

#include "kernels/core/random.h"

namespace slalom::cuda {
namespace {

constexpr int kThreads = 3;

// A link that is as late as a device may be: a send is carried out only when somebody waits for its
// buffer, or at the end. A buffer that is overwritten too early shows in what arrives.
class LateDevice {
 public:
  Uploader::Link MakeLink() {
    return {.allocate = [](std::size_t bytes) { return new std::byte[bytes]; },
            .release = [](std::byte* memory) { delete[] memory; },
            .enter = [this] { ++threads_; },
            .send =
                [this](int buffer, const std::byte* from, std::byte* to, std::size_t bytes) {
                  if (++sends_ == fail_at_) throw std::runtime_error("the device is gone");
                  Pending& pending = pending_.at(static_cast<std::size_t>(buffer));
                  EXPECT_EQ(pending.bytes, 0u) << "nobody waited for the buffer";
                  pending = {from, to, bytes};
                },
            .wait = [this](int buffer) { Finish(buffer); }};
  }
  void FinishAll() {
    for (int i = 0; i < static_cast<int>(pending_.size()); ++i) Finish(i);
  }
  void FailAt(int send) { fail_at_ = send; }
  int sends() const { return sends_; }

 private:
  struct Pending {
    const std::byte* from = nullptr;
    std::byte* to = nullptr;
    std::size_t bytes = 0;
  };
  // A buffer belongs to one thread.
  void Finish(int buffer) {
    Pending& pending = pending_.at(static_cast<std::size_t>(buffer));
    if (pending.bytes > 0) std::memcpy(pending.to, pending.from, pending.bytes);
    pending = {};
  }

  std::vector<Pending> pending_ = std::vector<Pending>(kThreads * Uploader::kBuffersPerThread);
  std::atomic<int> threads_ = 0;
  std::atomic<int> sends_ = 0;
  int fail_at_ = -1;
};

std::vector<float> Values(std::int64_t n) {
  std::vector<float> values(static_cast<std::size_t>(n));
  FillNormal(1, 0, 0, values);
  return values;
}

TEST(Uploader, EveryElementArrivesOnce) {
  constexpr std::int64_t kPerPiece = Uploader::kBufferBytes / sizeof(float);
  LateDevice device;
  Uploader uploader(device.MakeLink(), kThreads);
  ASSERT_TRUE(uploader.ready());
  for (const std::int64_t n : {std::int64_t{1}, kPerPiece - 1, kPerPiece, 17 * kPerPiece + 5}) {
    const std::vector<float> from = Values(n);
    std::vector<float> to(from.size() + 1, -77.0f);
    const int before = device.sends();
    uploader.Copy(from.data(), DType::kF32, to.data(), DType::kF32, n);
    device.FinishAll();
    EXPECT_EQ(std::memcmp(from.data(), to.data(), from.size() * sizeof(float)), 0) << n;
    EXPECT_EQ(to.back(), -77.0f) << n;
    EXPECT_EQ(device.sends() - before, (n + kPerPiece - 1) / kPerPiece);
  }
}

TEST(Uploader, NarrowsOnTheWay) {
  constexpr std::int64_t kCount = 3 * Uploader::kBufferBytes / sizeof(BFloat16) + 9;
  LateDevice device;
  Uploader uploader(device.MakeLink(), kThreads);
  const std::vector<float> from = Values(kCount);
  std::vector<BFloat16> to(from.size());
  uploader.Copy(from.data(), DType::kF32, to.data(), DType::kBF16, kCount);
  device.FinishAll();
  for (std::size_t i = 0; i < from.size(); ++i) {
    ASSERT_EQ(to[i].bits, BFloat16(from[i]).bits) << i;
  }
}

TEST(Uploader, AFailureIsThrownWhenAllThreadsHaveStopped) {
  constexpr std::int64_t kCount = 64 * Uploader::kBufferBytes / sizeof(float);
  LateDevice device;
  device.FailAt(5);
  Uploader uploader(device.MakeLink(), kThreads);
  const std::vector<float> from(static_cast<std::size_t>(kCount));
  std::vector<float> to(from.size());
  EXPECT_THROW(uploader.Copy(from.data(), DType::kF32, to.data(), DType::kF32, kCount),
               std::runtime_error);
  EXPECT_LT(device.sends(), 64);
}

TEST(Uploader, NoPinnedMemoryIsNotReady) {
  LateDevice device;
  Uploader::Link link = device.MakeLink();
  link.allocate = [](std::size_t) -> std::byte* { return nullptr; };
  EXPECT_FALSE(Uploader(std::move(link), kThreads).ready());
}

}  // namespace
}  // namespace slalom::cuda
