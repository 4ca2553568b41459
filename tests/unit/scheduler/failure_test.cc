// What goes wrong stays with the job that it went wrong for.
#include <gtest/gtest.h>

#include "tests/unit/scheduler/scheduler_fixture.h"

namespace slalom {
namespace {

struct Case {
  const char* prompt;
  ErrorCode code;
  const char* message;  // part of it
};

class FailureTest : public SchedulerFixture, public testing::WithParamInterface<Case> {};

TEST_P(FailureTest, FailsThatJobAlone) {
  Start();
  const auto bad = std::make_shared<RecordingSink>();
  JobRequest request = Request(GetParam().prompt, bad);
  request.preview_every = 1;
  scheduler_->Submit(request);
  const auto good = Submit("good");
  ASSERT_TRUE(bad->WaitDone());
  ASSERT_TRUE(good->WaitDone());
  EXPECT_EQ(bad->result().state, JobState::kFailed);
  EXPECT_EQ(bad->code(), GetParam().code);
  EXPECT_NE(std::string(bad->result().error->what()).find(GetParam().message), std::string::npos)
      << bad->result().error->what();
  EXPECT_EQ(bad->done(), 1);
  EXPECT_EQ(bad->violations(), 0);
  EXPECT_EQ(good->result().state, JobState::kSucceeded);
  EXPECT_TRUE(scheduler_->healthy());
}

INSTANTIATE_TEST_SUITE_P(
    Cases, FailureTest,
    testing::Values(Case{"oom@begin", ErrorCode::kResourceExhausted, "out of device memory"},
                    Case{"oom@step1", ErrorCode::kResourceExhausted, "at step1"},
                    Case{"oom@step3", ErrorCode::kResourceExhausted, "at step3"},
                    Case{"oom@decode2", ErrorCode::kResourceExhausted, "at decode2"},
                    Case{"oom@preview", ErrorCode::kResourceExhausted, "at preview"},
                    Case{"nan@step2", ErrorCode::kInternal, "non-finite latent at step2"},
                    Case{"nan@step4", ErrorCode::kInternal, "layers 0 to 1"},
                    Case{"error@decode1", ErrorCode::kInternal, "ordered to fail"},
                    Case{"throw@begin", ErrorCode::kInternal, "ordered to throw"},
                    Case{"throw@step2", ErrorCode::kInternal, "ordered to throw"},
                    Case{"throw@decode3", ErrorCode::kInternal, "ordered to throw"}));

class FailureInBatchTest : public SchedulerFixture {
 protected:
  // "a", then the given job, then "c", sharing their steps.
  void RunWith(const std::string& prompt) {
    fake_.max_batch = options_.limits.max_batch = 3;
    KnowThatSharingPays();
    journal().HoldAt("step a", 1);
    Start();
    a_ = Submit("a");
    ASSERT_TRUE(journal().WaitFor("step a"));
    bad_ = Submit(prompt);
    c_ = Submit("c");
    journal().Release();
    for (const auto& sink : {a_, bad_, c_}) ASSERT_TRUE(sink->WaitDone());
    EXPECT_EQ(a_->result().state, JobState::kSucceeded);
    EXPECT_EQ(c_->result().state, JobState::kSucceeded);
    EXPECT_EQ(a_->frames(), 9);
    EXPECT_EQ(c_->frames(), 9);
  }

