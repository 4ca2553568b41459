#include "server/status.h"

#include <google/protobuf/any.pb.h>

#include <cmath>
#include <exception>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace slalom {

grpc::Status ToStatus(const Error& error, std::optional<double> retry_seconds) {
  const auto code = static_cast<grpc::StatusCode>(error.code());
  if (error.violations().empty() && !retry_seconds) return {code, error.what()};

  google::rpc::Status details;
  details.set_code(code);
  details.set_message(error.what());
  if (!error.violations().empty()) {
    google::rpc::BadRequest bad_request;
    for (const FieldViolation& violation : error.violations()) {
      auto* field = bad_request.add_field_violations();
      field->set_field(violation.field);
      field->set_description(violation.description);
    }
    details.add_details()->PackFrom(bad_request);
  }
  if (retry_seconds) {
    google::rpc::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(static_cast<std::int64_t>(std::ceil(*retry_seconds)));
    details.add_details()->PackFrom(retry);
  }
  return {code, error.what(), details.SerializeAsString()};
}

grpc::Status CurrentExceptionToStatus() {
  try {
    throw;
  } catch (const Error& error) {
    return ToStatus(error);
  } catch (const std::exception& error) {
    return {grpc::StatusCode::INTERNAL, error.what()};
  }
}

}  // namespace slalom
