// Plays a trace on devices that do not exist, with the scheduler's own Policy, JobQueue, CostModel
// and Place: only threads, pipelines and clients are left out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "scheduler/cost_model.h"
#include "scheduler/policy.h"
#include "tests/bench/trace.h"

namespace slalom {

struct SimulationOptions {
  std::vector<double> speeds;  // one per device: 2 is twice as fast
  PolicyLimits limits;
  double marginal = 1.0;  // what each further clip really adds to a shared step, over one alone
  double noise = 0.05;    // of each piece of work: standard deviation of the logarithm
  double prior_error =
      2.0;  // what Pipeline::Estimate says before anything was measured, over the truth
  std::uint64_t seed = 1;
};

struct Percentiles {
  double p50 = 0;
  double p95 = 0;
  double p99 = 0;
  double mean = 0;
};
// Sorts the values.
Percentiles PercentilesOf(std::vector<double>* values);

struct SimulatedClass {
  std::string shape;
  Priority priority = Priority::kNormal;
  std::int64_t jobs = 0;
  std::int64_t expired = 0;  // deadline passed
  Percentiles latency;       // seconds from arrival to the last frame
  Percentiles wait;          // seconds of that not worked for it
};

struct SimulationResult {
  std::vector<SimulatedClass> classes;
  double makespan = 0;      // seconds until the last job was done
  double busy_seconds = 0;  // of all devices
  double utilisation = 0;
  double jobs_per_second = 0;  // over the makespan
  // Latency over work: the mean for the tenant that took most, for all others, and the worst job's.
  double heaviest_slowdown = 0;
  double others_slowdown = 0;
  double worst_slowdown = 0;
  std::int64_t turns = 0;
  double seconds = 0;  // that the simulation took
  std::vector<CostError> cost_errors;
};

SimulationResult Simulate(const Trace& trace, const SimulationOptions& options);

}  // namespace slalom
