// The main path and what clients may do to it.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <future>
#include <thread>

#include "slalom/v1/video_generation.grpc.pb.h"
#include "tests/e2e/running_server.h"
#include "tests/unit/server/video_reader.h"

namespace slalom {
namespace {

using grpc::StatusCode;
using std::chrono::milliseconds;

TEST(ServiceTest, APromptBecomesAVideo) {
  const RunningServer running;
  v1::GenerateVideoRequest request = SmallClip();
  request.set_num_frames(33);
  request.set_fps(24);
  request.set_seed(7);
  const Outcome outcome = running.Generate(request);
  ASSERT_EQ(outcome.code, StatusCode::OK) << outcome.message;
  EXPECT_EQ(outcome.order.front(), 'A');
  EXPECT_EQ(outcome.order.back(), 'D');
  EXPECT_EQ(outcome.order.find('D'), outcome.order.size() - 1);
  EXPECT_EQ(outcome.first_offset, 0);
  EXPECT_EQ(outcome.statistics.bytes(), static_cast<std::int64_t>(outcome.bytes.size()));
  EXPECT_EQ(outcome.statistics.frames(), 33);
  EXPECT_EQ(outcome.statistics.seed(), 7u);
  EXPECT_GT(outcome.statistics.encode_seconds(), 0);
  EXPECT_GE(outcome.statistics.total_seconds(), outcome.statistics.first_byte_seconds());
  EXPECT_GT(outcome.statistics.first_byte_seconds(), 0);
  EXPECT_EQ(outcome.resolved.width(), 64);

  const DecodedVideo video = DecodeVideo(outcome.bytes);
  ASSERT_EQ(video.frames.size(), 33u);
  EXPECT_EQ(video.width, 64);
  EXPECT_EQ(video.height, 48);
  EXPECT_NEAR(video.fps, 24, 1e-6);
  ClipSpec spec;
  spec.width = 64;
  spec.height = 48;
  spec.num_frames = 33;
  for (int f = 0; f < 33; ++f) {
    std::vector<std::uint8_t> expected;
    for (int y = 0; y < 48; ++y) {
      for (int x = 0; x < 64; ++x) {
        const auto pixel = FakePipeline::Pixel(spec, f, x, y);
        expected.insert(expected.end(), pixel.begin(), pixel.end());
      }
    }
    EXPECT_GT(Psnr(video.frames[static_cast<std::size_t>(f)], expected), 30) << "frame " << f;
  }
}

TEST(ServiceTest, TheFirstFragmentLeavesBeforeTheLastFrameIsDecoded) {
  FakeOptions fake;
  fake.decode_time = milliseconds(30);
  RunningServer running(fake);
  v1::GenerateVideoRequest request = SmallClip();
  request.set_num_frames(65);
  std::size_t decodes_at_first_fragment = 0;
  std::string received;
  const Outcome outcome = running.Generate(request, "", {}, [&](const auto& event) {
    if (!event.has_video_chunk() || decodes_at_first_fragment > 0) return;
    received += event.video_chunk().data();
    if (received.find("moof") == std::string::npos) return;
    decodes_at_first_fragment = running.journal().CountStartingWith("decode ");
    EXPECT_FALSE(DecodeVideo(received).frames.empty()) << "playable from the first chunk on";
  });
  ASSERT_EQ(outcome.code, StatusCode::OK) << outcome.message;
  const std::size_t decodes = running.journal().CountStartingWith("decode ");
  EXPECT_GT(decodes_at_first_fragment, 0u);
  EXPECT_LT(decodes_at_first_fragment + 4, decodes);
}

TEST(ServiceTest, ProgressTellsStepsAndStages) {
  FakeOptions fake;
  fake.step_time = milliseconds(20);
  const RunningServer running(fake);
  v1::GenerateVideoRequest request = SmallClip();
  request.set_steps(5);
  const Outcome outcome = running.Generate(request);
  ASSERT_EQ(outcome.code, StatusCode::OK) << outcome.message;
  int last_step = 0;
  int last_stage = 0;
  bool denoised = false;
  for (const v1::Progress& progress : outcome.progress) {
    EXPECT_GE(progress.step(), last_step);
    EXPECT_GE(progress.stage(), last_stage);
    EXPECT_EQ(progress.steps(), 5);
    last_step = progress.step();
    last_stage = progress.stage();
    denoised = denoised || progress.stage() == v1::STAGE_DENOISE;
  }
  EXPECT_EQ(last_step, 5);
  EXPECT_TRUE(denoised);
}

TEST(ServiceTest, PreviewsComeWhenAskedFor) {
  FakeOptions fake;
  fake.step_time = milliseconds(20);
  const RunningServer running(fake);
  v1::GenerateVideoRequest request = SmallClip();
  request.set_steps(6);
  EXPECT_TRUE(running.Generate(request).previews.empty());
  request.set_previews(true);
  const Outcome outcome = running.Generate(request);
  ASSERT_FALSE(outcome.previews.empty());
  EXPECT_EQ(outcome.previews[0].media_type(), "image/jpeg");
  EXPECT_EQ(outcome.previews[0].image().substr(0, 3), "\xff\xd8\xff");
  EXPECT_GT(outcome.previews[0].width(), 0);
}

TEST(ServiceTest, CancelFreesTheDeviceAndSparesTheOthers) {
  FakeOptions fake;
  fake.step_time = milliseconds(20);
  fake.max_batch = 2;
  RunningServer running(fake);
  v1::GenerateVideoRequest mate = SmallClip("the mate");
  mate.set_steps(30);
  auto other = std::async(std::launch::async, [&] { return running.Generate(mate); });
  v1::GenerateVideoRequest request = SmallClip("the cancelled");
  request.set_steps(100);
  std::string job_id;
  const Outcome outcome = running.Generate(request, "", {}, [&](const auto& event) {
    if (event.has_accepted()) job_id = event.accepted().job_id();
    if (event.has_progress() && event.progress().step() == 3) running.MakeClient().Cancel(job_id);
  });
  EXPECT_EQ(outcome.code, StatusCode::CANCELLED);
  EXPECT_LT(running.journal().CountStartingWith("step the cancelled"), 20u);
  EXPECT_EQ(running.MakeClient().GetJob(outcome.job_id).state(), v1::JOB_STATE_CANCELLED);
  const Outcome mates = other.get();
  EXPECT_EQ(mates.code, StatusCode::OK) << mates.message;
  EXPECT_EQ(DecodeVideo(mates.bytes).frames.size(), 9u);
  EXPECT_TRUE(Eventually([&] { return running.journal().live_generations() == 0; }));
  // It is no error to cancel what has ended.
  EXPECT_EQ(running.MakeClient().Cancel(mates.job_id).state(), v1::JOB_STATE_SUCCEEDED);
}

struct Leave {};

TEST(ServiceTest, ADisconnectCancelsTheJob) {
  FakeOptions fake;
  fake.step_time = milliseconds(20);
  RunningServer running(fake);
  v1::GenerateVideoRequest request = SmallClip();
  request.set_steps(100);
  std::string job_id;
  EXPECT_THROW(running.Generate(request, "", {},
                                [&](const auto& event) {
                                  if (event.has_accepted()) job_id = event.accepted().job_id();
                                  if (event.has_progress() && event.progress().step() > 1) {
                                    throw Leave{};
                                  }
                                }),
               Leave);
  EXPECT_TRUE(Eventually([&] { return running.journal().live_generations() == 0; }));
  EXPECT_LT(running.journal().CountStartingWith("step"), 50u);
  EXPECT_TRUE(Eventually(
      [&] { return running.MakeClient().GetJob(job_id).state() == v1::JOB_STATE_CANCELLED; }));
  EXPECT_EQ(running.Generate(SmallClip()).code, StatusCode::OK);
}

TEST(ServiceTest, ADetachedJobGoesOnAndIsResumedWithoutLosingAByte) {
  FakeOptions fake;
  fake.step_time = milliseconds(10);
  RunningServer running(fake);
  v1::GenerateVideoRequest request = SmallClip();
  request.set_detached(true);
  request.set_num_frames(33);
  std::string job_id;
  EXPECT_THROW(running.Generate(request, "", {},
                                [&](const auto& event) {
                                  job_id = event.accepted().job_id();
                                  throw Leave{};
                                }),
               Leave);
  const Outcome whole = running.Resume(job_id, 0);  // follows it to its end
  ASSERT_EQ(whole.code, StatusCode::OK) << whole.message;
  EXPECT_EQ(whole.order.front(), 'A');
  EXPECT_EQ(DecodeVideo(whole.bytes).frames.size(), 33u);
  for (const std::int64_t offset : {std::int64_t{1}, whole.statistics.bytes() / 2,
                                    whole.statistics.bytes() - 1, whole.statistics.bytes()}) {
    const Outcome rest = running.Resume(job_id, offset);
    ASSERT_EQ(rest.code, StatusCode::OK) << rest.message;
    EXPECT_EQ(rest.bytes, whole.bytes.substr(static_cast<std::size_t>(offset)));
    EXPECT_EQ(rest.order.back(), 'D');
  }
  EXPECT_EQ(running.Resume(job_id, whole.statistics.bytes() + 1).code, StatusCode::OUT_OF_RANGE);
  EXPECT_EQ(running.Resume(job_id, -1).code, StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(running.Resume("nobody", 0).code, StatusCode::NOT_FOUND);
}

TEST(ServiceTest, ARequestIdMakesNothingTwice) {
  RunningServer running;
  v1::GenerateVideoRequest request = SmallClip();
  request.set_request_id("order-66");
  const Outcome first = running.Generate(request);
  const Outcome second = running.Generate(request);
  EXPECT_EQ(second.code, StatusCode::OK);
  EXPECT_EQ(second.job_id, first.job_id);
  EXPECT_EQ(second.bytes, first.bytes);
  EXPECT_EQ(running.journal().CountStartingWith("begin"), 1u);
  request.set_prompt("another");
  const Outcome third = running.Generate(request);
  EXPECT_EQ(third.code, StatusCode::ALREADY_EXISTS);
  EXPECT_NE(third.message.find("order-66"), std::string::npos);
}

TEST(ServiceTest, ASlowClientSlowsOnlyItself) {
  RunningServer running;
  const auto stub = v1::VideoGeneration::NewStub(running.MakeChannel());
  grpc::ClientContext context;
  v1::GenerateVideoRequest request = SmallClip("the sleeper");
  request.set_width(256);
  request.set_height(256);
  request.set_num_frames(65);
  request.mutable_output()->set_quality(100);
  const auto sleeper = stub->GenerateVideo(&context, request);
  for (int i = 0; i < 3; ++i) {
    const Outcome outcome = running.Generate(SmallClip());
    EXPECT_EQ(outcome.code, StatusCode::OK) << outcome.message;
  }
  // Its job does not wait for it either.
  EXPECT_TRUE(Eventually([&] {
    for (const v1::Job& job : running.MakeClient().ListJobs()) {
      if (job.prompt() == "the sleeper") return job.state() == v1::JOB_STATE_SUCCEEDED;
    }
    return false;
  }));
  std::string bytes;
  v1::GenerateVideoResponse event;
  while (sleeper->Read(&event)) bytes += event.video_chunk().data();
  EXPECT_TRUE(sleeper->Finish().ok());
  EXPECT_EQ(DecodeVideo(bytes).frames.size(), 65u);
}

TEST(ServiceTest, JobsAndModelsAreListed) {
  RunningServer running;
  const Outcome outcome = running.Generate(SmallClip("one"));
  running.Generate(SmallClip("two"));
  const auto jobs = running.MakeClient().ListJobs();
  ASSERT_EQ(jobs.size(), 2u);
  EXPECT_EQ(jobs[0].prompt(), "two") << "newest first";
  EXPECT_EQ(jobs[1].job_id(), outcome.job_id);
  EXPECT_EQ(jobs[1].state(), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(jobs[1].statistics().frames(), 9);
  EXPECT_GT(jobs[1].end_time().seconds(), 0);
  const auto models = running.MakeClient().ListModels();
  ASSERT_EQ(models.size(), 1u);
  EXPECT_EQ(models[0].name(), "fake");
  EXPECT_TRUE(models[0].is_default());
  EXPECT_EQ(models[0].defaults().width(), 64);
  EXPECT_GE(models[0].attention_size(), 2);
}

TEST(ServiceTest, ALongListComesInPages) {
  RunningServer running;
  for (int i = 0; i < 5; ++i) running.Generate(SmallClip("clip " + std::to_string(i)));
  const auto stub = v1::VideoGeneration::NewStub(running.MakeChannel());
  const auto list = [&](const v1::ListJobsRequest& request, v1::ListJobsResponse* page) {
    grpc::ClientContext context;
    return stub->ListJobs(&context, request, page).error_code();
  };
  v1::ListJobsRequest request;
  request.set_page_size(2);
  std::string prompts;
  std::string sizes;
  do {
    v1::ListJobsResponse page;
    ASSERT_EQ(list(request, &page), StatusCode::OK);
    for (const v1::Job& job : page.jobs()) prompts += job.prompt().back();
    sizes += std::to_string(page.jobs_size());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  EXPECT_EQ(prompts, "43210") << "newest first, each once";
  EXPECT_EQ(sizes, "221");
  v1::ListJobsResponse page;
  request.set_page_token("x1");
  EXPECT_EQ(list(request, &page), StatusCode::INVALID_ARGUMENT);
  request.set_page_token("");
  for (const int size : {-1, 1001}) {
    request.set_page_size(size);
    EXPECT_EQ(list(request, &page), StatusCode::INVALID_ARGUMENT) << size;
  }
}

TEST(ServiceTest, ManyClientsAtOnceEachGetTheirOwn) {
  FakeOptions fake;
  fake.max_batch = 4;
  RunningServer running(fake);
  std::vector<std::future<Outcome>> all;
  for (int i = 0; i < 12; ++i) {
    all.push_back(std::async(std::launch::async, [&running, i] {
      v1::GenerateVideoRequest request = SmallClip("clip " + std::to_string(i));
      request.set_num_frames(1 + 4 * (i % 4));
      return running.Generate(request);
    }));
  }
  for (int i = 0; i < 12; ++i) {
    const Outcome outcome = all[static_cast<std::size_t>(i)].get();
    ASSERT_EQ(outcome.code, StatusCode::OK) << outcome.message;
    EXPECT_EQ(outcome.resolved.prompt(), "clip " + std::to_string(i));
    EXPECT_EQ(static_cast<int>(DecodeVideo(outcome.bytes).frames.size()), 1 + 4 * (i % 4));
  }
}

}  // namespace
}  // namespace slalom
