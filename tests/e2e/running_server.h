// A server in this process, on real sockets, with pipelines that need no model.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/support/channel_arguments.h>
#include <grpcpp/support/status.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/client/client.h"
#include "server/config.h"
#include "server/server.h"
#include "tests/unit/scheduler/fake_pipeline.h"

namespace slalom {

// How a stream went.
struct Outcome {
  int code = 0;
  std::string message;
  std::optional<double> retry_seconds;
  std::string job_id;
  v1::GenerateVideoRequest resolved;
  v1::Statistics statistics;
  std::vector<v1::Progress> progress;
  std::vector<v1::Preview> previews;
  std::string bytes;  // of the video, from `first_offset` on
  std::int64_t first_offset = -1;
  std::string order;  // a letter per message: A, P, V (preview), C (chunk), D (done)
};

class RunningServer {
 public:
  explicit RunningServer(FakeOptions fake = {}, ServerConfig config = {}, bool serve = true);

  void Serve();
  Server& server() { return *server_; }
  FakeJournal& journal() { return *fake_.journal; }
  std::string address() const { return server_->grpc_address().ToString(); }
  client::Client MakeClient(const std::string& token = "") const;
  // Connected; throws where that fails.
  std::shared_ptr<grpc::Channel> MakeChannel(const grpc::ChannelArguments& arguments = {}) const;

  // `on_event` sees each message after it has been recorded; it may throw to leave.
  Outcome Generate(const v1::GenerateVideoRequest& request, const std::string& token = "",
                   std::optional<double> deadline_seconds = {},
                   const client::Client::OnEvent& on_event = {}) const;
  Outcome Resume(const std::string& job_id, std::int64_t offset,
                 const std::string& token = "") const;

  // Body of an HTTP GET, and its status.
  std::string Get(const std::string& path, int* status = nullptr) const;
  // These bytes to the HTTP port, and what comes back until it closes.
  std::string RawHttp(const std::string& bytes) const;

 private:
  FakeOptions fake_;
  std::unique_ptr<Server> server_;
};

// A request for a small clip.
v1::GenerateVideoRequest SmallClip(const std::string& prompt = "a red ball");

// Bytes in, bytes out: what a client in any language could send to `method`
// ("/package.Service/Method").
grpc::Status RawCall(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                     const std::string& request, std::vector<std::string>* responses);

// Polls until the condition holds. False after ten seconds.
bool Eventually(const std::function<bool()>& condition);

}  // namespace slalom
