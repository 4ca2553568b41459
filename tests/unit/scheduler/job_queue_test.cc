#include "scheduler/job_queue.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace slalom {
namespace {

using std::chrono::seconds;

const SchedulerClock::time_point kStart{seconds(1000)};
constexpr int kPools[] = {0};

std::string Name(const char* stem, int number) {
  return std::string(stem).append(std::to_string(number));
}

class JobQueueTest : public testing::Test {
 protected:
  ~JobQueueTest() override {
    for (const auto& job : jobs_) {
      if (job->tenant >= 0) queue_->Retire(job.get());
    }
    EXPECT_EQ(queue_->size(), 0u);
  }

  struct Options {
    double at = 0;
    double size = 1;
    double weight = 1;
    Priority priority = Priority::kNormal;
    double deadline = 0;  // seconds after `at`
    std::string key = "small";
    int pool = 0;
  };

  QueuedJob* Push(const std::string& tenant, Options options) {
    keys_.push_back(std::make_unique<std::string>(options.key));
    jobs_.push_back(std::make_unique<QueuedJob>());
    QueuedJob* job = jobs_.back().get();
    job->view.sequence = jobs_.size();
    job->view.arrival = kStart + std::chrono::milliseconds(static_cast<int>(1000 * options.at));
    job->view.priority = options.priority;
    job->view.likely_key = *keys_.back();
    if (options.deadline > 0) {
      job->view.deadline =
          job->view.arrival + std::chrono::milliseconds(static_cast<int>(1000 * options.deadline));
    }
    job->pool = options.pool;
    job->device_seconds = options.size;
    queue_->Admit(job, tenant, options.weight);
    queue_->Push(job);
    return job;
  }

  QueuedJob* First() { return queue_->First(kPools); }
  // Begins it and works all of it off.
  void Run(QueuedJob* job) {
    queue_->Begin(job);
    job->view.phase = JobView::Phase::kStepping;
    queue_->Progress(job, 0.0);
    queue_->Settle(job, job->device_seconds);
    queue_->Retire(job);
  }

