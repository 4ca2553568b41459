// Every row of the table of limits and errors, over a socket.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <future>
#include <limits>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "tests/e2e/running_server.h"

namespace slalom {
namespace {

using grpc::StatusCode;
using std::chrono::milliseconds;

struct BadRequest {
  const char* field;
  const char* part;  // of the message: the value, or what is allowed
  std::function<void(v1::GenerateVideoRequest&)> spoil;
};

TEST(ErrorsTest, BadFieldsAreInvalidArgumentWithDetails) {
  RunningServer running;
  const double nan = std::nan("");
  const double infinity = std::numeric_limits<double>::infinity();
  const std::vector<BadRequest> cases = {
      {"prompt", "prompt", [](auto& r) { r.set_prompt(""); }},
      {"prompt", "200", [](auto& r) { r.set_prompt(std::string(5000, 'x')); }},
      {"width", "16", [](auto& r) { r.set_width(100); }},
      {"width", "16", [](auto& r) { r.set_width(-16); }},
      {"height", "16", [](auto& r) { r.set_height(1 << 30); }},
      {"num_frames", "4n+1", [](auto& r) { r.set_num_frames(8); }},
      {"num_frames", "4n+1", [](auto& r) { r.set_num_frames(0); }},
      {"fps", "60", [](auto& r) { r.set_fps(1000); }},
      {"steps", "100", [](auto& r) { r.set_steps(0); }},
      {"guidance_scale", "20", [](auto& r) { r.set_guidance_scale(1e9); }},
      {"guidance_scale", "finite", [nan](auto& r) { r.set_guidance_scale(nan); }},
      {"flow_shift", "finite", [infinity](auto& r) { r.set_flow_shift(infinity); }},
      {"attention.topk", "finite",
       [nan](auto& r) {
         r.mutable_attention()->set_mode(v1::ATTENTION_MODE_SLA);
         r.mutable_attention()->set_topk(nan);
       }},
      {"attention.topk", "at most 1",
       [](auto& r) {
         r.mutable_attention()->set_mode(v1::ATTENTION_MODE_SLA);
         r.mutable_attention()->set_topk(2);
       }},
      {"sampler", "99", [](auto& r) { r.set_sampler(static_cast<v1::Sampler>(99)); }},
      {"output.quality", "101", [](auto& r) { r.mutable_output()->set_quality(101); }},
      {"output.codec", "7", [](auto& r) { r.mutable_output()->set_codec(v1::Codec(7)); }},
      {"request_id", "128", [](auto& r) { r.set_request_id(std::string(200, 'x')); }},
  };
  for (const BadRequest& c : cases) {
    v1::GenerateVideoRequest request = SmallClip();
    c.spoil(request);
    std::vector<std::string> responses;
    const grpc::Status status =
        RawCall(running.MakeChannel(), "/slalom.v1.VideoGeneration/GenerateVideo",
                request.SerializeAsString(), &responses);
    EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT) << c.field;
    EXPECT_NE(status.error_message().find(c.field), std::string::npos) << status.error_message();
    EXPECT_NE(status.error_message().find(c.part), std::string::npos) << status.error_message();
    EXPECT_TRUE(responses.empty());
    google::rpc::Status details;
    google::rpc::BadRequest bad;
    ASSERT_TRUE(details.ParseFromString(status.error_details()));
    ASSERT_EQ(details.details_size(), 1) << c.field;
    ASSERT_TRUE(details.details(0).UnpackTo(&bad));
    EXPECT_EQ(bad.field_violations(0).field(), c.field);
  }
  EXPECT_EQ(running.journal().lines().size(), 0u) << "nothing reached the device";
}

TEST(ErrorsTest, BytesThatAreNoRequestAreInvalidArgument) {
  RunningServer running;
  const auto call = [&](const std::string& method, const std::string& bytes) {
    std::vector<std::string> responses;
    return RawCall(running.MakeChannel(), "/slalom.v1.VideoGeneration/" + method, bytes,
                   &responses);
  };
  const grpc::Status bad_text = call("GenerateVideo", std::string("\x0a\x02") + "\xc3\x28");
  EXPECT_EQ(bad_text.error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_NE(bad_text.error_message().find("prompt"), std::string::npos);
  EXPECT_NE(bad_text.error_message().find("UTF-8"), std::string::npos);
  for (const char* method :
       {"GenerateVideo", "ResumeVideo", "GetJob", "CancelVideo", "ListJobs", "ListModels"}) {
    EXPECT_EQ(call(method, "\xff\xff\xff\xff").error_code(), StatusCode::INVALID_ARGUMENT)
        << method;
  }
  EXPECT_EQ(call("GetJob", std::string("\x0a\x01") + "\xff").error_code(),
            StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(call("NoSuchMethod", "").error_code(), StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(running.Generate(SmallClip()).code, StatusCode::OK) << "and it still works";
}

TEST(ErrorsTest, UnknownModelsAndMissingAdapters) {
  const RunningServer running;
  v1::GenerateVideoRequest request = SmallClip();
  request.set_model("no-such-model");
  const Outcome unknown = running.Generate(request);
  EXPECT_EQ(unknown.code, StatusCode::NOT_FOUND);
  EXPECT_NE(unknown.message.find("fake"), std::string::npos) << "names those there are";
  request.clear_model();
  request.mutable_attention()->set_mode(v1::ATTENTION_MODE_SALAD);
  EXPECT_EQ(running.Generate(request).code, StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(running.Resume("x", 0).code, StatusCode::NOT_FOUND);
  EXPECT_THROW(running.MakeClient().GetJob("x"), client::CallError);
}

TEST(ErrorsTest, AFullQueueSaysWhenToTryAgain) {
  ServerConfig config;
  config.max_queue = 1;
  FakeOptions fake;
  RunningServer running(fake, config);
  running.journal().Hold();
  std::vector<std::future<Outcome>> jobs;
  // One at work, one waiting.
  jobs.push_back(std::async(std::launch::async, [&] { return running.Generate(SmallClip()); }));
  ASSERT_TRUE(running.journal().WaitFor("begin"));
  jobs.push_back(std::async(std::launch::async, [&] { return running.Generate(SmallClip()); }));
  ASSERT_TRUE(Eventually([&] { return running.MakeClient().ListJobs().size() == 2; }));
  const Outcome refused = running.Generate(SmallClip());
  EXPECT_EQ(refused.code, StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_GE(refused.retry_seconds.value_or(0), 1);
  running.journal().Release();
  for (auto& job : jobs) EXPECT_EQ(job.get().code, StatusCode::OK);
  EXPECT_EQ(running.Generate(SmallClip()).code, StatusCode::OK);
}

TEST(ErrorsTest, AClipThatNeverFitsIsNotToBeTriedAgain) {
  ServerConfig config;
  config.clip_memory_mib = 10;
  FakeOptions fake;
  fake.cost.decode_bytes = 11 << 20;
  const RunningServer running(fake, config);
  const Outcome outcome = running.Generate(SmallClip());
  EXPECT_EQ(outcome.code, StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_NE(outcome.message.find("10 MiB"), std::string::npos) << outcome.message;
  EXPECT_FALSE(outcome.retry_seconds);
}

TEST(ErrorsTest, TenantsAndTheirQuotas) {
  ServerConfig config;
  config.tenants = {{"one", "token-of-one", 1}, {"two", "token-of-two", 0}};
  FakeOptions fake;
  RunningServer running(fake, config);
  EXPECT_EQ(running.Generate(SmallClip()).code, StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(running.Generate(SmallClip(), "wrong").code, StatusCode::UNAUTHENTICATED);
  EXPECT_THROW(running.MakeClient().ListModels(), client::CallError);

  const Outcome mine = running.Generate(SmallClip(), "token-of-one");
  ASSERT_EQ(mine.code, StatusCode::OK) << mine.message;
  EXPECT_EQ(running.Resume(mine.job_id, 0, "token-of-two").code, StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(running.Resume(mine.job_id, 0, "token-of-one").code, StatusCode::OK);
  EXPECT_TRUE(running.MakeClient("token-of-two").ListJobs().empty());
  EXPECT_EQ(running.MakeClient("token-of-one").ListJobs().size(), 1u);

  running.journal().Hold();
  auto live =
      std::async(std::launch::async, [&] { return running.Generate(SmallClip(), "token-of-one"); });
  ASSERT_TRUE(running.journal().WaitFor("begin", 2));
  const Outcome second = running.Generate(SmallClip(), "token-of-one");
  EXPECT_EQ(second.code, StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_NE(second.message.find("quota"), std::string::npos);
  EXPECT_TRUE(second.retry_seconds);
  running.journal().Release();
  EXPECT_EQ(live.get().code, StatusCode::OK);
}

TEST(ErrorsTest, ADeadlineThatCannotBeMetIsRefusedAtOnce) {
  FakeOptions fake;
  fake.cost.step_seconds = 10;
  RunningServer running(fake);
  const auto start = std::chrono::steady_clock::now();
  const Outcome outcome = running.Generate(SmallClip(), "", 39);
  EXPECT_EQ(outcome.code, StatusCode::DEADLINE_EXCEEDED);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
  EXPECT_NE(outcome.message.find("40"), std::string::npos)
      << "names the estimate: " << outcome.message;
  EXPECT_EQ(running.journal().CountStartingWith("begin"), 0u);
}

TEST(ErrorsTest, ADeadlineThatPassesEndsTheJobAtTheNextStep) {
  FakeOptions fake;
  fake.step_time = milliseconds(100);
  RunningServer running(fake);
  v1::GenerateVideoRequest request = SmallClip();
  request.set_steps(100);
  const Outcome outcome = running.Generate(request, "", 2.5);
  EXPECT_EQ(outcome.code, StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(Eventually([&] { return running.journal().live_generations() == 0; }));
  EXPECT_LT(running.journal().CountStartingWith("step"), 30u);
  EXPECT_TRUE(Eventually([&] {
    const v1::Job job = running.MakeClient().GetJob(outcome.job_id);
    return job.error().code() == StatusCode::DEADLINE_EXCEEDED;
  }));
}

TEST(ErrorsTest, TroubleOnTheDeviceIsThatJobsAlone) {
  RunningServer running;
  struct Case {
    const char* order;
    StatusCode code;
    const char* part;
  };
  for (const Case& c : {Case{"oom@step2", StatusCode::RESOURCE_EXHAUSTED, ""},
                        Case{"oom@decode2", StatusCode::RESOURCE_EXHAUSTED, ""},
                        Case{"nan@step3", StatusCode::INTERNAL, "step"},
                        Case{"throw@begin", StatusCode::INTERNAL, ""},
                        Case{"error@decode1", StatusCode::INTERNAL, ""}}) {
    const Outcome outcome = running.Generate(SmallClip(std::string("a ball ") + c.order));
    EXPECT_EQ(outcome.code, c.code) << c.order << ": " << outcome.message;
    EXPECT_NE(outcome.message.find(c.part), std::string::npos) << outcome.message;
    EXPECT_EQ(running.Generate(SmallClip()).code, StatusCode::OK) << "after " << c.order;
  }
  EXPECT_EQ(running.journal().live_generations(), 0);
}

TEST(ErrorsTest, ALostDeviceIsUnavailableAndNotReady) {
  RunningServer running;
  EXPECT_EQ(running.Generate(SmallClip("lost@step2")).code, StatusCode::UNAVAILABLE);
  EXPECT_TRUE(Eventually([&] {
    int status = 0;
    running.Get("/readyz", &status);
    return status == 503;
  }));
  int healthy = 0;
  running.Get("/healthz", &healthy);
  EXPECT_EQ(healthy, 503) << "only a new process has a device again";
  EXPECT_EQ(running.Generate(SmallClip()).code, StatusCode::UNAVAILABLE);
}

// The server's own disk: the videos that it keeps.
TEST(ErrorsTest, AFullDiskUnderTheStateFolderFailsTheJobOnly) {
  RunningServer running;
  v1::GenerateVideoRequest request = SmallClip();
  request.set_width(256);
  request.set_height(256);
  request.set_num_frames(65);
  request.mutable_output()->set_quality(100);
  const auto old = std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  rlimit small = before;
  small.rlim_cur = 2048;
  setrlimit(RLIMIT_FSIZE, &small);
  const Outcome outcome = running.Generate(request);
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, old);
  EXPECT_EQ(outcome.code, StatusCode::RESOURCE_EXHAUSTED) << outcome.message;
  EXPECT_NE(outcome.message.find("state_dir"), std::string::npos);
  EXPECT_EQ(running.Generate(request).code, StatusCode::OK);
}

}  // namespace
}  // namespace slalom
