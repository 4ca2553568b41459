#include "tests/e2e/running_server.h"

#include <arpa/inet.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <httplib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <stdexcept>
#include <thread>
#include <utility>

namespace slalom {
namespace {

void Record(const v1::GenerateVideoResponse& event, Outcome* outcome) {
  using Event = v1::GenerateVideoResponse;
  switch (event.event_case()) {
    case Event::kAccepted:
      outcome->order += 'A';
      outcome->job_id = event.accepted().job_id();
      outcome->resolved = event.accepted().resolved();
      break;
    case Event::kProgress:
      outcome->order += 'P';
      outcome->progress.push_back(event.progress());
      break;
    case Event::kPreview:
      outcome->order += 'V';
      outcome->previews.push_back(event.preview());
      break;
    case Event::kVideoChunk:
      outcome->order += 'C';
      if (outcome->first_offset < 0) outcome->first_offset = event.video_chunk().offset();
      if (event.video_chunk().offset() !=
          outcome->first_offset + static_cast<std::int64_t>(outcome->bytes.size())) {
        throw std::runtime_error("a gap in the video's bytes");
      }
      outcome->bytes += event.video_chunk().data();
      break;
    case Event::kCompleted:
      outcome->order += 'D';
      outcome->statistics = event.completed().statistics();
      break;
    case Event::EVENT_NOT_SET:
      throw std::runtime_error("an empty message");
  }
}

Outcome Follow(const std::function<void(const client::Client::OnEvent&)>& call,
               const client::Client::OnEvent& on_event) {
  Outcome outcome;
  try {
    call([&](const v1::GenerateVideoResponse& event) {
      Record(event, &outcome);
      if (on_event) on_event(event);
    });
  } catch (const client::CallError& error) {
    outcome.code = error.code();
    outcome.message = error.what();
    outcome.retry_seconds = error.retry_seconds();
  }
  return outcome;
}

}  // namespace

RunningServer::RunningServer(FakeOptions fake, ServerConfig config, bool serve)
    : fake_(std::move(fake)) {
  config.listen = {"127.0.0.1", 0};
  config.http_listen = {"127.0.0.1", 0};
  server_ = std::make_unique<Server>(config);
  if (serve) Serve();
}

void RunningServer::Serve() {
  std::vector<std::unique_ptr<Pipeline>> pipelines;
  pipelines.push_back(std::make_unique<FakePipeline>(fake_));
  server_->Serve(std::move(pipelines));
}

client::Client RunningServer::MakeClient(const std::string& token) const {
  return client::Client({address(), token});
}

std::shared_ptr<grpc::Channel> RunningServer::MakeChannel(
    const grpc::ChannelArguments& arguments) const {
  auto channel =
      grpc::CreateCustomChannel(address(), grpc::InsecureChannelCredentials(), arguments);
  if (!channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(10))) {
    throw std::runtime_error("the server at " + address() + " cannot be reached");
  }
  return channel;
}

Outcome RunningServer::Generate(const v1::GenerateVideoRequest& request, const std::string& token,
                                std::optional<double> deadline_seconds,
                                const client::Client::OnEvent& on_event) const {
  client::Client client = MakeClient(token);
  return Follow(
      [&](const client::Client::OnEvent& record) {
        client.Generate(request, deadline_seconds, record);
      },
      on_event);
}

Outcome RunningServer::Resume(const std::string& job_id, std::int64_t offset,
                              const std::string& token) const {
  client::Client client = MakeClient(token);
  return Follow(
      [&](const client::Client::OnEvent& record) { client.Resume(job_id, offset, record); }, {});
}

std::string RunningServer::Get(const std::string& path, int* status) const {
  httplib::Client client("127.0.0.1", server_->http_address().port);
  const auto response = client.Get(path);
  if (!response) throw std::runtime_error("no HTTP response to " + path);
  if (status != nullptr) *status = response->status;
  return response->body;
}

std::string RunningServer::RawHttp(const std::string& bytes) const {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(server_->http_address().port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string answer;
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0 &&
      send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL) == std::ssize(bytes)) {
    char buffer[4096];
    for (ssize_t n = 0; (n = recv(fd, buffer, sizeof(buffer), 0)) > 0;) {
      answer.append(buffer, static_cast<std::size_t>(n));
    }
  }
  close(fd);
  return answer;
}

v1::GenerateVideoRequest SmallClip(const std::string& prompt) {
  v1::GenerateVideoRequest request;
  request.set_prompt(prompt);
  return request;
}

grpc::Status RawCall(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                     const std::string& request, std::vector<std::string>* responses) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareCall(&context, method, &queue);
  const auto step = [&] {
    void* tag = nullptr;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  call->StartCall(nullptr);
  step();
  const grpc::Slice slice(request);
  call->Write(grpc::ByteBuffer(&slice, 1), nullptr);
  step();
  call->WritesDone(nullptr);
  step();
  while (true) {
    grpc::ByteBuffer response;
    call->Read(&response, nullptr);
    if (!step()) break;
    grpc::Slice whole;
    response.DumpToSingleSlice(&whole);
    responses->emplace_back(reinterpret_cast<const char*>(whole.begin()), whole.size());
  }
  grpc::Status status;
  call->Finish(&status, nullptr);
  step();
  return status;
}

bool Eventually(const std::function<bool()>& condition) {
  for (int i = 0; i < 1000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return condition();
}

}  // namespace slalom
