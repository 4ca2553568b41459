#include "kernels/core/error.h"

#include <array>
#include <cstddef>

namespace slalom {
namespace {

std::string JoinViolations(const std::vector<FieldViolation>& violations) {
  std::string text;
  for (const FieldViolation& violation : violations) {
    if (!text.empty()) text += "; ";
    text += violation.field + ": " + violation.description;
  }
  return text;
}

}  // namespace

const char* ErrorCodeName(ErrorCode code) {
  static constexpr std::array kNames = {"OK",
                                        "CANCELLED",
                                        "UNKNOWN",
                                        "INVALID_ARGUMENT",
                                        "DEADLINE_EXCEEDED",
                                        "NOT_FOUND",
                                        "ALREADY_EXISTS",
                                        "PERMISSION_DENIED",
                                        "RESOURCE_EXHAUSTED",
                                        "FAILED_PRECONDITION",
                                        "ABORTED",
                                        "OUT_OF_RANGE",
                                        "UNIMPLEMENTED",
                                        "INTERNAL",
                                        "UNAVAILABLE",
                                        "DATA_LOSS",
                                        "UNAUTHENTICATED"};
  const auto index = static_cast<std::size_t>(code);
  return index < kNames.size() ? kNames[index] : "UNKNOWN";
}

Error::Error(std::vector<FieldViolation> violations)
    : std::runtime_error(JoinViolations(violations)),
      code_(ErrorCode::kInvalidArgument),
      violations_(std::move(violations)) {}

}  // namespace slalom
