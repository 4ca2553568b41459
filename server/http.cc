#include "server/http.h"

#include <httplib.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>

#include "kernels/core/error.h"

namespace slalom {
namespace {

constexpr int kThreads = 4;
constexpr int kTimeoutSeconds = 5;

}  // namespace

class HttpServer::Impl {
 public:
  Impl(const HostPort& address, HttpHandlers handlers) : handlers_(std::move(handlers)) {
    server_.new_task_queue = [] { return new httplib::ThreadPool(kThreads); };
    // Its default sets SO_REUSEPORT, with which two servers would share a port in silence.
    server_.set_socket_options([](socket_t socket) {
      const int yes = 1;
      setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    });
    // A connection that stays open would hold one of the few threads.
    server_.set_keep_alive_max_count(1);
    server_.set_read_timeout(kTimeoutSeconds);
    server_.set_write_timeout(kTimeoutSeconds);
    AddRoutes();
    errno = 0;
    if (address.port == 0) {
      port_ = server_.bind_to_any_port(address.host);
    } else {
      port_ = server_.bind_to_port(address.host, address.port) ? address.port : -1;
    }
    if (port_ <= 0) {
      const std::string reason = errno != 0 ? std::strerror(errno) : "no such address";
      throw Error(ErrorCode::kUnavailable,
                  "http_listen: cannot bind " + address.ToString() + ": " + reason);
    }
    thread_ = std::thread([this] {
      server_.listen_after_bind();
      ended_ = true;
    });
  }

  ~Impl() {
    // stop() does nothing on a server that is not yet in its loop.
    while (!server_.is_running() && !ended_) std::this_thread::yield();
    server_.stop();
    thread_.join();
  }

  int port() const { return port_; }

 private:
  void AddRoutes() {
    // Before anything of a body is read: httplib would hold all of it in memory.
    server_.set_pre_routing_handler(
        [](const httplib::Request& request, httplib::Response& response) {
          if (request.method == "GET" || request.method == "HEAD") {
            return httplib::Server::HandlerResponse::Unhandled;
          }
          response.status = 405;
          response.set_header("Allow", "GET, HEAD");
          return httplib::Server::HandlerResponse::Handled;
        });
    server_.Get("/metrics", [this](const httplib::Request&, httplib::Response& response) {
      response.set_content(handlers_.metrics(), "text/plain; version=0.0.4; charset=utf-8");
    });
    AddProbe("/healthz", "ok", handlers_.broken);
    AddProbe("/readyz", "ready", handlers_.not_ready);
  }

  // 200 with `good`, or 503 with the reason why not.
  void AddProbe(const char* path, const std::string& good,
                const std::function<std::string()>& why_not) {
    server_.Get(path, [good, why_not](const httplib::Request&, httplib::Response& response) {
      const std::string reason = why_not();
      response.status = reason.empty() ? 200 : 503;
      response.set_content((reason.empty() ? good : reason) + "\n", "text/plain");
    });
  }

  const HttpHandlers handlers_;
  httplib::Server server_;
  int port_ = -1;
  std::atomic<bool> ended_ = false;
  std::thread thread_;
};

HttpServer::HttpServer(const HostPort& address, HttpHandlers handlers)
    : impl_(std::make_unique<Impl>(address, std::move(handlers))) {}
HttpServer::~HttpServer() = default;
int HttpServer::port() const { return impl_->port(); }

}  // namespace slalom
