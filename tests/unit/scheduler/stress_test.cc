// Many clients at once, with random fates: whatever happens, every accepted job ends exactly once.
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <thread>

#include "tests/unit/scheduler/scheduler_fixture.h"

namespace slalom {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

class StressTest : public SchedulerFixture {
 protected:
  void StartTwoDevices() {
    fake_.step_time = microseconds(50);
    fake_.max_batch = options_.limits.max_batch = 3;
    options_.max_queue = 16;
    options_.limits.max_in_flight = 4;
    options_.limits.memory_bytes = 300 << 20;
    fake_.cost.waiting_bytes = 1 << 20;
    fake_.cost.step_bytes = 10 << 20;
    fake_.cost.decode_bytes = 100 << 20;
    std::vector<std::unique_ptr<Pipeline>> pipelines;
    for (int i = 0; i < 2; ++i) {
      FakeOptions fake = fake_;
      fake.device = {Device::Kind::kCuda, i};
      pipelines.push_back(std::make_unique<FakePipeline>(fake));
    }
    Start(std::move(pipelines));
  }

  struct Tally {
    std::vector<std::shared_ptr<RecordingSink>> sinks;
    int refused = 0;
  };

  // One client with up to four jobs at once: cancels some, reads slowly from some.
  Tally Client(unsigned seed, int jobs) {
    static constexpr const char* kPrompts[] = {
        "a", "b", "c", "oom@step2", "nan@step1", "throw@decode2", "oom@batch", "error@begin"};
    std::mt19937 random(seed);
    Tally tally;
    for (int i = 0; i < jobs; ++i) {
      if (tally.sinks.size() >= 4) {
        EXPECT_TRUE(tally.sinks[tally.sinks.size() - 4]->WaitDone());
      }
      auto sink = std::make_shared<RecordingSink>(random() % 4 == 0 ? 1 : RecordingSink::kNoLimit);
      JobRequest request = Request(kPrompts[random() % std::size(kPrompts)], sink);
      request.priority = static_cast<Priority>(random() % kNumPriorities);
      request.spec.steps = 1 + static_cast<int>(random() % 6);
      request.spec.width = random() % 2 == 0 ? 32 : 16;
      request.preview_every = static_cast<int>(random() % 3);
      if (random() % 5 == 0) request.deadline = In(milliseconds(1 + random() % 10));
      try {
        const JobHandle handle = scheduler_->Submit(std::move(request));
        tally.sinks.push_back(sink);
        std::this_thread::sleep_for(microseconds(random() % 1000));
        if (random() % 3 == 0) handle.Cancel();
        sink->MakeRoom(RecordingSink::kNoLimit / 2);
        scheduler_->Find(handle.id());
        scheduler_->List();
        scheduler_->Stats();
      } catch (const Error&) {
        ++tally.refused;
      }
    }
    return tally;
  }

  void RunClients(int clients, int jobs_each, bool drain_early) {
    std::vector<Tally> tallies(static_cast<std::size_t>(clients));
    std::vector<std::thread> threads;
    for (int i = 0; i < clients; ++i) {
      threads.emplace_back([&, i] {
        tallies[static_cast<std::size_t>(i)] = Client(static_cast<unsigned>(i), jobs_each);
      });
    }
    if (drain_early) {
      EXPECT_TRUE(journal().WaitFor("begin", 200));
      scheduler_->Drain(In(milliseconds(2)));
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_TRUE(scheduler_->Drain(In(std::chrono::seconds(30))));
    std::map<JobState, int> ends;
    for (const Tally& tally : tallies) {
      EXPECT_EQ(tally.sinks.size() + static_cast<std::size_t>(tally.refused),
                static_cast<std::size_t>(jobs_each));
      for (const auto& sink : tally.sinks) {
        ASSERT_EQ(sink->done(), 1);
        EXPECT_EQ(sink->violations(), 0);
        const JobResult result = sink->result();
        ++ends[result.state];
        EXPECT_EQ(result.state == JobState::kSucceeded, !result.error);
        if (!result.error) {
          EXPECT_EQ(result.frames, 9);
        }
      }
    }
    EXPECT_GT(ends[JobState::kSucceeded], 0);
    EXPECT_GT(ends[JobState::kFailed], 0);
    EXPECT_GT(ends[JobState::kCancelled], 0);
    EXPECT_EQ(scheduler_->Stats().in_flight, 0);
  }
};

TEST_F(StressTest, EveryJobEndsOnce) {
  StartTwoDevices();
  RunClients(8, 150, false);
}

TEST_F(StressTest, EveryJobEndsOnceWhenDrainedInBetween) {
  StartTwoDevices();
  RunClients(8, 150, true);
}

TEST_F(StressTest, DestructionEndsWhatIsLeft) {
  for (int round = 0; round < 20; ++round) {
    StartTwoDevices();
    std::vector<std::shared_ptr<RecordingSink>> sinks;
    for (int i = 0; i < 6; ++i) sinks.push_back(Submit("job" + std::to_string(i)));
    std::this_thread::sleep_for(microseconds(100 * round));
    scheduler_.reset();
    for (const auto& sink : sinks) ASSERT_EQ(sink->done(), 1);
  }
}

}  // namespace
}  // namespace slalom
