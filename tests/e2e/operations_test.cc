// What those who run the server see: health, readiness, metrics, reflection, draining, restarts.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <future>
#include <memory>
#include <thread>

#include "kernels/core/error.h"
#include "slalom/v1/video_generation.grpc.pb.h"
#include "tests/e2e/running_server.h"
#include "tests/unit/server/prometheus_text.h"

namespace slalom {
namespace {

using grpc::StatusCode;
using std::chrono::milliseconds;

// grpc.health.v1.HealthCheckResponse.status: 1 SERVING, 2 NOT_SERVING.
int Health(const RunningServer& running, const std::string& service) {
  const std::string request =
      service.empty() ? "" : std::string("\x0a") + static_cast<char>(service.size()) + service;
  std::vector<std::string> responses;
  const grpc::Status status =
      RawCall(running.MakeChannel(), "/grpc.health.v1.Health/Check", request, &responses);
  if (!status.ok() || responses.size() != 1 || responses[0].size() != 2) return -1;
  return responses[0][1];
}

int StatusOf(const RunningServer& running, const std::string& path) {
  int status = 0;
  running.Get(path, &status);
  return status;
}

TEST(OperationsTest, WarmingUpThenServing) {
  RunningServer running({}, {}, /*serve=*/false);
  EXPECT_EQ(StatusOf(running, "/healthz"), 200);
  EXPECT_EQ(StatusOf(running, "/readyz"), 503);
  EXPECT_EQ(running.Get("/readyz"), "warming up\n");
  EXPECT_EQ(Health(running, ""), 2);
  const Outcome early = running.Generate(SmallClip());
  EXPECT_EQ(early.code, StatusCode::UNAVAILABLE);
  EXPECT_TRUE(early.retry_seconds);
  running.Serve();
  EXPECT_EQ(StatusOf(running, "/readyz"), 200);
  EXPECT_EQ(Health(running, ""), 1);
  EXPECT_EQ(Health(running, "slalom.v1.VideoGeneration"), 1);
  EXPECT_EQ(running.Generate(SmallClip()).code, StatusCode::OK);
  EXPECT_EQ(StatusOf(running, "/no-such-page"), 404);
}

// A port of this machine that nobody else gets, and that refuses connections, while this lives.
class HeldPort {
 public:
  HeldPort() : socket_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    auto* generic = reinterpret_cast<sockaddr*>(&address);
    EXPECT_EQ(bind(socket_, generic, size), 0);
    EXPECT_EQ(getsockname(socket_, generic, &size), 0);
    port_ = ntohs(address.sin_port);
  }
  ~HeldPort() { close(socket_); }
  int port() const { return port_; }

 private:
  int socket_;
  int port_ = 0;
};

TEST(OperationsTest, AClientFindsAServerThatIsAboutToListen) {
  auto held = std::make_unique<HeldPort>();
  ServerConfig config;
  config.listen = {"127.0.0.1", held->port()};
  config.http_listen = {"127.0.0.1", 0};
  auto early = std::async(std::launch::async, [&] {
    client::Client client({config.listen.ToString(), ""});
    try {
      client.Generate(SmallClip(), {}, [](const auto&) {});
    } catch (const client::CallError& error) {
      return error.retry_seconds().has_value();  // the server's own words: it is warming up
    }
    return false;
  });
  std::this_thread::sleep_for(milliseconds(150));
  EXPECT_EQ(early.wait_for(milliseconds(0)), std::future_status::timeout);
  held.reset();
  const Server server(config);
  EXPECT_TRUE(early.get());
}

TEST(OperationsTest, AClientThatWaitsMayAskWhetherTheServerLives) {
  RunningServer running;
  running.journal().Hold();
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 1200);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_MIN_SENT_PING_INTERVAL_WITHOUT_DATA_MS, 1200);
  const auto stub = v1::VideoGeneration::NewStub(running.MakeChannel(arguments));
  grpc::ClientContext context;
  const auto reader = stub->GenerateVideo(&context, SmallClip());
  ASSERT_TRUE(running.journal().WaitFor("begin"));
  std::this_thread::sleep_for(std::chrono::seconds(6));  // gRPC bears two pings that it minds
  running.journal().Release();
  v1::GenerateVideoResponse event;
  bool completed = false;
  while (reader->Read(&event)) completed = completed || event.has_completed();
  const grpc::Status status = reader->Finish();
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_TRUE(completed);
}

