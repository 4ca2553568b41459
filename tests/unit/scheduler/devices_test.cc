// Several devices, what the scheduler learns about them, and what it tells.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "tests/unit/model/tiny_model.h"
#include "tests/unit/scheduler/scheduler_fixture.h"

namespace slalom {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

class DevicesTest : public SchedulerFixture {
 protected:
  // cuda:0 needs so many seconds a step, cuda:1 one.
  void StartSlowAndFast(double slow_step_seconds) {
    std::vector<std::unique_ptr<Pipeline>> pipelines;
    for (int i = 0; i < 2; ++i) {
      FakeOptions fake = fake_;
      fake.device = {Device::Kind::kCuda, i};
      fake.description = i == 0 ? "slow" : "fast";
      fake.cost.step_work = 1000;
      fake.cost.step_seconds = 1;
      pipelines.push_back(std::make_unique<FakePipeline>(fake));
    }
    CostModel known;
    ClipCost cost = fake_.cost;
    cost.step_work = 1000;
    cost.step_seconds = 1;
    known.ObserveStep(known.Kind("slow", "fake", AttentionKind::kDense), cost, 1,
                      slow_step_seconds);
    options_.cost_state = known.Save();
    Start(std::move(pipelines));
  }
};

TEST_F(DevicesTest, AJobWaitsForTheDeviceThatIsDoneWithItFirst) {
  journal().Hold();
  StartSlowAndFast(10);
  const auto a = Submit("a");
  ASSERT_TRUE(journal().WaitFor("begin a"));
  EXPECT_EQ(scheduler_->Find("a")->device, "cuda:1");  // although the slow one is idle
  const auto b = Submit("b");  // 4 s after 4 s, where the slow one would take 40
  EXPECT_NEAR(b->accepted().eta_seconds, 4, 1e-6);
  EXPECT_FALSE(journal().WaitFor("begin b", 1, milliseconds(300)));
  journal().Release();
  ASSERT_TRUE(a->WaitDone());
  ASSERT_TRUE(b->WaitDone());
  EXPECT_EQ(scheduler_->Find("b")->device, "cuda:1");
}

TEST_F(DevicesTest, ASlowDeviceHelpsWhereTheQueueIsLonger) {
  journal().Hold();
  StartSlowAndFast(3);
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 6; ++i) sinks.push_back(Submit("job" + std::to_string(i)));
  ASSERT_TRUE(journal().WaitFor("begin", 2));
  std::set<std::string> devices;
  for (const JobStatus& job : scheduler_->List()) devices.insert(job.device);
  EXPECT_TRUE(devices.contains("cuda:0"));
  EXPECT_TRUE(devices.contains("cuda:1"));
  journal().Release();
  for (const auto& sink : sinks) ASSERT_TRUE(sink->WaitDone());
}

TEST_F(DevicesTest, WhatWasLearnedSurvivesARestart) {
  fake_.step_time = milliseconds(5);
  fake_.cost.step_work = 100;
  fake_.cost.step_seconds = 1000;  // quite wrong
  Start();
  const auto a = Submit("a");
  EXPECT_NEAR(a->accepted().eta_seconds, 4000, 1);
  ASSERT_TRUE(a->WaitDone());
  const std::string learned = scheduler_->CostState();
  options_.cost_state = learned;
  Start();
  const auto b = Submit("b");
  EXPECT_LT(b->accepted().eta_seconds, 40);
  EXPECT_GT(b->accepted().eta_seconds, 0.019);
  ASSERT_TRUE(b->WaitDone());
}

TEST_F(DevicesTest, WhoCameBeforeAnythingWasKnownIsNotHeldBackByIt) {
  fake_.cost.step_work = 100;
  fake_.cost.step_seconds = 1000;  // quite wrong
  journal().Hold();  // so that nothing is measured before both are there
  Start();
  const auto a = Submit("a");
  const auto early = Submit("early");
  journal().HoldAt("decode a", 3);
  journal().Release();
  ASSERT_TRUE(journal().WaitFor("decode a", 3));
  // It was taken for 4000 s of work; the turns since then have seen steps.
  EXPECT_GT(early->accepted().eta_seconds, 4000);
  EXPECT_LT(scheduler_->Find("early")->eta_seconds, 400);
  journal().Release();
  ASSERT_TRUE(a->WaitDone());
  ASSERT_TRUE(early->WaitDone());
}

TEST_F(DevicesTest, StatsTellErrorsAndCancels) {
  fake_.step_time = milliseconds(2);
  fake_.cost.step_seconds = 1;
  Start();
  ASSERT_TRUE(Submit("a")->WaitDone());
  const auto b = Submit("b", Priority::kNormal, 1);
  ASSERT_TRUE(b->WaitFrames(1));
  scheduler_->Cancel("b");
  ASSERT_TRUE(b->WaitDone());
  const SchedulerStats stats = scheduler_->Stats();
  EXPECT_EQ(stats.cancel_to_free.count, 1);
  EXPECT_GT(stats.cancel_to_free.last, 0);
  EXPECT_EQ(stats.cancel_to_free.last, stats.cancel_to_free.max);
  EXPECT_EQ(stats.eta_error.samples, 1);
  EXPECT_GT(stats.eta_error.bias, 1);  // it promised 4 s and took some ms
  bool steps = false;
  for (const CostError& error : stats.cost_errors) {
    steps |= error.phase == CostPhase::kStep && error.samples == 8 && error.model == "fake";
  }
  EXPECT_TRUE(steps);
}

