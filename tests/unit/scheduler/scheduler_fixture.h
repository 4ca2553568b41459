// A scheduler over fake pipelines, and short ways to fill it.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "scheduler/scheduler.h"
#include "tests/unit/scheduler/fake_pipeline.h"
#include "tests/unit/scheduler/recording_sink.h"

namespace slalom {

class SchedulerFixture : public testing::Test {
 protected:
  ~SchedulerFixture() override {
    fake_.journal->Release();
    scheduler_.reset();
    EXPECT_EQ(fake_.journal->live_generations(), 0);
    EXPECT_EQ(fake_.journal->thread_violations(), 0);
  }

  // One device with one model, set up by fake_ and options_.
  void Start() {
    std::vector<std::unique_ptr<Pipeline>> pipelines;
    pipelines.push_back(std::make_unique<FakePipeline>(fake_));
    Start(std::move(pipelines));
  }
  void Start(std::vector<std::unique_ptr<Pipeline>> pipelines) {
    scheduler_ = std::make_unique<Scheduler>(std::move(pipelines), options_);
  }

  // Before Start: the scheduler knows, too well for any stall of this machine to change it, that to
  // begin costs little and a step much, so that queued jobs begin early to share one.
  void KnowThatSharingPays() {
    CostModel known;
    const int kind = known.Kind(fake_.description, fake_.name, AttentionKind::kDense);
    for (int i = 0; i < 100; ++i) {
      known.ObserveBegin(kind, fake_.cost, 1e-4);
      known.ObserveStep(kind, fake_.cost, 1, 1.0);
      known.ObserveStep(kind, fake_.cost, 2, 1.2);
    }
    options_.cost_state = known.Save();
  }

  JobRequest Request(const std::string& prompt, std::shared_ptr<JobSink> sink) {
    ClipRequest clip;
    clip.prompt = prompt;
    JobRequest request;
    request.spec = scheduler_->pipeline("").Resolve(clip);
    request.sink = std::move(sink);
    return request;
  }

  std::shared_ptr<RecordingSink> Submit(const std::string& prompt,
                                        Priority priority = Priority::kNormal,
                                        int room = RecordingSink::kNoLimit) {
    auto sink = std::make_shared<RecordingSink>(room);
    JobRequest request = Request(prompt, sink);
    request.id = prompt;
    request.priority = priority;
    scheduler_->Submit(std::move(request));
    return sink;
  }

  // The code and message with which Submit refuses; empty when it does not.
  std::pair<std::optional<ErrorCode>, std::string> Refusal(JobRequest request) {
    try {
      scheduler_->Submit(std::move(request));
      return {};
    } catch (const Error& error) {
      return {error.code(), error.what()};
    }
  }

  FakeJournal& journal() { return *fake_.journal; }

  FakeOptions fake_;
  SchedulerOptions options_;
  std::unique_ptr<Scheduler> scheduler_;
};

inline SchedulerClock::time_point In(std::chrono::milliseconds delay) {
  return SchedulerClock::now() + delay;
}

}  // namespace slalom
