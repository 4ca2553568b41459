// The seam where errors become gRPC statuses.
#pragma once

#include <grpcpp/support/status.h>

#include <optional>

#include "kernels/core/error.h"

namespace slalom {

// The same code and message. Violations become google.rpc.BadRequest, `retry_seconds` becomes
// google.rpc.RetryInfo, both in the status details.
grpc::Status ToStatus(const Error& error, std::optional<double> retry_seconds = std::nullopt);

// What a handler answers to the exception in flight: an Error keeps its code, anything else is
// INTERNAL. To be called in a catch block.
grpc::Status CurrentExceptionToStatus();

}  // namespace slalom
