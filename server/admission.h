// What stands before a request reaches the scheduler: how often a tenant may ask, and how many
// streams may be open.
#pragma once

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "server/config.h"

namespace slalom {

// Tokens flow in at a rate, up to a burst; whoever takes one may go. Not thread-safe.
class TokenBucket {
 public:
  using Clock = std::chrono::steady_clock;

  // Full at first. `per_second` and `burst` are positive.
  TokenBucket(double per_second, double burst, Clock::time_point now);
  // Nothing when it took a token; else the seconds until there is one.
  std::optional<double> Take(Clock::time_point now);

 private:
  const double per_second_;
  const double burst_;
  double tokens_;
  Clock::time_point filled_;
};

// One open stream; gives its place back when it goes.
class StreamPlace {
 public:
  explicit StreamPlace(std::shared_ptr<std::atomic<int>> open) : open_(std::move(open)) {}
  ~StreamPlace() {
    if (open_) --*open_;
  }
  StreamPlace(StreamPlace&&) = default;
  StreamPlace& operator=(StreamPlace&&) = delete;

 private:
  std::shared_ptr<std::atomic<int>> open_;
};

// Thread-safe.
class Admission {
 public:
  explicit Admission(int max_streams) : max_streams_(max_streams) {}

  // Throws Refusal when the tenant asks more often than its rate allows.
  void CountRequest(const TenantOptions& tenant);
  // Throws Refusal when too many are open.
  StreamPlace OpenStream();
  int open_streams() const { return *open_; }

 private:
  const int max_streams_;
  const std::shared_ptr<std::atomic<int>> open_ = std::make_shared<std::atomic<int>>(0);
  std::mutex mutex_;
  std::map<std::string, TokenBucket>
      buckets_;  // by tenant; tenants are configured, so they are few
};

}  // namespace slalom
