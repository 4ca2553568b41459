#include "server/admission.h"

#include <algorithm>
#include <cstdio>

#include "server/refusal.h"

namespace slalom {

TokenBucket::TokenBucket(double per_second, double burst, Clock::time_point now)
    : per_second_(per_second), burst_(burst), tokens_(burst), filled_(now) {}

std::optional<double> TokenBucket::Take(Clock::time_point now) {
  const double passed = std::chrono::duration<double>(now - filled_).count();
  tokens_ = std::min(burst_, tokens_ + std::max(0.0, passed) * per_second_);
  filled_ = std::max(filled_, now);
  if (tokens_ < 1) return (1 - tokens_) / per_second_;
  tokens_ -= 1;
  return std::nullopt;
}

void Admission::CountRequest(const TenantOptions& tenant) {
  if (tenant.requests_per_minute <= 0) return;
  const auto now = TokenBucket::Clock::now();
  std::optional<double> wait;
  {
    std::lock_guard lock(mutex_);
    // A burst of less than one request would never let anything through.
    const double burst =
        tenant.burst > 0 ? tenant.burst : std::max(1.0, tenant.requests_per_minute);
    auto bucket = buckets_.try_emplace(tenant.name, tenant.requests_per_minute / 60, burst, now);
    wait = bucket.first->second.Take(now);
  }
  if (!wait) return;
  char rate[32];
  std::snprintf(rate, sizeof(rate), "%g", tenant.requests_per_minute);
  throw Refusal("rate",
                "tenant '" + tenant.name + "' asks more often than its rate of " + rate +
                    " requests per minute allows",
                wait);
}

StreamPlace Admission::OpenStream() {
  StreamPlace place(open_);
  if (++*open_ > max_streams_) {
    throw Refusal("streams", "max_streams: " + std::to_string(max_streams_) +
                                 " streams are open, and no more may be");
  }
  return place;
}

}  // namespace slalom
