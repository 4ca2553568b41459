#include "scheduler/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <thread>

#include "tests/unit/scheduler/scheduler_fixture.h"

namespace slalom {
namespace {

using std::chrono::milliseconds;

class SchedulerTest : public SchedulerFixture {};

TEST_F(SchedulerTest, OneJobRunsToItsEnd) {
  Start();
  const auto sink = Submit("a");
  ASSERT_TRUE(sink->WaitDone());
  EXPECT_EQ(sink->result().state, JobState::kSucceeded);
  EXPECT_FALSE(sink->result().error);
  EXPECT_EQ(sink->frames(), 9);
  EXPECT_EQ(sink->result().frames, 9);
  EXPECT_EQ(sink->violations(), 0);
  const std::vector<std::string> expected = {"begin a", "step a",   "step a",   "step a",
                                             "step a",  "decode a", "decode a", "decode a"};
  EXPECT_EQ(journal().lines(), expected);
}

TEST_F(SchedulerTest, ProgressTellsStagesStepsAndFrames) {
  fake_.cost.step_seconds = 1.0;
  Start();
  const auto sink = Submit("a");
  ASSERT_TRUE(sink->WaitDone());
  const std::vector<Progress> progress = sink->progress();
  ASSERT_EQ(progress.size(), 1u + 1 + 4 + 3);
  EXPECT_EQ(progress[0].stage, JobState::kEncoding);
  EXPECT_DOUBLE_EQ(progress[0].eta_seconds, 4.0);
  for (int i = 0; i <= 4; ++i) {
    const Progress& step = progress[static_cast<std::size_t>(1 + i)];
    EXPECT_EQ(step.stage, JobState::kDenoising);
    EXPECT_EQ(step.step, i);
    EXPECT_EQ(step.steps, 4);
  }
  EXPECT_EQ(progress[6].stage, JobState::kDecoding);
  EXPECT_EQ(progress[6].frames, 1);
  EXPECT_EQ(progress[8].frames, 9);
  EXPECT_EQ(progress[8].num_frames, 9);
}

TEST_F(SchedulerTest, SparsityComesFromTheGeneration) {
  Start();
  const auto sink = std::make_shared<RecordingSink>();
  JobRequest request = Request("a", sink);
  request.spec.attention = AttentionKind::kSla;
  scheduler_->Submit(request);
  ASSERT_TRUE(sink->WaitDone());
  EXPECT_DOUBLE_EQ(sink->progress().back().sparsity, 0.6);
  EXPECT_EQ(sink->result().statistics.layer_sparsity.size(), 2u);
}

TEST_F(SchedulerTest, ResultSaysWhereTheTimeWent) {
  fake_.begin_time = milliseconds(5);
  fake_.step_time = milliseconds(10);
  fake_.decode_time = milliseconds(5);
  Start();
  const auto sink = Submit("a");
  ASSERT_TRUE(sink->WaitDone());
  const JobResult result = sink->result();
  EXPECT_GE(result.begin_seconds, 0.005);
  EXPECT_GE(result.denoise_seconds, 0.040);
  EXPECT_GE(result.decode_seconds, 0.015);
  EXPECT_DOUBLE_EQ(result.device_seconds,
                   result.begin_seconds + result.denoise_seconds + result.decode_seconds);
  const double rounding = 1e-9;
  EXPECT_GE(result.total_seconds + rounding, result.queue_seconds + result.device_seconds);
  EXPECT_FALSE(result.cancel_to_free_seconds);
  EXPECT_GE(scheduler_->Stats().devices[0].busy_seconds + rounding, result.device_seconds);
}

TEST_F(SchedulerTest, HandlesOfEndedJobsKeepNoCheckpoint) {
  Start();
  const auto sink = std::make_shared<RecordingSink>();  // it has a handle
  JobRequest request = Request("a", sink);
  request.checkpoint_seconds = 1e-9;
  scheduler_->Submit(std::move(request));
  ASSERT_TRUE(sink->WaitDone());
  EXPECT_GT(sink->checkpoints(), 0);
  const auto made = sink->checkpoint();
  const auto give_up = SchedulerClock::now() + std::chrono::seconds(10);
  while (!made.expired() && SchedulerClock::now() < give_up) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  EXPECT_TRUE(made.expired());
}

TEST_F(SchedulerTest, FirstComeFirstServed) {
  journal().Hold();
  Start();
  const auto a = Submit("a");
  ASSERT_TRUE(journal().WaitFor("begin a"));
  const auto b = Submit("b");
  const auto c = Submit("c");
  journal().Release();
  for (const auto& sink : {a, b, c}) ASSERT_TRUE(sink->WaitDone());
  const std::vector<std::string> lines = journal().lines();
  EXPECT_TRUE(std::is_sorted(lines.begin(), lines.end(),
                             [](const auto& x, const auto& y) { return x.back() < y.back(); }));
}

TEST_F(SchedulerTest, HigherPriorityPassesBetweenSteps) {
  journal().Hold();
  Start();
  const auto low = Submit("low", Priority::kLow);
  ASSERT_TRUE(journal().WaitFor("begin low"));
  const auto high = Submit("high", Priority::kHigh);
  EXPECT_EQ(high->accepted().queue_position, 0);
  const auto normal = Submit("normal");
  EXPECT_EQ(normal->accepted().queue_position, 1);
  journal().Release();
  for (const auto& sink : {low, high, normal}) ASSERT_TRUE(sink->WaitDone());
  std::vector<std::string> starts;
  for (const std::string& line : journal().lines()) {
    if (line.starts_with("decode") && (starts.empty() || starts.back() != line)) {
      starts.push_back(line);
    }
  }
  EXPECT_EQ(starts, (std::vector<std::string>{"decode high", "decode normal", "decode low"}));
}

TEST_F(SchedulerTest, JobsShareBatches) {
  fake_.max_batch = 4;
  KnowThatSharingPays();
  options_.limits.max_batch = 3;
  std::vector<int> sizes;
  options_.on_step = [&](const StepObservation& step) { sizes.push_back(step.batch_size); };
  journal().HoldAt("step a", 1);
  Start();
  const auto a = Submit("a");
  ASSERT_TRUE(journal().WaitFor("step a"));
  const auto b = Submit("b");
  const auto c = Submit("c");
  journal().Release();
  for (const auto& sink : {a, b, c}) {
    ASSERT_TRUE(sink->WaitDone());
    EXPECT_EQ(sink->frames(), 9);
  }
  // They join between two steps, and go on when the first has left.
  EXPECT_EQ(journal().CountStartingWith("step a+b+c"), 3u);
  scheduler_.reset();
  EXPECT_EQ(sizes, (std::vector<int>{1, 3, 3, 3, 2}));
}

TEST_F(SchedulerTest, PreviewsComeAsOftenAsAskedFor) {
  Start();
  const auto sink = std::make_shared<RecordingSink>();
  JobRequest request = Request("a", sink);
  request.spec.steps = 8;  // none after the last: the frames come next
  request.preview_every = 2;
  scheduler_->Submit(request);
  ASSERT_TRUE(sink->WaitDone());
  EXPECT_EQ(sink->previews(), 3);
}

// --- Cancel ---

TEST_F(SchedulerTest, CancelWhileQueuedNeedsNoWorker) {
  journal().Hold();
  Start();
  const auto running = Submit("running");
  ASSERT_TRUE(journal().WaitFor("begin running"));
  const auto queued = Submit("queued");
  EXPECT_TRUE(scheduler_->Cancel("queued"));
  ASSERT_TRUE(queued->WaitDone());  // although the only worker is still inside Begin
  EXPECT_EQ(queued->result().state, JobState::kCancelled);
  EXPECT_EQ(queued->code(), ErrorCode::kCancelled);
  EXPECT_EQ(running->done(), 0);
  journal().Release();
  ASSERT_TRUE(running->WaitDone());
  EXPECT_EQ(journal().CountStartingWith("begin queued"), 0u);
}

TEST_F(SchedulerTest, CancelWhileSteppingTakesNoFurtherStep) {
  journal().HoldAt("step a", 2);
  Start();
  const auto sink = std::make_shared<RecordingSink>();
  const JobHandle handle = scheduler_->Submit(Request("a", sink));
  ASSERT_TRUE(journal().WaitFor("step a", 2));
  handle.Cancel();
  handle.Cancel(Error(ErrorCode::kInternal, "the first reason wins"));
  journal().Release();
  ASSERT_TRUE(sink->WaitDone());
  EXPECT_EQ(journal().CountStartingWith("step a"), 2u);
  EXPECT_EQ(sink->code(), ErrorCode::kCancelled);
  EXPECT_EQ(journal().live_generations(), 0);
  EXPECT_EQ(sink->violations(), 0);
}

TEST_F(SchedulerTest, TheDeviceIsFreeWithinOneStepOfACancel) {
  fake_.step_time = milliseconds(50);
  Start();
  const auto a = std::make_shared<RecordingSink>();
  JobRequest request = Request("a", a);
  request.spec.steps = 100;
  const JobHandle handle = scheduler_->Submit(request);
  const auto b = Submit("b");
  ASSERT_TRUE(journal().WaitFor("step a", 2));
  const std::size_t steps = journal().CountStartingWith("step a");
  handle.Cancel();
  ASSERT_TRUE(journal().WaitFor("begin b"));
  EXPECT_LE(journal().CountStartingWith("step a"), steps + 1);
  ASSERT_TRUE(a->WaitDone());
  ASSERT_TRUE(b->WaitDone());
  ASSERT_TRUE(a->result().cancel_to_free_seconds);
  EXPECT_LT(*a->result().cancel_to_free_seconds, 2.0);  // of 5 s; a busy machine is late
  EXPECT_EQ(b->result().state, JobState::kSucceeded);
}

TEST_F(SchedulerTest, CancelWhileDecoding) {
  Start();
  const auto sink = Submit("a", Priority::kNormal, 1);
  ASSERT_TRUE(sink->WaitFrames(1));
  EXPECT_TRUE(scheduler_->Cancel("a"));
  ASSERT_TRUE(sink->WaitDone());
  EXPECT_EQ(sink->code(), ErrorCode::kCancelled);
  EXPECT_EQ(sink->frames(), 1);
  EXPECT_EQ(journal().live_generations(), 0);
}

TEST_F(SchedulerTest, CancelLeavesBatchMatesUntouched) {
  fake_.max_batch = 2;
  KnowThatSharingPays();
  options_.limits.max_batch = 2;
  journal().HoldAt("step a", 1);
  Start();
  const auto a = Submit("a");
  ASSERT_TRUE(journal().WaitFor("step a"));
  const auto b = Submit("b");
  journal().HoldAt("step a+b", 2);
  journal().Release();
  ASSERT_TRUE(journal().WaitFor("step a+b", 2));
  scheduler_->Cancel("b");
  journal().Release();
  ASSERT_TRUE(b->WaitDone());
  ASSERT_TRUE(a->WaitDone());
  EXPECT_EQ(b->code(), ErrorCode::kCancelled);
  EXPECT_EQ(a->result().state, JobState::kSucceeded);
  EXPECT_EQ(journal().CountStartingWith("step a+b"), 2u);
  EXPECT_EQ(journal().CountStartingWith("step a"), 4u);
}

TEST_F(SchedulerTest, CancelOfUnknownOrFinishedJobsDoesNothing) {
  Start();
  EXPECT_FALSE(scheduler_->Cancel("never"));
  const auto sink = std::make_shared<RecordingSink>();
  const JobHandle handle = scheduler_->Submit(Request("a", sink));
  ASSERT_TRUE(sink->WaitDone());
  EXPECT_FALSE(scheduler_->Cancel(handle.id()));
  scheduler_.reset();
  handle.Cancel();
  handle.Wake();
  EXPECT_EQ(sink->done(), 1);
}

// --- Slow clients ---

TEST_F(SchedulerTest, ASlowClientSlowsOnlyItself) {
  Start();
  const auto slow = Submit("slow", Priority::kNormal, 1);
  const auto fast = Submit("fast");
  ASSERT_TRUE(fast->WaitDone());
  EXPECT_EQ(fast->result().state, JobState::kSucceeded);
  EXPECT_EQ(slow->done(), 0);
  EXPECT_EQ(slow->frames(), 1);
  slow->MakeRoom(1);
  ASSERT_TRUE(slow->WaitFrames(5));
  EXPECT_EQ(slow->done(), 0);
  slow->MakeRoom(1);
  ASSERT_TRUE(slow->WaitDone());
  EXPECT_EQ(slow->result().state, JobState::kSucceeded);
  EXPECT_EQ(slow->frames(), 9);
}

// Says no, and has room again before the worker can have gone to sleep over the answer.
class HastySink : public RecordingSink {
 public:
  void OnAccepted(const JobHandle& handle, const JobStatus& status) override {
    handle_ = handle;
    RecordingSink::OnAccepted(handle, status);
  }
  bool WantsFrames() const noexcept override {
    if (frames() != 1 || refused_) return true;
    refused_ = true;
    handle_.Wake();
    return false;
  }