// Each byte of a body would be a byte of the server's memory.
TEST(OperationsTest, ABodyForTheHttpPortIsRefusedUnread) {
  const RunningServer running;
  for (const char* framing : {"Content-Length: 1000000000", "Transfer-Encoding: chunked"}) {
    const std::string answer = running.RawHttp(
        std::string("POST /metrics HTTP/1.1\r\nHost: here\r\n") + framing + "\r\n\r\n");
    EXPECT_TRUE(answer.starts_with("HTTP/1.1 405")) << framing << ": " << answer;
  }
  EXPECT_EQ(StatusOf(running, "/metrics"), 200);
}

TEST(OperationsTest, ReflectionNamesTheService) {
  const RunningServer running;
  // ServerReflectionRequest.list_services (field 7) = "".
  std::vector<std::string> responses;
  RawCall(running.MakeChannel(), "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
          std::string("\x3a\x00", 2), &responses);
  ASSERT_EQ(responses.size(), 1u);
  EXPECT_NE(responses[0].find("slalom.v1.VideoGeneration"), std::string::npos);
  EXPECT_NE(responses[0].find("grpc.health.v1.Health"), std::string::npos);
}

TEST(OperationsTest, MetricsCountWhatHappened) {
  RunningServer running;
  running.Generate(SmallClip());
  running.Generate(SmallClip("nan@step1"));
  v1::GenerateVideoRequest bad = SmallClip();
  bad.set_width(7);
  bad.mutable_attention()->set_mode(v1::ATTENTION_MODE_SLA);
  running.Generate(bad);
  v1::GenerateVideoRequest hostile = SmallClip();
  hostile.set_model("label\"injection\n");
  running.Generate(hostile);
  auto samples = ParsePrometheus(running.Get("/metrics"));
  EXPECT_EQ((samples[R"(slalom_requests_total{attention="dense",code="OK",model="fake"})"]), 1);
  EXPECT_EQ((samples[R"(slalom_requests_total{attention="dense",code="INTERNAL",model="fake"})"]),
            1);
  EXPECT_EQ(
      (samples[R"(slalom_requests_total{attention="sla",code="INVALID_ARGUMENT",model="fake"})"]),
      1);
  EXPECT_EQ((samples[R"(slalom_requests_total{attention="auto",code="NOT_FOUND",model=""})"]), 1);
  EXPECT_EQ(samples["slalom_videos_total"], 1);
  EXPECT_EQ(samples["slalom_frames_total"], 9);
  EXPECT_EQ(samples["slalom_time_to_first_byte_seconds_count"], 1);
  EXPECT_EQ(samples["slalom_queue_wait_seconds_count"], 2);
  EXPECT_GE(samples[R"(slalom_denoise_step_seconds_count{attention="dense"})"], 4);
  EXPECT_EQ(samples[R"(slalom_stage_seconds_count{stage="encode"})"], 1);
  EXPECT_TRUE(HasMetric(samples, "slalom_device_busy_seconds_total"));
}

TEST(OperationsTest, DrainingFinishesWhatRunsAndRefusesTheRest) {
  RunningServer running;
  running.journal().Hold();
  auto job = std::async(std::launch::async, [&] { return running.Generate(SmallClip()); });
  ASSERT_TRUE(running.journal().WaitFor("begin"));
  auto drained =
      std::async(std::launch::async, [&] { return running.server().Drain([] { return false; }); });
  EXPECT_TRUE(Eventually([&] { return StatusOf(running, "/readyz") == 503; }));
  EXPECT_EQ(running.Get("/readyz"), "draining\n");
  EXPECT_EQ(Health(running, ""), 2);
  EXPECT_EQ(running.Generate(SmallClip()).code, StatusCode::UNAVAILABLE);
  running.journal().Release();
  const Outcome outcome = job.get();
  EXPECT_EQ(outcome.code, StatusCode::OK) << outcome.message;
  EXPECT_TRUE(drained.get());
}

TEST(OperationsTest, ADrainThatIsHurriedEndsJobsWithUnavailable) {
  FakeOptions fake;
  fake.step_time = milliseconds(20);
  RunningServer running(fake);
  v1::GenerateVideoRequest request = SmallClip();
  request.set_steps(100);
  auto job = std::async(std::launch::async, [&] { return running.Generate(request); });
  ASSERT_TRUE(running.journal().WaitFor("step"));
  EXPECT_FALSE(running.server().Drain([] { return true; }));
  EXPECT_EQ(job.get().code, StatusCode::UNAVAILABLE);
  EXPECT_EQ(running.journal().live_generations(), 0);
}