  std::shared_ptr<RecordingSink> a_, bad_, c_;
};

TEST_F(FailureInBatchTest, NonFiniteValuesFailOneOfTheBatch) {
  RunWith("nan@step2");
  EXPECT_EQ(bad_->code(), ErrorCode::kInternal);
  EXPECT_EQ(journal().CountStartingWith("step a+nan@step2"), 2u);
  EXPECT_GE(journal().CountStartingWith("step a+c"), 1u);
}

TEST_F(FailureInBatchTest, OutOfMemoryFailsTheOneAtFault) {
  RunWith("oom@step3");
  EXPECT_EQ(bad_->code(), ErrorCode::kResourceExhausted);
}

TEST_F(FailureInBatchTest, WhatFailsOnlyTogetherIsSteppedAlone) {
  RunWith("oom@batch");
  EXPECT_EQ(bad_->result().state, JobState::kSucceeded);
  EXPECT_EQ(journal().CountStartingWith("step oom@batch"), 4u);
}

class SinkFailureTest : public SchedulerFixture {};

TEST_F(SinkFailureTest, ASinkThatThrowsFailsItsJob) {
  Start();
  const auto sink = std::make_shared<RecordingSink>();
  sink->FailAtStep(2);
  scheduler_->Submit(Request("a", sink));
  const auto good = Submit("good");
  ASSERT_TRUE(sink->WaitDone());
  EXPECT_EQ(sink->code(), ErrorCode::kDataLoss);
  EXPECT_EQ(sink->violations(), 0);
  ASSERT_TRUE(good->WaitDone());
  EXPECT_EQ(good->result().state, JobState::kSucceeded);
}

class DeviceLossTest : public SchedulerFixture, public testing::WithParamInterface<const char*> {};

TEST_P(DeviceLossTest, FailsItsJobsAndReadiness) {
  Start();
  const auto stalled = Submit("stalled", Priority::kNormal, 1);
  ASSERT_TRUE(stalled->WaitFrames(1));
  journal().Hold();
  const auto bad = Submit(GetParam());
  const auto queued = Submit("queued");
  journal().Release();
  for (const auto& sink : {stalled, bad, queued}) {
    ASSERT_TRUE(sink->WaitDone());
    EXPECT_EQ(sink->done(), 1);
  }
  EXPECT_EQ(stalled->code(), ErrorCode::kUnavailable);
  EXPECT_EQ(bad->code(), ErrorCode::kUnavailable);
  EXPECT_EQ(queued->code(), ErrorCode::kUnavailable);
  EXPECT_FALSE(scheduler_->healthy());
  EXPECT_FALSE(scheduler_->Stats().devices[0].healthy);
  EXPECT_EQ(Refusal(Request("late", std::make_shared<RecordingSink>())).first,
            ErrorCode::kUnavailable);
}

INSTANTIATE_TEST_SUITE_P(Places, DeviceLossTest,
                         testing::Values("lost@begin", "lost@step2", "lost@decode1"));

// --- Two devices, of which one may be lost ---

class TwoDevicesTest : public SchedulerFixture {
 protected:
  // cuda:0 hears the word "lost"; cuda:1 too, unless it is a lasting one.
  void StartTwo(bool second_lasts) {
    std::vector<std::unique_ptr<Pipeline>> pipelines;
    for (int i = 0; i < 2; ++i) {
      FakeOptions fake = fake_;
      fake.device = {Device::Kind::kCuda, i};
      fake.lasting = i == 1 && second_lasts;
      pipelines.push_back(std::make_unique<FakePipeline>(fake));
    }
    Start(std::move(pipelines));
  }

  // A job on cuda:0, which is held at its beginning until the journal is released.
  std::shared_ptr<RecordingSink> RunOnTheFirst(const std::string& prompt) {
    journal().Hold();
    for (const std::string& name : {prompt, prompt + " again"}) {
      const auto sink = Submit(name);
      EXPECT_TRUE(journal().WaitFor("begin " + name));
      // Else it keeps cuda:1 busy, and the next one has nowhere else to go.
      if (scheduler_->Find(name)->device == "cuda:0") return sink;
    }
    return nullptr;
  }
};

class LostDeviceTest : public TwoDevicesTest, public testing::WithParamInterface<const char*> {};

TEST_P(LostDeviceTest, ItsJobsGoOnOnAnother) {
  StartTwo(true);
  const auto bad = RunOnTheFirst(GetParam());
  ASSERT_NE(bad, nullptr);
  journal().Release();
  ASSERT_TRUE(bad->WaitDone());
  EXPECT_EQ(bad->result().state, JobState::kSucceeded);
  EXPECT_EQ(bad->frames(), 9);  // each once, in order: RecordingSink counts other things
  EXPECT_EQ(bad->violations(), 0);
  EXPECT_EQ(bad->done(), 1);
  EXPECT_FALSE(scheduler_->healthy());
  EXPECT_TRUE(scheduler_->accepting());
  EXPECT_EQ(scheduler_->Stats().requeued, 1);
  const auto good = Submit("good");
  ASSERT_TRUE(good->WaitDone());
  EXPECT_EQ(good->result().state, JobState::kSucceeded);
  EXPECT_EQ(scheduler_->Find("good")->device, "cuda:1");
}

INSTANTIATE_TEST_SUITE_P(Places, LostDeviceTest,
                         testing::Values("lost@begin", "lost@step2", "lost@decode1",
                                         "lost@decode2"));

TEST_F(TwoDevicesTest, AJobThatLosesEveryDeviceIsNotTriedForEver) {
  StartTwo(false);
  const auto bad = Submit("lost@step2");
  ASSERT_TRUE(bad->WaitDone());
  EXPECT_EQ(bad->code(), ErrorCode::kUnavailable);
  EXPECT_EQ(bad->done(), 1);
  EXPECT_EQ(journal().CountStartingWith("begin lost@step2"), 2u);
}

TEST_F(TwoDevicesTest, ACancelFindsAJobThatWentBackToTheQueue) {
  StartTwo(true);
  const auto bad = RunOnTheFirst("lost@step1");
  ASSERT_NE(bad, nullptr);
  scheduler_->Cancel(bad->accepted().id);
  journal().Release();
  ASSERT_TRUE(bad->WaitDone());
  EXPECT_EQ(bad->code(), ErrorCode::kCancelled);
  EXPECT_GE(scheduler_->Stats().cancel_to_free.count, 1);
}

}  // namespace
}  // namespace slalom