  std::unique_ptr<JobQueue> queue_ = std::make_unique<JobQueue>(PolicyOrder());
  std::vector<std::unique_ptr<QueuedJob>> jobs_;
  std::vector<std::unique_ptr<std::string>> keys_;
};

TEST_F(JobQueueTest, EqualsGoByArrival) {
  QueuedJob* second = Push("a", {.at = 2});
  QueuedJob* first = Push("a", {.at = 1});
  EXPECT_EQ(First(), first);
  Run(first);
  EXPECT_EQ(First(), second);
}

TEST_F(JobQueueTest, ShortOnesPassLongOnesUntilThoseHaveWaitedLongEnough) {
  QueuedJob* large = Push("a", {.at = 0, .size = 11});
  QueuedJob* small = Push("a", {.at = 599, .size = 1});  // 10 s smaller: 600 s
  EXPECT_EQ(First(), small);
  Run(small);
  // The same tenant has used a second now, which moves both alike.
  QueuedJob* late = Push("a", {.at = 601, .size = 1});
  EXPECT_EQ(First(), large);
  Run(large);
  EXPECT_EQ(First(), late);
}

TEST_F(JobQueueTest, PriorityComesFirst) {
  Push("a", {.at = 0, .priority = Priority::kLow});
  Push("a", {.at = 0});
  QueuedJob* high = Push("a", {.at = 500, .size = 100, .priority = Priority::kHigh});
  EXPECT_EQ(First(), high);
}

TEST_F(JobQueueTest, EarliestDeadlineFirst) {
  Push("a", {.at = 0, .size = 10, .deadline = 60});
  QueuedJob* sooner = Push("b", {.at = 1, .size = 20, .deadline = 50});
  Push("c", {.at = 0, .size = 10});
  EXPECT_EQ(First(), sooner);
  // One that is farther away than the job's own place changes nothing.
  QueuedJob* quick = Push("d", {.at = 1, .size = 0.5, .deadline = 3000});
  EXPECT_EQ(First(), quick);
}

TEST_F(JobQueueTest, WhoUsedLessGoesFirst) {
  QueuedJob* a1 = Push("a", {.at = 0, .size = 5});
  QueuedJob* a2 = Push("a", {.at = 0, .size = 5});
  QueuedJob* b1 = Push("b", {.at = 10, .size = 5});
  EXPECT_EQ(First(), a1);
  queue_->Begin(a1);
  a1->view.phase = JobView::Phase::kStepping;
  const double rank = queue_->RankOf(*a1);
  queue_->Progress(a1, 0.5);
  EXPECT_LE(queue_->RankOf(*a1), rank);  // what it works does not hold it back
  queue_->Progress(a1, 0.7);             // a worse estimate does neither
  EXPECT_LE(queue_->RankOf(*a1), rank);
  EXPECT_EQ(First(), b1);   // 2.5 s of use: 25 s of waiting
  queue_->Settle(a1, 0.5);  // it took less than predicted
  queue_->Retire(a1);
  EXPECT_EQ(First(), a2);
}

TEST_F(JobQueueTest, WhatIsPredictedAnewGetsItsNewPlace) {
  QueuedJob* early = Push("a", {.at = 0, .size = 100});
  QueuedJob* late = Push("a", {.at = 10, .size = 1});
  EXPECT_EQ(First(), late);
  queue_->Resize(early, 1);
  EXPECT_EQ(First(), early);
  queue_->Begin(early);
  early->view.phase = JobView::Phase::kStepping;
  queue_->Progress(early, 0.5);
  const double rank = queue_->RankOf(*early);
  queue_->Resize(early, 3);  // half of it is left
  EXPECT_NEAR(queue_->RankOf(*early) - rank, 60, 1e-6);
}

TEST_F(JobQueueTest, NobodySavesUpAndNobodyOwesForIdleTimes) {
  for (int i = 0; i < 10; ++i) Run(Push("a", {.at = 1.0 * i, .size = 100}));
  // a used 1000 s while nobody else was there. The last job is all that counts against it: it was
  // begun at the level.
  Push("b", {.at = 100, .size = 1});
  QueuedJob* b2 = Push("b", {.at = 100, .size = 1});
  QueuedJob* a = Push("a", {.at = 100, .size = 1});
  EXPECT_NEAR(queue_->RankOf(*a) - queue_->RankOf(*b2), 10 * 100, 1e-6);
}

TEST_F(JobQueueTest, AgedJobsGetTheirShareBehindHigherClasses) {
  QueuedJob* low = Push("a", {.at = 0, .size = 10, .priority = Priority::kLow});
  QueuedJob* low2 = Push("a", {.at = 1, .size = 10, .priority = Priority::kLow});
  std::vector<QueuedJob*> normal;
  for (int i = 0; i < 40; ++i) normal.push_back(Push("b", {.at = 3500, .size = 10}));
  queue_->Age(kStart + seconds(3599));
  EXPECT_NE(First(), low);
  const auto later = kStart + seconds(3700);
  queue_->Age(later);
  EXPECT_EQ(First(), low);
  Run(low);
  // The next one must wait until others have had 19 parts of 20.
  int between = 0;
  for (;; ++between) {
    queue_->Age(later);
    QueuedJob* first = First();
    if (first == low2) break;
    ASSERT_LT(between, 30);
    Run(first);
  }
  EXPECT_NEAR(between, 20, 1);
}

TEST_F(JobQueueTest, NobodyAgesAmongEquals) {
  QueuedJob* large = Push("a", {.at = 0, .size = 100});
  QueuedJob* small = Push("a", {.at = 3700, .size = 1});
  queue_->Age(kStart + seconds(3700));
  EXPECT_EQ(large->view.priority, Priority::kNormal);
  EXPECT_EQ(First(), small);
}

TEST_F(JobQueueTest, FindsMatesForABatch) {
  Push("a", {.at = 0, .key = "large"});
  QueuedJob* mate = Push("b", {.at = 5, .key = "small"});
  Push("a", {.at = 4, .size = 9, .key = "small"});
  Push("c", {.at = 1, .priority = Priority::kLow, .key = "small"});
  EXPECT_EQ(queue_->FirstLike(0, "small", Priority::kNormal), mate);
  EXPECT_EQ(queue_->FirstLike(1, "small", Priority::kNormal), nullptr);
  EXPECT_EQ(queue_->FirstLike(0, "other", Priority::kNormal), nullptr);
  EXPECT_EQ(queue_->FirstLike(0, "small", Priority::kHigh), nullptr);
}

// Against the definition: whatever happens, First finds the least of what is queued, also when the
// first ones are refused.
TEST_F(JobQueueTest, FirstIsTheLeastOfAll) {
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&](unsigned n) { return static_cast<int>(random() % n); };
    std::vector<QueuedJob*> queued;
    std::vector<QueuedJob*> begun;
    const int pools[] = {0, 1};
    for (int turn = 0; turn < 60; ++turn) {
      const int what = below(6);
      if (what < 3) {
        queued.push_back(
            Push(Name("t", below(4)), {.at = turn + 0.1 * below(30),
                                       .size = 1.0 + below(20),
                                       .weight = 1.0 + below(3),
                                       .priority = static_cast<Priority>(below(3)),
                                       .deadline = below(4) == 0 ? 1.0 + below(500) : 0,
                                       .key = Name("k", below(3)),
                                       .pool = below(3)}));
      } else if (what == 3 && !begun.empty()) {
        QueuedJob* job = begun[static_cast<std::size_t>(below(begun.size()))];
        queue_->Progress(job, 0.01 * below(100));
      } else if (what == 4 && !begun.empty()) {
        queue_->Settle(begun.back(), 0.1 * below(300));
        queue_->Retire(begun.back());
        begun.pop_back();
      } else if (!queued.empty()) {
        QueuedJob* job = queued[static_cast<std::size_t>(below(queued.size()))];
        std::erase(queued, job);
        if (below(2) == 0) {
          queue_->Retire(job);
        } else {
          queue_->Begin(job);
          job->view.phase = JobView::Phase::kStepping;
          begun.push_back(job);
        }
      }
      for (QueuedJob* job : queued) job->view.rank = queue_->RankOf(*job);
      std::sort(queued.begin(), queued.end(), [](const QueuedJob* a, const QueuedJob* b) {
        return Policy::Before(a->view, b->view);
      });
      const int refused = below(4);
      std::vector<const QueuedJob*> asked;
      QueuedJob* found = queue_->First(pools, [&](const QueuedJob& job) {
        asked.push_back(&job);
        return static_cast<int>(asked.size()) > refused;
      });
      std::vector<const QueuedJob*> expected;
      for (const QueuedJob* job : queued) {
        if (job->pool < 2 && static_cast<int>(expected.size()) <= refused) expected.push_back(job);
      }
      ASSERT_EQ(asked, expected) << "seed " << seed << " turn " << turn;
      const bool enough = static_cast<int>(expected.size()) > refused;
      ASSERT_EQ(found, enough ? expected.back() : nullptr);
    }
    for (QueuedJob* job : queued) queue_->Retire(job);
    for (QueuedJob* job : begun) queue_->Retire(job);
    jobs_.clear();
  }
}

