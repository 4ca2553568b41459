#include "scheduler/cost_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

namespace slalom {
namespace {

ClipCost Clip(double step_work, double seconds_per_work = 1.0) {
  ClipCost cost;
  cost.begin_work = 1;
  cost.step_work = step_work;
  cost.decode_work = 5 * step_work;
  cost.begin_seconds = seconds_per_work;
  cost.step_seconds = step_work * seconds_per_work;
  cost.decode_seconds = cost.decode_work * seconds_per_work;
  cost.waiting_bytes = 100;
  cost.step_bytes = 1000;
  cost.decode_bytes = 10000;
  return cost;
}

class CostModelTest : public testing::Test {
 protected:
  double Step(const ClipCost& clip) const { return model_.Predict(kind_, clip).step_seconds; }
  void Observe(const ClipCost& clip, double seconds, int times = 1) {
    for (int i = 0; i < times; ++i) model_.ObserveStep(kind_, clip, 1, seconds);
  }
  CostModel model_;
  const int kind_ = model_.Kind("gpu", "wan", AttentionKind::kSla);
};

TEST_F(CostModelTest, BeginsWithThePipelinesEstimate) {
  const ClipCost cost = model_.Predict(kind_, Clip(3));
  EXPECT_DOUBLE_EQ(cost.begin_seconds, 1);
  EXPECT_DOUBLE_EQ(cost.step_seconds, 3);
  EXPECT_DOUBLE_EQ(cost.decode_seconds, 15);
  EXPECT_EQ(cost.step_bytes, 1000u);
  EXPECT_TRUE(model_.Errors().empty());
}

TEST_F(CostModelTest, OneMeasurementCorrectsAWrongGuess) {
  Observe(Clip(3), 0.03);
  EXPECT_NEAR(Step(Clip(3)), 0.03, 0.002);
  EXPECT_NEAR(Step(Clip(30)), 0.3, 0.02);  // and that of other sizes
  EXPECT_DOUBLE_EQ(model_.Predict(kind_, Clip(3)).decode_seconds, 15);
  for (const auto& [device, model] : {std::pair("gpu", "other"), std::pair("cpu", "wan")}) {
    const int other = model_.Kind(device, model, AttentionKind::kSla);
    EXPECT_DOUBLE_EQ(model_.Predict(other, Clip(3)).step_seconds, 3);
  }
}

TEST_F(CostModelTest, AnotherAttentionIsPredictedFromThisOneUntilItIsMeasured) {
  const int dense = model_.Kind("gpu", "wan", AttentionKind::kDense);
  Observe(Clip(3), 0.03);
  model_.ObserveDecode(kind_, Clip(3), 0.15);
  EXPECT_NEAR(model_.Predict(dense, Clip(3)).step_seconds, 0.03, 0.002);
  EXPECT_NEAR(model_.Predict(dense, Clip(3)).decode_seconds, 0.15, 0.01);
  model_.ObserveStep(dense, Clip(3), 1, 0.3);
  EXPECT_NEAR(model_.Predict(dense, Clip(3)).step_seconds, 0.3, 0.02);
  EXPECT_NEAR(Step(Clip(3)), 0.03, 0.002);
}

TEST_F(CostModelTest, ForgivesAColdStart) {
  Observe(Clip(3), 9.0);
  Observe(Clip(3), 1.0, 10);
  EXPECT_NEAR(Step(Clip(3)), 1.0, 0.1);
}

TEST_F(CostModelTest, PredictsSizesItHasNotSeen) {
  // Small clips reach less of the device: seconds = work^0.8.
  std::mt19937 random(1);
  std::normal_distribution<double> noise(0, 0.05);
  for (int i = 0; i < 60; ++i) {
    for (const double work : {1.0, 10.0, 100.0}) {
      Observe(Clip(work), std::pow(work, 0.8) * std::exp(noise(random)));
    }
  }
  for (const double work : {1.0, 3.0, 30.0, 100.0, 300.0}) {
    EXPECT_NEAR(Step(Clip(work)) / std::pow(work, 0.8), 1.0, 0.15) << work;
  }
}

TEST_F(CostModelTest, LearnsWhatASizeDiffersFromTheLine) {
  for (int i = 0; i < 40; ++i) {
    Observe(Clip(1), 1);
    Observe(Clip(10), 13);  // an unlucky size
    Observe(Clip(100), 100);
  }
  EXPECT_NEAR(Step(Clip(10)), 13, 0.8);
  EXPECT_NEAR(Step(Clip(100)), 100, 6);
}

TEST_F(CostModelTest, AnOutlierChangesLittle) {
  Observe(Clip(3), 1.0, 30);
  Observe(Clip(3), 50.0);
  EXPECT_NEAR(Step(Clip(3)), 1.0, 0.05);
}

TEST_F(CostModelTest, FollowsADeviceThatGotSlower) {
  Observe(Clip(3), 1.0, 100);
  Observe(Clip(3), 2.0, 40);
  EXPECT_NEAR(Step(Clip(3)), 2.0, 0.25);
}

TEST_F(CostModelTest, NoiseAveragesOut) {
  for (unsigned seed = 0; seed < 50; ++seed) {
    CostModel model;
    const int kind = model.Kind("gpu", "wan", AttentionKind::kSla);
    std::mt19937 random(seed);
    std::normal_distribution<double> noise(0, 0.2);
    for (int i = 0; i < 200; ++i) {
      model.ObserveStep(kind, Clip(3), 1, 2.0 * std::exp(noise(random)));
    }
    EXPECT_NEAR(model.Predict(kind, Clip(3)).step_seconds, 2.0, 0.4) << seed;
    EXPECT_NEAR(model.Errors().at(0).mean_error, 0.16, 0.08) << seed;
  }
}

TEST_F(CostModelTest, LearnsWhetherBatchesPay) {
  EXPECT_LT(model_.Marginal(kind_, Clip(3)), 0.9);  // worth a try
  Observe(Clip(3), 1.0, 5);
  Observe(Clip(4), 1.0, 5);
  for (int i = 0; i < 20; ++i) {
    model_.ObserveStep(kind_, Clip(3), 4, 1.6);
    model_.ObserveStep(kind_, Clip(4), 4, 4.0);
  }
  EXPECT_NEAR(model_.Marginal(kind_, Clip(3)), 0.2, 0.12);
  EXPECT_GT(model_.Marginal(kind_, Clip(4)), 0.9);
  EXPECT_NEAR(model_.StepSeconds(kind_, Clip(3), 4), 1.6, 0.4);
  EXPECT_NEAR(model_.StepSeconds(kind_, Clip(3), 1), 1.0, 0.05);  // not taken for a slow step
}

// Where all steps are shared no later step alone says that the first one was cold.
TEST_F(CostModelTest, SharedStepsCorrectAColdStart) {
  model_.ObserveStep(kind_, Clip(3), 1, 50);
  for (int i = 0; i < 30; ++i) model_.ObserveStep(kind_, Clip(3), 8, 1.0);
  EXPECT_NEAR(model_.StepSeconds(kind_, Clip(3), 8), 1.0, 0.3);
}

TEST_F(CostModelTest, BytesAreOnlyRaised) {
  model_.ObserveBytes(kind_, CostPhase::kStep, 1000, 900);
  EXPECT_EQ(model_.Predict(kind_, Clip(3)).step_bytes, 1000u);
  model_.ObserveBytes(kind_, CostPhase::kStep, 1000, 1200);
  EXPECT_EQ(model_.Predict(kind_, Clip(3)).step_bytes, 1200u);
  model_.ObserveOutOfMemory(kind_, CostPhase::kDecode);
  EXPECT_EQ(model_.Predict(kind_, Clip(3)).decode_bytes, 12500u);
  EXPECT_EQ(model_.Predict(kind_, Clip(3)).waiting_bytes, 100u);
}

TEST_F(CostModelTest, ReportsItsError) {
  Observe(Clip(2), 4.0);  // predicted 2
  const CostError error = model_.Errors().at(0);
  EXPECT_EQ(error.samples, 1);
  EXPECT_EQ(error.phase, CostPhase::kStep);
  EXPECT_EQ(error.device, "gpu");
  EXPECT_DOUBLE_EQ(error.mean_error, 0.5);
  EXPECT_DOUBLE_EQ(error.bias, -0.5);
  Observe(Clip(2), 4.0, 300);
  EXPECT_LT(model_.Errors().at(0).mean_error, 0.02);
}

TEST_F(CostModelTest, NonsenseIsIgnored) {
  for (const double seconds : {0.0, -1.0, std::nan(""), double{INFINITY}}) {
    Observe(Clip(3), seconds, 10);
    model_.ObserveDecode(kind_, Clip(3), seconds);
  }
  EXPECT_DOUBLE_EQ(Step(Clip(3)), 3);
  const ClipCost nothing;
  model_.ObserveStep(kind_, nothing, 1, 1.0);
  EXPECT_TRUE(std::isfinite(Step(nothing)));
}

TEST_F(CostModelTest, SavesAndLoads) {
  Observe(Clip(3), 1.5, 10);
  model_.ObserveStep(kind_, Clip(3), 2, 2.0);
  model_.ObserveBegin(kind_, Clip(3), 0.2);
  model_.ObserveDecode(kind_, Clip(3), 7);
  model_.ObserveOutOfMemory(kind_, CostPhase::kDecode);
  const std::string text = model_.Save();

  CostModel other;
  other.Kind("another gpu", "wan", AttentionKind::kDense);
  const int kind = other.Kind("gpu", "wan", AttentionKind::kSla);
  ASSERT_TRUE(other.Load(text));
  const ClipCost a = model_.Predict(kind_, Clip(7));
  const ClipCost b = other.Predict(kind, Clip(7));
  EXPECT_DOUBLE_EQ(a.step_seconds, b.step_seconds);
  EXPECT_DOUBLE_EQ(a.begin_seconds, b.begin_seconds);
  EXPECT_DOUBLE_EQ(a.decode_seconds, b.decode_seconds);
  EXPECT_EQ(a.decode_bytes, b.decode_bytes);
  EXPECT_DOUBLE_EQ(model_.Marginal(kind_, Clip(3)), other.Marginal(kind, Clip(3)));
  EXPECT_EQ(CostModel().Load(text), true);
}

TEST_F(CostModelTest, DamagedTextChangesNothing) {
  Observe(Clip(3), 1.5, 10);
  const std::string text = model_.Save();
  for (std::size_t length = 0; length + 1 < text.size(); length += 7) {
    CostModel other;
    const int kind = other.Kind("gpu", "wan", AttentionKind::kSla);
    EXPECT_FALSE(other.Load(text.substr(0, length))) << length;
    EXPECT_DOUBLE_EQ(other.Predict(kind, Clip(3)).step_seconds, 3);
  }
  EXPECT_FALSE(CostModel().Load("slalom cost model 2\nend\n"));
}

}  // namespace
}  // namespace slalom