 private:
  JobHandle handle_;
  mutable bool refused_ = false;  // the worker's alone
};

TEST_F(SchedulerTest, NoWakeIsLost) {
  Start();
  const auto sink = std::make_shared<HastySink>();
  scheduler_->Submit(Request("a", sink));
  ASSERT_TRUE(sink->WaitDone());
  EXPECT_EQ(sink->result().state, JobState::kSucceeded);
}

TEST_F(SchedulerTest, AClientThatNeverReadsLosesItsJob) {
  options_.stall_seconds = 0.05;
  Start();
  const auto sink = Submit("a", Priority::kNormal, 0);
  ASSERT_TRUE(sink->WaitDone());
  EXPECT_EQ(sink->code(), ErrorCode::kCancelled);
  EXPECT_GE(sink->result().total_seconds, 0.05);
}

// --- Admission ---

TEST_F(SchedulerTest, AFullQueueRefuses) {
  options_.max_queue = 2;
  journal().Hold();
  Start();
  const auto a = Submit("a");
  ASSERT_TRUE(journal().WaitFor("begin a"));
  const auto b = Submit("b");
  const auto c = Submit("c");
  const auto [code, message] = Refusal(Request("d", std::make_shared<RecordingSink>()));
  EXPECT_EQ(code, ErrorCode::kResourceExhausted);
  EXPECT_NE(message.find("at most 2"), std::string::npos) << message;
  EXPECT_THROW(scheduler_->Submit(Request("d", std::make_shared<RecordingSink>())), QueueFull);
  EXPECT_EQ(scheduler_->Stats().queued[static_cast<std::size_t>(Priority::kNormal)], 2);
  scheduler_->Cancel("b");
  ASSERT_TRUE(b->WaitDone());
  const auto d = Submit("d");
  journal().Release();
  for (const auto& sink : {a, c, d}) ASSERT_TRUE(sink->WaitDone());
}

TEST_F(SchedulerTest, AClipThatNeverFitsIsRefused) {
  options_.limits.memory_bytes = 100 << 20;
  fake_.cost.waiting_bytes = 1 << 20;
  fake_.cost.decode_bytes = 100 << 20;
  Start();
  EXPECT_EQ(Refusal(Request("a", std::make_shared<RecordingSink>())).first,
            ErrorCode::kResourceExhausted);
}

TEST_F(SchedulerTest, ADeadlineThatCannotBeMetIsRefusedWithTheEstimate) {
  fake_.cost.step_seconds = 10;
  journal().Hold();
  Start();
  const auto first = std::make_shared<RecordingSink>();
  JobRequest urgent = Request("a", first);
  urgent.deadline = In(std::chrono::seconds(50));  // earlier than the next one's
  scheduler_->Submit(urgent);
  ASSERT_TRUE(journal().WaitFor("begin a"));
  const auto sink = std::make_shared<RecordingSink>();
  JobRequest request = Request("b", sink);
  request.deadline = In(std::chrono::seconds(60));
  const auto [code, message] = Refusal(request);
  EXPECT_EQ(code, ErrorCode::kDeadlineExceeded);
  EXPECT_NE(message.find("about 80 s (40 s of it waiting)"), std::string::npos) << message;
  request.deadline = In(std::chrono::seconds(90));
  EXPECT_EQ(Refusal(request).first, std::nullopt);
  EXPECT_NEAR(sink->accepted().eta_seconds, 80, 1e-9);
  EXPECT_EQ(sink->accepted().queue_position, 1);
  journal().Release();
  ASSERT_TRUE(first->WaitDone());
  ASSERT_TRUE(sink->WaitDone());
}

TEST_F(SchedulerTest, AJobPastItsDeadlineEndsAtTheNextStep) {
  fake_.step_time = milliseconds(20);
  Start();
  const auto sink = std::make_shared<RecordingSink>();
  JobRequest request = Request("a", sink);
  request.spec.steps = 100;
  request.deadline = In(milliseconds(70));
  scheduler_->Submit(request);
  ASSERT_TRUE(sink->WaitDone());
  EXPECT_EQ(sink->code(), ErrorCode::kDeadlineExceeded);
  EXPECT_EQ(sink->result().state, JobState::kFailed);
  EXPECT_LE(journal().CountStartingWith("step a"), 5u);
}

TEST_F(SchedulerTest, AQueuedJobExpiresWithoutAWorker) {
  journal().Hold();
  Start();
  const auto running = Submit("running");
  ASSERT_TRUE(journal().WaitFor("begin running"));
  const auto sink = std::make_shared<RecordingSink>();
  JobRequest request = Request("a", sink);
  request.deadline = In(milliseconds(20));
  scheduler_->Submit(request);
  ASSERT_TRUE(sink->WaitDone());
  EXPECT_EQ(sink->code(), ErrorCode::kDeadlineExceeded);
}

TEST_F(SchedulerTest, LiveIdsAreUnique) {
  journal().Hold();
  Start();
  const auto a = Submit("a");
  JobRequest request = Request("a", std::make_shared<RecordingSink>());
  request.id = "a";
  EXPECT_EQ(Refusal(request).first, ErrorCode::kAlreadyExists);
  journal().Release();
  ASSERT_TRUE(a->WaitDone());
  EXPECT_EQ(Refusal(request).first, std::nullopt);
}

class RefusingSink : public RecordingSink {
 public:
  void OnAccepted(const JobHandle&, const JobStatus&) override {
    throw Error(ErrorCode::kAborted, "the client is gone already");
  }
};

TEST_F(SchedulerTest, ASinkMayRefuseItsJob) {
  Start();
  const auto sink = std::make_shared<RefusingSink>();
  EXPECT_EQ(Refusal(Request("a", sink)).first, ErrorCode::kAborted);
  EXPECT_TRUE(scheduler_->List().empty());
  EXPECT_TRUE(scheduler_->Drain(In(milliseconds(0))));
  EXPECT_EQ(sink->done(), 0);
  EXPECT_EQ(journal().lines().size(), 0u);
}

TEST_F(SchedulerTest, UnknownModelsAreNotFound) {
  Start();
  JobRequest request = Request("a", std::make_shared<RecordingSink>());
  request.model = "wan9";
  const auto [code, message] = Refusal(request);
  EXPECT_EQ(code, ErrorCode::kNotFound);
  EXPECT_NE(message.find("fake"), std::string::npos) << message;
}

// --- Questions ---

TEST_F(SchedulerTest, FindAndListKnowLiveAndFinishedJobs) {
  options_.keep_finished = 1;
  fake_.cost.step_seconds = 2.0;
  journal().Hold();
  Start();
  const auto a = Submit("a", Priority::kLow);
  ASSERT_TRUE(journal().WaitFor("begin a"));
  const auto b = Submit("b", Priority::kLow);
  const auto c = Submit("c");
  const std::vector<JobStatus> live = scheduler_->List();
  ASSERT_EQ(live.size(), 3u);
  EXPECT_EQ(live[0].id, "c");
  EXPECT_EQ(live[1].id, "a");
  EXPECT_EQ(live[1].state, JobState::kEncoding);
  EXPECT_EQ(live[1].device, "cpu");
  EXPECT_EQ(live[2].id, "b");
  EXPECT_EQ(live[2].queue_position, 2);
  for (const JobStatus& status : live) {  // List counts in one pass what Find counts singly
    const auto found = scheduler_->Find(status.id);
    ASSERT_TRUE(found);
    EXPECT_EQ(found->queue_position, status.queue_position);
    EXPECT_DOUBLE_EQ(found->eta_seconds, status.eta_seconds);
  }
  const std::vector<JobPlace> places = scheduler_->Places();
  ASSERT_EQ(places.size(), live.size());
  for (std::size_t i = 0; i < live.size(); ++i) {
    EXPECT_EQ(places[i].id, live[i].id);
    EXPECT_EQ(places[i].queued, live[i].state == JobState::kQueued);
    EXPECT_EQ(places[i].queue_position, live[i].queue_position);
    EXPECT_DOUBLE_EQ(places[i].eta_seconds, live[i].eta_seconds);
  }
  EXPECT_NEAR(live[2].eta_seconds, 3 * 4 * 2.0, 1e-9);
  EXPECT_EQ(scheduler_->Stats().in_flight, 1);
  journal().Release();
  EXPECT_TRUE(scheduler_->Drain(In(std::chrono::seconds(10))));
  EXPECT_EQ(scheduler_->Find("a"), std::nullopt);  // forgotten: only the newest is kept
  const auto status = scheduler_->Find("b");
  ASSERT_TRUE(status);
  EXPECT_EQ(status->state, JobState::kSucceeded);
  EXPECT_EQ(status->frames, 9);
  EXPECT_EQ(scheduler_->List().size(), 1u);
}

// --- Draining ---

TEST_F(SchedulerTest, DrainFinishesWhatItCan) {
  fake_.step_time = milliseconds(1);
  Start();
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 5; ++i) sinks.push_back(Submit("job" + std::to_string(i)));
  EXPECT_TRUE(scheduler_->Drain(In(std::chrono::seconds(10))));
  for (const auto& sink : sinks) {
    ASSERT_EQ(sink->done(), 1);
    EXPECT_EQ(sink->result().state, JobState::kSucceeded);
  }
  EXPECT_FALSE(scheduler_->accepting());
  EXPECT_EQ(Refusal(Request("late", std::make_shared<RecordingSink>())).first,
            ErrorCode::kUnavailable);
}

TEST_F(SchedulerTest, DrainEndsTheRestAtItsDeadline) {
  fake_.step_time = milliseconds(20);
  Start();
  const auto running = std::make_shared<RecordingSink>();
  JobRequest request = Request("running", running);
  request.spec.steps = 100;
  scheduler_->Submit(request);
  const auto queued = Submit("queued");
  const auto stalled = Submit("stalled", Priority::kHigh, 0);
  EXPECT_FALSE(scheduler_->Drain(In(milliseconds(50))));
  for (const auto& sink : {running, queued, stalled}) {
    ASSERT_EQ(sink->done(), 1);
    EXPECT_EQ(sink->code(), ErrorCode::kUnavailable);
    EXPECT_EQ(sink->result().state, JobState::kFailed);
  }
}

// --- Several devices and models ---

TEST_F(SchedulerTest, DevicesShareAModelsQueue) {
  std::vector<std::unique_ptr<Pipeline>> pipelines;
  for (int i = 0; i < 2; ++i) {
    FakeOptions fake = fake_;
    fake.device = {Device::Kind::kCuda, i};
    pipelines.push_back(std::make_unique<FakePipeline>(fake));
  }
  journal().Hold();
  Start(std::move(pipelines));
  EXPECT_EQ(scheduler_->Models().size(), 1u);
  const auto a = Submit("a");
  const auto b = Submit("b");
  ASSERT_TRUE(journal().WaitFor("begin", 2));  // both run at once
  journal().Release();
  ASSERT_TRUE(a->WaitDone());
  ASSERT_TRUE(b->WaitDone());
  EXPECT_NE(scheduler_->Find("a")->device, scheduler_->Find("b")->device);
}

TEST_F(SchedulerTest, ModelsShareADevice) {
  std::vector<std::unique_ptr<Pipeline>> pipelines;
  for (const char* name : {"small", "large"}) {
    FakeOptions fake = fake_;
    fake.name = name;
    pipelines.push_back(std::make_unique<FakePipeline>(fake));
  }
  fake_.max_batch = options_.limits.max_batch = 4;
  Start(std::move(pipelines));
  EXPECT_EQ(scheduler_->Stats().devices.size(), 1u);
  const auto small = Submit("a");
  const auto large = std::make_shared<RecordingSink>();
  JobRequest request = Request("b", large);
  request.model = "large";
  scheduler_->Submit(request);
  ASSERT_TRUE(small->WaitDone());
  ASSERT_TRUE(large->WaitDone());
  EXPECT_EQ(small->accepted().model, "small");
  EXPECT_EQ(large->accepted().model, "large");
  EXPECT_EQ(journal().CountStartingWith("step a+"), 0u);
}

TEST(Scheduler, RefusesImpossibleSetUps) {
  EXPECT_THROW(Scheduler({}, {}), Error);
  std::vector<std::unique_ptr<Pipeline>> twins;
  for (int i = 0; i < 2; ++i) twins.push_back(std::make_unique<FakePipeline>(FakeOptions{}));
  EXPECT_THROW(Scheduler(std::move(twins), {}), Error);
  std::vector<std::unique_ptr<Pipeline>> one;
  one.push_back(std::make_unique<FakePipeline>(FakeOptions{}));
  SchedulerOptions options;
  options.max_queue = 0;
  EXPECT_THROW(Scheduler(std::move(one), options), Error);
}

}  // namespace
}  // namespace slalom