TEST(FairShare, WeightsDivideUse) {
  FairShare share;
  const int a = share.Enter("a", 1);
  const int b = share.Enter("b", 4);
  share.Charge(a, 8);
  share.Charge(b, 8);
  EXPECT_DOUBLE_EQ(share.used(a), 8);
  EXPECT_DOUBLE_EQ(share.used(b), 2);
}

TEST(FairShare, TheLevelIsWhatBeganOrWhoWaitsWithLess) {
  FairShare share;
  const int a = share.Enter("a", 1);
  const int b = share.Enter("b", 1);
  share.Wait(a);
  share.Wait(b);
  share.StopWaiting(a, /*begins=*/true);
  share.Charge(a, 10);
  share.Wait(a);
  share.StopWaiting(a, true);  // b still waits at 0
  EXPECT_DOUBLE_EQ(share.level(), 0);
  share.Charge(b, 3);
  share.Wait(a);
  share.StopWaiting(b, true);
  EXPECT_DOUBLE_EQ(share.level(), 3);
  share.StopWaiting(a, true);
  EXPECT_DOUBLE_EQ(share.level(), 10);
  const int c = share.Enter("c", 1);
  share.Wait(c);
  EXPECT_DOUBLE_EQ(share.used(c), 10);
}

TEST(FairShare, RemembersABoundedNumberOfTenants) {
  FairShare share;
  for (int i = 0; i < 100000; ++i) {
    const int tenant = share.Enter(Name("t", i), 1);
    share.Wait(tenant);
    share.StopWaiting(tenant, true);
    share.Charge(tenant, i % 2 == 0 ? 1 : 0);
    share.Leave(tenant);
  }
  EXPECT_LE(share.known(), 4096u);
}

}  // namespace
}  // namespace slalom