TEST(OperationsTest, ABusyPortIsUnavailable) {
  const RunningServer running;
  const auto try_to_start = [](const HostPort& listen, const HostPort& http) -> std::string {
    ServerConfig config;
    config.listen = listen;
    config.http_listen = http;
    try {
      Server second(config);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnavailable);
      return error.what();
    }
    return "";
  };
  RunningServer& other = const_cast<RunningServer&>(running);
  const HostPort any{"127.0.0.1", 0};
  EXPECT_NE(try_to_start(other.server().grpc_address(), any).find("listen"), std::string::npos);
  EXPECT_NE(try_to_start(any, other.server().http_address()).find("http_listen"),
            std::string::npos);
}

TEST(OperationsTest, VideosOutliveTheProcessWithAStateFolder) {
  const std::string folder = testing::TempDir() + "/slalom_e2e_state";
  std::filesystem::remove_all(folder);
  ServerConfig config;
  config.state_dir = folder;
  Outcome made;
  {
    RunningServer running({}, config);
    made = running.Generate(SmallClip());
    ASSERT_EQ(made.code, StatusCode::OK) << made.message;
    running.server().Drain([] { return false; });
  }
  RunningServer again({}, config);
  const Outcome replayed = again.Resume(made.job_id, 10);
  EXPECT_EQ(replayed.code, StatusCode::OK) << replayed.message;
  EXPECT_EQ(replayed.bytes, made.bytes.substr(10));
  std::filesystem::remove_all(folder);
}

TEST(OperationsTest, ARunningJobGoesOnFromItsCheckpointAfterAHurriedDrain) {
  const std::string folder = testing::TempDir() + "/slalom_e2e_goes_on";
  std::filesystem::remove_all(folder);
  ServerConfig config;
  config.state_dir = folder;
  config.checkpoint_seconds = 0;
  FakeOptions fake;
  fake.step_time = milliseconds(20);
  v1::GenerateVideoRequest request = SmallClip("the long one");
  request.set_steps(60);
  request.set_request_id("once");
  Outcome broken;
  std::size_t steps = 0;
  {
    RunningServer running(fake, config);
    auto job = std::async(std::launch::async, [&] { return running.Generate(request); });
    ASSERT_TRUE(running.journal().WaitFor("save", 5));
    EXPECT_TRUE(running.server().Drain([] { return true; })) << "nothing is lost";
    broken = job.get();
    steps = running.journal().CountStartingWith("step");
  }
  EXPECT_EQ(broken.code, StatusCode::UNAVAILABLE);
  EXPECT_NE(broken.message.find("ResumeVideo"), std::string::npos) << broken.message;
  FakeOptions fresh;  // its own journal
  RunningServer again(fresh, config);
  const Outcome outcome = again.Resume(broken.job_id, 0);
  ASSERT_EQ(outcome.code, StatusCode::OK) << outcome.message;
  EXPECT_EQ(outcome.statistics.frames(), 9);
  EXPECT_EQ(again.journal().CountStartingWith("restore"), 1u);
  EXPECT_EQ(again.journal().CountStartingWith("begin"), 0u);
  EXPECT_LE(again.journal().CountStartingWith("step") + steps, 62u);
  EXPECT_EQ(again.Generate(request).job_id, broken.job_id) << "one job, also across restarts";
  std::filesystem::remove_all(folder);
}

TEST(OperationsTest, ATenantsRateIsLimited) {
  ServerConfig config;
  config.tenants = {{.name = "one", .token = "token-of-one", .requests_per_minute = 1, .burst = 2}};
  RunningServer running({}, config);
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(running.Generate(SmallClip(), "token-of-one").code, StatusCode::OK);
  }
  const Outcome refused = running.Generate(SmallClip(), "token-of-one");
  EXPECT_EQ(refused.code, StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_NE(refused.message.find("rate"), std::string::npos) << refused.message;
  EXPECT_GE(refused.retry_seconds.value_or(0), 1);
  auto samples = ParsePrometheus(running.Get("/metrics"));
  EXPECT_EQ((samples[R"(slalom_refused_total{reason="rate"})"]), 1);
}

}  // namespace
}  // namespace slalom
