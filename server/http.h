// The HTTP port: /metrics, /healthz, /readyz.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "server/config.h"

namespace slalom {

struct HttpHandlers {
  std::function<std::string()> metrics;  // Prometheus' text format
  // Empty when the server can take work; else why not ("warming up", "draining", ...).
  std::function<std::string()> not_ready;
  // Empty when the process can go on; else why only a new one would.
  std::function<std::string()> broken;
};

// Serves on threads of its own until destroyed. The handlers are called from those threads.
// prometheus-cpp's own Exposer is not used: its civetweb threads get 100 KB stacks, too small in a
// process that links cuBLAS.
class HttpServer {
 public:
  // Throws Error(kUnavailable) when the address cannot be bound.
  HttpServer(const HostPort& address, HttpHandlers handlers);
  ~HttpServer();

  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  int port() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace slalom
