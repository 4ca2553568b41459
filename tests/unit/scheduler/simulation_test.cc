// The service's order against first come, first served, in tests/bench's simulator: the figures
// that the project promises.
#include "tests/bench/simulation.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "kernels/core/error.h"

namespace slalom {
namespace {

PolicyOrder FirstComeFirstServed() {
  PolicyOrder order;
  order.stretch = 0;
  order.usage_stretch = 0;
  order.classes = false;
  order.ageing_seconds = 0;
  return order;
}

const SimulatedClass& ClassOf(const SimulationResult& result, const std::string& shape) {
  for (const SimulatedClass& each : result.classes) {
    if (each.shape == shape) return each;
  }
  throw Error(ErrorCode::kInternal, "no such class");
}

class ShortAndLong : public testing::TestWithParam<std::pair<int, int>> {};

// 80 % short jobs, 20 % that take 20 times as long, 90 % load.
TEST_P(ShortAndLong, ShortJobsAreServedSoonAtNoCostInThroughput) {
  const auto [devices, tenants] = GetParam();
  TraceOptions made;
  made.jobs = 20000;
  made.devices = devices;
  made.tenants = tenants;
  const Trace trace = MakeTrace(made);
  SimulationOptions options;
  options.speeds.assign(static_cast<std::size_t>(devices), 1.0);
  const SimulationResult service = Simulate(trace, options);
  options.limits.order = FirstComeFirstServed();
  const SimulationResult fcfs = Simulate(trace, options);

  const double gain = ClassOf(fcfs, "short").latency.p95 / ClassOf(service, "short").latency.p95;
  const double kept = service.jobs_per_second / fcfs.jobs_per_second;
  std::printf("%d devices, %d tenants: short p95 %.1f times better, throughput x %.4f\n", devices,
              tenants, gain, kept);
  EXPECT_GE(gain, 5.0);
  EXPECT_GE(kept, 0.97);
  EXPECT_EQ(ClassOf(service, "short").jobs + ClassOf(service, "long").jobs, made.jobs);
  for (const CostError& error : service.cost_errors) {
    EXPECT_LT(error.mean_error, 0.07) << CostPhaseName(error.phase);  // the noise is 5 %
  }
}

INSTANTIATE_TEST_SUITE_P(Loads, ShortAndLong,
                         testing::Values(std::pair{1, 1}, std::pair{1, 20}, std::pair{2, 20}));

TEST(Simulation, FastDevicesGetWhatTheyFinishSooner) {
  TraceOptions made;
  made.jobs = 2000;
  made.devices = 4;
  made.load = 0.2;  // of four fast ones, of which there are two
  const Trace trace = MakeTrace(made);
  SimulationOptions options;
  options.speeds = {1.0, 1.0, 0.02, 0.02};
  const SimulationResult result = Simulate(trace, options);
  // On a slow device a long job would take 4860 s.
  EXPECT_LT(ClassOf(result, "long").latency.p99, 2000);
  EXPECT_EQ(ClassOf(result, "short").jobs + ClassOf(result, "long").jobs, made.jobs);
}

TEST(Simulation, BatchesThatPayRaiseThroughput) {
  TraceOptions made;
  made.jobs = 3000;
  made.devices = 1;
  made.load = 1.2;
  made.short_share = 1.0;
  const Trace trace = MakeTrace(made);
  SimulationOptions options;
  options.speeds = {1.0};
  options.marginal = 0.4;
  const double alone = Simulate(trace, options).busy_seconds;
  options.limits.max_batch = 4;
  const double shared = Simulate(trace, options).busy_seconds;
  EXPECT_LT(shared, 0.75 * alone);
  options.marginal = 1.1;  // and the cost model finds out when they do not
  EXPECT_LT(Simulate(trace, options).busy_seconds, 1.01 * alone);
}

TEST(Trace, ReadsCsvAndJson) {
  const auto path = std::filesystem::temp_directory_path() / "slalom_trace_test.csv";
  std::ofstream(path) << "shape,arrival_seconds,steps,begin_seconds,step_seconds,decode_seconds,"
                         "tenant,priority\n"
                         "big,5,10,1,2,3,x,high\nsmall,1,4,0.5,0.25,1,y,\n";
  const Trace csv = ReadTrace(path.string());
  std::filesystem::remove(path);
  ASSERT_EQ(csv.jobs.size(), 2u);
  EXPECT_EQ(csv.shapes[static_cast<std::size_t>(csv.jobs[0].shape)].name, "small");
  EXPECT_DOUBLE_EQ(csv.Seconds(csv.jobs[1]), 24);
  EXPECT_EQ(csv.jobs[1].priority, Priority::kHigh);

  const auto json_path = std::filesystem::temp_directory_path() / "slalom_trace_test.json";
  std::ofstream(json_path) << R"([{"shape": "big", "arrival_seconds": 5, "steps": 10,
      "begin_seconds": 1, "step_seconds": 2, "decode_seconds": 3, "deadline_seconds": 60}])";
  const Trace json = ReadTrace(json_path.string());
  EXPECT_DOUBLE_EQ(json.jobs.at(0).deadline, 60);
  std::ofstream(json_path) << R"([{"shape": "big", "arrival_seconds": -5}])";
  EXPECT_THROW(ReadTrace(json_path.string()), Error);
  std::filesystem::remove(json_path);
}

}  // namespace
}  // namespace slalom
