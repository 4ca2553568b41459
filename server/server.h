// Server: everything that slalomd is made of, put together. Tests run it in-process.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model/pipeline.h"
#include "server/config.h"

namespace slalom {

// Owns the scheduler, the gRPC server and the HTTP server. Its methods are called by one thread, in
// the order of their declaration.
class Server {
 public:
  // Binds both addresses and answers "warming up" (UNAVAILABLE, readyz 503) from then on. Throws
  // Error(kUnavailable) when an address cannot be bound.
  explicit Server(const ServerConfig& config);
  // Ends what still runs.
  ~Server();

  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // The addresses with the ports really bound.
  HostPort grpc_address() const;
  HostPort http_address() const;

  // Takes work from now on. Throws Error.
  void Serve(std::vector<std::unique_ptr<Pipeline>> pipelines);

  // Refuses new jobs at once (readyz 503, UNAVAILABLE) and lets the others finish within
  // config.drain_seconds, or until `hurry` returns true; what is left then ends with UNAVAILABLE.
  // Returns true when nothing was lost: nothing had to be ended, or the next process goes on with
  // it, which has the state folder. In that case jobs that have not begun are not waited for.
  bool Drain(const std::function<bool()>& hurry);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace slalom