TEST_F(DevicesTest, TenantsTakeTurnsByWhatTheyUsed) {
  fake_.step_time = milliseconds(3);
  journal().Hold();
  Start();
  const auto submit = [&](const std::string& id, const std::string& tenant) {
    auto sink = std::make_shared<RecordingSink>();
    JobRequest request = Request(id, sink);
    request.id = id;
    request.tenant = tenant;
    scheduler_->Submit(std::move(request));
    return sink;
  };
  std::vector<std::shared_ptr<RecordingSink>> sinks = {submit("hog0", "hog")};
  ASSERT_TRUE(journal().WaitFor("begin hog0"));
  for (int i = 1; i < 5; ++i) sinks.push_back(submit("hog" + std::to_string(i), "hog"));
  sinks.push_back(submit("other", "other"));
  journal().Release();
  for (const auto& sink : sinks) ASSERT_TRUE(sink->WaitDone());
  std::vector<std::string> begun;
  for (const std::string& line : journal().lines()) {
    if (line.starts_with("begin")) begun.push_back(line.substr(6));
  }
  // Last to come, and yet first after what had begun, or after one more.
  const auto place = std::find(begun.begin(), begun.end(), "other") - begun.begin();
  EXPECT_LE(place, 2);
}

// --- With a real pipeline ---

// Keeps the pixels.
class PixelSink : public RecordingSink {
 public:
  void OnFrames(const FrameBatch& frames) override {
    const auto* bytes = frames.pixels.data<std::uint8_t>();
    pixels_.insert(pixels_.end(), bytes, bytes + frames.pixels.NumElements());
    RecordingSink::OnFrames(frames);
  }
  const std::vector<std::uint8_t>& pixels() const { return pixels_; }

 private:
  std::vector<std::uint8_t> pixels_;
};

class TinyModelTest : public testing::Test {
 protected:
  TinyModelTest() {
    folder_ = (std::filesystem::temp_directory_path() /
               ("slalom_scheduler_" + std::to_string(::getpid())))
                  .string();
    TinyModelOptions tiny;
    tiny.steps = 12;
    WriteTinyModel(folder_, tiny);
    PipelineOptions pipeline;
    pipeline.cpu_threads = 1;
    pipeline.max_batch = 4;
    std::vector<std::unique_ptr<Pipeline>> pipelines;
    pipelines.push_back(LoadPipeline(folder_, pipeline));
    SchedulerOptions options;
    options.limits.max_batch = 4;
    options.limits.min_batch_gain = -1;  // share whether it pays or not
    options.on_step = [this](const StepObservation& step) {
      largest_batch_ = std::max(largest_batch_.load(), step.batch_size);
    };
    scheduler_ = std::make_unique<Scheduler>(std::move(pipelines), options);
  }
  ~TinyModelTest() override {
    scheduler_.reset();
    std::filesystem::remove_all(folder_);
  }

  std::shared_ptr<PixelSink> Submit(const std::string& id, std::uint64_t seed) {
    ClipRequest clip;
    clip.prompt = "a prompt";
    clip.seed = seed;
    auto sink = std::make_shared<PixelSink>();
    JobRequest request;
    request.id = id;
    request.spec = scheduler_->pipeline("").Resolve(clip);
    request.sink = sink;
    scheduler_->Submit(std::move(request));
    return sink;
  }

  std::string folder_;
  std::unique_ptr<Scheduler> scheduler_;
  std::atomic<int> largest_batch_{0};
};

TEST_F(TinyModelTest, WhoeverSharesTheBatchAndLeavesItTheBitsAreTheSame) {
  const auto alone = Submit("alone", 7);
  ASSERT_TRUE(alone->WaitDone());
  ASSERT_EQ(alone->result().state, JobState::kSucceeded);
  for (int round = 0; round < 5 && largest_batch_ < 3; ++round) {
    const std::string tag = std::to_string(round);
    const auto mate = Submit("mate" + tag, 1);
    const auto again = Submit("again" + tag, 7);
    const auto third = Submit("third" + tag, 2);
    while (scheduler_->Find("third" + tag)->step < 2 && third->done() == 0) {
      std::this_thread::yield();
    }
    scheduler_->Cancel("mate" + tag);
    scheduler_->Cancel("third" + tag);
    ASSERT_TRUE(again->WaitDone());
    ASSERT_TRUE(mate->WaitDone());
    ASSERT_TRUE(third->WaitDone());
    EXPECT_EQ(again->pixels(), alone->pixels());
  }
  EXPECT_GE(largest_batch_, 2);
}

}  // namespace
}  // namespace slalom
