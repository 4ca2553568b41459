// What tests of job records, stores and archives share.
#pragma once

#include <chrono>
#include <functional>
#include <string>

#include "kernels/core/error.h"
#include "server/job_record.h"

namespace slalom {

// A job of tenant "one" that has a deadline; the fingerprint is the prompt's, with a NUL in it.
inline JobRecord::Origin MakeOrigin(const std::string& id, const std::string& request_id = "",
                                    const std::string& prompt = "a ball") {
  JobRecord::Origin origin;
  origin.id = id;
  origin.tenant = "one";
  origin.fingerprint = std::string("print\0", 6) + prompt;
  origin.resolved.set_prompt(prompt);
  origin.resolved.set_request_id(request_id);
  origin.created = std::chrono::system_clock::now();
  origin.deadline = origin.created + std::chrono::seconds(100);
  return origin;
}

// The code of the Error that it throws; kUnknown when it throws none.
inline ErrorCode CodeOf(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.code();
  }
  return ErrorCode::kUnknown;
}

}  // namespace slalom
