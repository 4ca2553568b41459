#include "scheduler/placement.h"

#include <gtest/gtest.h>

#include <vector>

namespace slalom {
namespace {

std::size_t PlaceOf(const std::vector<DeviceOffer>& offers, std::size_t here) {
  return Place(offers, here);
}

TEST(Place, EqualDevicesNeverWaitForEachOther) {
  EXPECT_EQ(PlaceOf({{0, 10, true}, {0, 10, true}}, 0), 0u);
  EXPECT_EQ(PlaceOf({{0, 10, true}, {0, 10, true}}, 1), 1u);
  EXPECT_EQ(PlaceOf({{0, 10.2, true}, {0, 10, false}}, 0), 0u);  // predictions are not exact
}

TEST(Place, AnIdleEqualTakesIt) {
  EXPECT_EQ(PlaceOf({{0, 10, false}, {0, 10, true}}, 0), 1u);
  EXPECT_EQ(PlaceOf({{0, 10, false}, {0, 10, true}}, 1), 1u);
}

TEST(Place, TheFastDeviceTakesItIfItIsDoneSooner) {
  EXPECT_EQ(PlaceOf({{0, 100, true}, {0, 10, true}}, 0), 1u);
  EXPECT_EQ(PlaceOf({{0, 100, true}, {50, 10, false}}, 0), 1u);
  EXPECT_EQ(PlaceOf({{0, 100, true}, {95, 10, false}}, 0), 0u);
}

TEST(Forecast, WithNothingAheadThereIsNoWait) {
  const Forecast forecast(2);
  EXPECT_EQ(forecast.ForQueued(0b11).jobs, 0);
  EXPECT_DOUBLE_EQ(forecast.ForQueued(0b11).seconds, 0);
  EXPECT_DOUBLE_EQ(forecast.ForBegun(1).seconds, 0);
}

TEST(Forecast, AFreeDeviceMeansNoWait) {
  Forecast forecast(2);
  forecast.AddBegun(0, 100);
  EXPECT_DOUBLE_EQ(forecast.ForQueued(0b11).seconds, 0);
  EXPECT_DOUBLE_EQ(forecast.ForQueued(0b01).seconds, 100);
  EXPECT_EQ(forecast.ForQueued(0b11).jobs, 1);
}

TEST(Forecast, QueuedWorkFlowsToWhoIsFree) {
  Forecast forecast(3);
  forecast.AddBegun(0, 10);
  forecast.AddBegun(1, 40);
  forecast.AddQueued(0b11, 20);
  EXPECT_DOUBLE_EQ(forecast.ForQueued(0b11).seconds, 30);
  forecast.AddQueued(0b11, 30);  // 10 more fill the first up to the second, 20 rise on both
  EXPECT_DOUBLE_EQ(forecast.ForQueued(0b11).seconds, 50);
  EXPECT_EQ(forecast.ForQueued(0b11).jobs, 4);
  EXPECT_DOUBLE_EQ(forecast.ForQueued(0b100).seconds, 0);
  EXPECT_EQ(forecast.ForQueued(0b100).jobs, 0);
  EXPECT_DOUBLE_EQ(forecast.ForBegun(1).seconds, 40 + 25);
}

}  // namespace
}  // namespace slalom
