// Refusal: an error that goes away by itself.
#pragma once

#include <optional>
#include <string>

#include "kernels/core/error.h"

namespace slalom {

// RESOURCE_EXHAUSTED, with what google.rpc.RetryInfo shall say. `reason` is a metric's label:
// "rate", "quota", "queue" or "streams".
class Refusal : public Error {
 public:
  Refusal(const char* reason, const std::string& message,
          std::optional<double> retry_seconds = std::nullopt)
      : Error(ErrorCode::kResourceExhausted, message),
        reason_(reason),
        retry_seconds_(retry_seconds) {}

  const char* reason() const { return reason_; }
  // Without: when the next job is done.
  std::optional<double> retry_seconds() const { return retry_seconds_; }

 private:
  const char* reason_;
  std::optional<double> retry_seconds_;
};

}  // namespace slalom
