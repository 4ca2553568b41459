// Client: the RPCs as the command line needs them. Also what tests talk to a server with.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "slalom/v1/video_generation.pb.h"

namespace slalom::client {

// A call that failed.
class CallError : public std::runtime_error {
 public:
  CallError(int code, const std::string& message, std::optional<double> retry_seconds = {});
  // A failure on this side of the wire, with its own advice.
  CallError(int code, const std::string& message, std::string advice);

  int code() const { return code_; }  // a gRPC status code
  const char* code_name() const;      // "INVALID_ARGUMENT"
  std::optional<double> retry_seconds() const { return retry_seconds_; }
  // What to try, in one sentence.
  std::string advice() const;

 private:
  int code_;
  std::optional<double> retry_seconds_;
  std::string advice_;  // empty: the code's
};

struct ClientOptions {
  std::string server = "127.0.0.1:8500";
  std::string token;  // bearer token; empty: none
};

// Thread-safe: Interrupt may come from any thread while another one is in a call.
class Client {
 public:
  using OnEvent = std::function<void(const v1::GenerateVideoResponse&)>;

  explicit Client(const ClientOptions& options);
  ~Client();

  // Calls `on_event` for each message until the stream has ended well. Throws CallError, and
  // whatever `on_event` throws, after having ended the call. A detached job survives a broken
  // connection: the stream is then resumed where it broke, a few times.
  void Generate(const v1::GenerateVideoRequest& request, std::optional<double> deadline_seconds,
                const OnEvent& on_event);
  void Resume(const std::string& job_id, std::int64_t offset, const OnEvent& on_event);

  v1::Job Cancel(const std::string& job_id);
  v1::Job GetJob(const std::string& job_id);
  std::vector<v1::Job> ListJobs();
  std::vector<v1::Model> ListModels();

  // Ends the stream in progress: Generate or Resume throws CANCELLED.
  void Interrupt();
  bool interrupted() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace slalom::client
