#include "scheduler/policy.h"

#include <gtest/gtest.h>

#include <string>

namespace slalom {
namespace {

using Kind = Action::Kind;
using Phase = JobView::Phase;
using std::chrono::seconds;

const SchedulerClock::time_point kNow{seconds(1000)};
constexpr std::size_t kMiB = 1 << 20;

JobView Make(Phase phase, std::uint64_t sequence, Priority priority = Priority::kNormal) {
  JobView job;
  job.phase = phase;
  job.sequence = sequence;
  job.rank = static_cast<double>(sequence);
  job.arrival = kNow;
  job.priority = priority;
  job.batch_key = "small";
  job.likely_key = "small";
  job.max_batch = 8;
  job.steps_left = phase == Phase::kQueued || phase == Phase::kStepping ? 10 : 0;
  job.cost.begin_seconds = 1;
  job.cost.step_seconds = 2;
  job.cost.decode_seconds = 4;
  job.cost.waiting_bytes = 1 * kMiB;
  job.cost.step_bytes = 10 * kMiB;
  job.cost.decode_bytes = 100 * kMiB;
  return job;
}

JobView Stalled(Phase phase, std::uint64_t sequence) {
  JobView job = Make(phase, sequence);
  job.wants_frames = false;
  return job;
}

std::string Plan(const std::vector<JobView>& jobs, const PolicyLimits& limits = {}) {
  const Action action = Policy::Plan(jobs, kNow, limits);
  std::string text;
  switch (action.kind) {
    case Kind::kWait:
      text = "wait";
      break;
    case Kind::kBegin:
      text = "begin";
      break;
    case Kind::kDenoise:
      text = "denoise";
      break;
    case Kind::kDecode:
      text = "decode";
      break;
  }
  for (const std::size_t i : action.jobs) text.append(" ").append(std::to_string(i));
  return text;
}

PolicyLimits Batches(int max_batch) {
  PolicyLimits limits;
  limits.max_batch = max_batch;
  return limits;
}

PolicyLimits Memory(std::size_t mib) {
  PolicyLimits limits;
  limits.memory_bytes = mib * kMiB;
  return limits;
}

TEST(Policy, OneJobGoesThroughItsPhases) {
  EXPECT_EQ(Plan({}), "wait");
  EXPECT_EQ(Plan({Make(Phase::kQueued, 1)}), "begin 0");
  EXPECT_EQ(Plan({Make(Phase::kStepping, 1)}), "denoise 0");
  EXPECT_EQ(Plan({Make(Phase::kDenoised, 1)}), "decode 0");
  EXPECT_EQ(Plan({Make(Phase::kDecoding, 1)}), "decode 0");
}

TEST(Policy, FirstComeFirstServed) {
  EXPECT_EQ(Plan({Make(Phase::kQueued, 7), Make(Phase::kQueued, 3)}), "begin 1");
  EXPECT_EQ(Plan({Make(Phase::kStepping, 1), Make(Phase::kQueued, 2)}), "denoise 0");
  EXPECT_EQ(Plan({Make(Phase::kStepping, 2), Make(Phase::kDecoding, 1)}), "decode 1");
}

TEST(Policy, HigherPriorityTakesTheNextTurn) {
  EXPECT_EQ(Plan({Make(Phase::kStepping, 1), Make(Phase::kQueued, 2, Priority::kHigh)}), "begin 1");
  EXPECT_EQ(Plan({Make(Phase::kStepping, 1, Priority::kLow), Make(Phase::kStepping, 2)}),
            "denoise 1");
}

TEST(Policy, ExpiredJobsGetNothing) {
  JobView expired = Make(Phase::kStepping, 1);
  expired.deadline = kNow;
  EXPECT_EQ(Plan({expired}), "wait");
  expired.deadline = kNow + seconds(1);
  EXPECT_EQ(Plan({expired}), "denoise 0");
}

TEST(Policy, ASlowClientSlowsOnlyItself) {
  EXPECT_EQ(Plan({Stalled(Phase::kDecoding, 1)}), "wait");
  EXPECT_EQ(Plan({Stalled(Phase::kDecoding, 1), Make(Phase::kStepping, 2)}), "denoise 1");
  EXPECT_EQ(Plan({Stalled(Phase::kDenoised, 1), Make(Phase::kQueued, 2)}), "begin 1");
  // Its decoder does not take the place of one whose client reads.
  EXPECT_EQ(Plan({Stalled(Phase::kDecoding, 1), Make(Phase::kDenoised, 2)}), "decode 1");
  // What a full client holds back is its frames, not its steps.
  EXPECT_EQ(Plan({Stalled(Phase::kStepping, 1)}), "denoise 0");
}

TEST(Policy, OneDecoderAtATime) {
  EXPECT_EQ(Plan({Make(Phase::kDecoding, 1), Make(Phase::kDenoised, 2)}), "decode 0");
  // A low decoder in the way of a higher job is helped out, before others step.
  EXPECT_EQ(Plan({Make(Phase::kDecoding, 1, Priority::kLow), Make(Phase::kStepping, 2),
                  Make(Phase::kDenoised, 3, Priority::kHigh)}),
            "decode 0");
  PolicyLimits two;
  two.max_decoding = 2;
  EXPECT_EQ(
      Plan({Make(Phase::kDecoding, 1, Priority::kLow), Make(Phase::kDenoised, 3, Priority::kHigh)},
           two),
      "decode 1");
}

TEST(Policy, InFlightLimitHoldsTheQueueBack) {
  PolicyLimits limits;
  limits.max_in_flight = 2;
  const JobView stalled = Stalled(Phase::kDecoding, 1);
  EXPECT_EQ(Plan({stalled, Make(Phase::kQueued, 2)}, limits), "begin 1");
  EXPECT_EQ(Plan({stalled, stalled, Make(Phase::kQueued, 3)}, limits), "wait");
}

TEST(Policy, EqualJobsShareAStep) {
  const std::vector<JobView> jobs = {Make(Phase::kStepping, 3), Make(Phase::kStepping, 1),
                                     Make(Phase::kStepping, 2)};
  EXPECT_EQ(Plan(jobs, Batches(1)), "denoise 1");
  EXPECT_EQ(Plan(jobs, Batches(2)), "denoise 1 2");
  EXPECT_EQ(Plan(jobs, Batches(8)), "denoise 1 2 0");
}

TEST(Policy, BatchIsBoundedByThePipeline) {
  JobView lead = Make(Phase::kStepping, 1);
  lead.max_batch = 2;
  EXPECT_EQ(Plan({lead, Make(Phase::kStepping, 2), Make(Phase::kStepping, 3)}, Batches(8)),
            "denoise 0 1");
}

TEST(Policy, OnlyEqualsShare) {
  JobView other_key = Make(Phase::kStepping, 2);
  other_key.batch_key = "large";
  JobView alone = Make(Phase::kStepping, 3);
  alone.alone = true;
  const JobView lower = Make(Phase::kStepping, 4, Priority::kLow);
  const JobView decoding = Stalled(Phase::kDecoding, 5);
  EXPECT_EQ(Plan({Make(Phase::kStepping, 1), other_key, alone, lower, decoding}, Batches(8)),
            "denoise 0");
  EXPECT_EQ(Plan({alone, Make(Phase::kStepping, 9)}, Batches(8)), "denoise 0");
}

TEST(Policy, QueuedJobsBeginToFillABatch) {
  const JobView lead = Make(Phase::kStepping, 1);
  const JobView queued = Make(Phase::kQueued, 2);
  EXPECT_EQ(Plan({lead, queued}, Batches(2)), "begin 1");
  EXPECT_EQ(Plan({lead, Make(Phase::kStepping, 2), Make(Phase::kQueued, 3)}, Batches(2)),
            "denoise 0 1");

  JobView other = queued;
  other.likely_key = "large";
  EXPECT_EQ(Plan({lead, other}, Batches(2)), "denoise 0");
  // Who can share does, whoever stands before it: it takes little from others.
  EXPECT_EQ(Plan({lead, other, Make(Phase::kQueued, 3)}, Batches(2)), "begin 2");

  JobView nearly_done = lead;
  nearly_done.steps_left = 1;
  JobView slow_begin = queued;
  slow_begin.cost.begin_seconds = 3;  // longer than what is left to share
  EXPECT_EQ(Plan({nearly_done, slow_begin}, Batches(2)), "denoise 0");
}

TEST(Policy, MemoryBoundsTheBatch) {
  const std::vector<JobView> jobs = {Make(Phase::kStepping, 1), Make(Phase::kStepping, 2),
                                     Make(Phase::kStepping, 3)};
  PolicyLimits limits = Memory(23);  // three latents and two steps
  limits.max_batch = 8;
  EXPECT_EQ(Plan(jobs, limits), "denoise 0 1");
}

TEST(Policy, MemoryHoldsTheQueueBack) {
  const JobView running = Make(Phase::kStepping, 2);
  const JobView high = Make(Phase::kQueued, 3, Priority::kHigh);
  // Two latents and the decoder of one of them.
  EXPECT_EQ(Plan({running, high}, Memory(102)), "begin 1");
  EXPECT_EQ(Plan({running, high}, Memory(101)), "denoise 0");
  // It is the hungriest job in flight that must still find its memory, not only the new one.
  JobView modest = high;
  modest.cost.step_bytes = modest.cost.decode_bytes = 0;
  EXPECT_EQ(Plan({running, modest}, Memory(102)), "begin 1");
  EXPECT_EQ(Plan({running, modest}, Memory(101)), "denoise 0");
  // A large clip that waits for memory is not overtaken by small ones.
  JobView small = Make(Phase::kQueued, 4, Priority::kHigh);
  small.cost.decode_bytes = kMiB;
  JobView large = high;
  large.cost.decode_bytes = 110 * kMiB;
  EXPECT_EQ(Plan({running, large, small}, Memory(105)), "denoise 0");
}

TEST(Policy, AJobAloneAlwaysRuns) {
  EXPECT_EQ(Plan({Make(Phase::kQueued, 1)}, Memory(1)), "begin 0");
  EXPECT_EQ(Plan({Make(Phase::kStepping, 1)}, Memory(1)), "denoise 0");
  EXPECT_EQ(Plan({Make(Phase::kDenoised, 1)}, Memory(1)), "decode 0");
}

TEST(Policy, ADecoderWaitsForMemory) {
  const JobView stalled = Stalled(Phase::kDecoding, 1);
  EXPECT_EQ(Plan({stalled, Make(Phase::kDenoised, 2)}, Memory(202)), "decode 1");
  EXPECT_EQ(Plan({stalled, Make(Phase::kDenoised, 2)}, Memory(201)), "wait");
  EXPECT_EQ(Plan({stalled, Make(Phase::kDenoised, 2), Make(Phase::kStepping, 3)}, Memory(201)),
            "denoise 2");
}

TEST(Policy, RemainingSecondsShrinkWithTheWork) {
  JobView job = Make(Phase::kQueued, 1);
  EXPECT_DOUBLE_EQ(Policy::RemainingSeconds(job), 1 + 10 * 2 + 4);
  job.phase = Phase::kStepping;
  job.steps_left = 3;
  EXPECT_DOUBLE_EQ(Policy::RemainingSeconds(job), 3 * 2 + 4);
  job.phase = Phase::kDecoding;
  job.steps_left = 0;
  job.decode_left = 0.25;
  EXPECT_DOUBLE_EQ(Policy::RemainingSeconds(job), 1);
}

// Whatever the mix, the policy keeps its limits and never idles while somebody could work. Plays
// random loads to their end on a device that does one action at a time.
class PolicyPlay : public testing::TestWithParam<int> {};

TEST_P(PolicyPlay, KeepsLimitsAndFinishesEverything) {
  std::uint64_t state = static_cast<std::uint64_t>(GetParam()) * 0x9e3779b97f4a7c15ull + 1;
  const auto random = [&](int n) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<int>((state >> 33) % static_cast<std::uint64_t>(n));
  };
  PolicyLimits limits;
  limits.max_in_flight = 1 + random(5);
  limits.max_decoding = 1 + random(2);
  limits.max_batch = 1 + random(4);
  limits.memory_bytes = static_cast<std::size_t>(112 + random(200)) * kMiB;

