// Errors as they travel below the seams (load, worker tick, RPC): one exception type that carries
// gRPC's canonical code. Rooms throw it; only a seam turns it into a status.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace slalom {

// The numbers are those of grpc::StatusCode, so that the service converts with one cast.
enum class ErrorCode {
  kCancelled = 1,
  kUnknown = 2,
  kInvalidArgument = 3,
  kDeadlineExceeded = 4,
  kNotFound = 5,
  kAlreadyExists = 6,
  kPermissionDenied = 7,
  kResourceExhausted = 8,
  kFailedPrecondition = 9,
  kAborted = 10,
  kOutOfRange = 11,
  kUnimplemented = 12,
  kInternal = 13,
  kUnavailable = 14,
  kDataLoss = 15,
  kUnauthenticated = 16,
};

// The upper-case name of the code, for example "INVALID_ARGUMENT".
const char* ErrorCodeName(ErrorCode code);

// One field of a request that is wrong: its name, its value and what is allowed.
struct FieldViolation {
  std::string field;
  std::string description;
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  // An INVALID_ARGUMENT that names every field at fault; the message joins their descriptions.
  explicit Error(std::vector<FieldViolation> violations);

  ErrorCode code() const { return code_; }
  const std::vector<FieldViolation>& violations() const { return violations_; }

 private:
  ErrorCode code_;
  std::vector<FieldViolation> violations_;
};

}  // namespace slalom