  std::vector<JobView> jobs;
  for (int i = 0; i < 12; ++i) {
    jobs.push_back(Make(Phase::kQueued, static_cast<std::uint64_t>(i),
                        static_cast<Priority>(random(kNumPriorities))));
    jobs.back().batch_key = jobs.back().likely_key = random(2) == 0 ? "small" : "large";
    jobs.back().steps_left = 1 + random(5);
    jobs.back().max_batch = 1 + random(4);
  }
  int turns = 0;
  while (!jobs.empty()) {
    ASSERT_LT(++turns, 1000);
    for (JobView& job : jobs) {
      if (random(10) == 0) job.wants_frames = !job.wants_frames;
    }
    const Action action = Policy::Plan(jobs, kNow, limits);
    if (action.kind == Kind::kWait) {
      // Allowed only while a client is what everybody waits for.
      bool stalled = false;
      for (JobView& job : jobs) {
        stalled |= job.stalled();
        job.wants_frames = true;
      }
      ASSERT_TRUE(stalled);
      continue;
    }
    JobView& job = jobs[action.jobs.front()];
    if (action.kind == Kind::kBegin) {
      job.phase = Phase::kStepping;
    } else if (action.kind == Kind::kDenoise) {
      ASSERT_LE(static_cast<int>(action.jobs.size()), limits.max_batch);
      for (const std::size_t i : action.jobs) {
        ASSERT_EQ(jobs[i].batch_key, job.batch_key);
        if (--jobs[i].steps_left == 0) jobs[i].phase = Phase::kDenoised;
      }
    } else {
      job.phase = Phase::kDecoding;
      job.decode_left -= 0.5;
    }

    std::size_t bytes = 0;
    int in_flight = 0;
    for (const JobView& each : jobs) {
      if (!each.begun()) continue;
      ++in_flight;
      bytes += each.cost.waiting_bytes;
      if (each.phase == Phase::kDecoding) bytes += each.cost.decode_bytes;
    }
    if (action.kind == Kind::kDenoise) bytes += action.jobs.size() * job.cost.step_bytes;
    ASSERT_LE(in_flight, limits.max_in_flight);
    ASSERT_LE(bytes, limits.memory_bytes);
    if (action.kind == Kind::kDecode && job.decode_left <= 0) {
      jobs.erase(jobs.begin() + static_cast<std::ptrdiff_t>(action.jobs.front()));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, PolicyPlay, testing::Range(0, 200));

}  // namespace
}  // namespace slalom
