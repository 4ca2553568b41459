// A day of jobs, made up or recorded: what the simulator feeds to the policy.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "scheduler/job.h"

namespace slalom {

// What a kind of clip really takes on a device of speed 1, before noise.
struct TraceShape {
  std::string name;
  double begin_seconds = 0;
  double step_seconds = 0;
  double decode_seconds = 0;
};

struct TraceJob {
  double arrival = 0;  // seconds; jobs come in this order
  int shape = 0;
  int tenant = 0;
  int steps = 1;
  Priority priority = Priority::kNormal;
  double deadline = 0;  // seconds after arrival; 0: none
};

struct Trace {
  std::vector<TraceShape> shapes;
  std::vector<std::string> tenants;
  std::vector<double> weights;  // of the tenants
  std::vector<TraceJob> jobs;

  double Seconds(const TraceJob& job) const;  // of one device
};

struct TraceOptions {
  std::int64_t jobs = 1000000;
  int devices = 300;         // what the load is measured against
  double load = 0.9;         // of all devices, on average
  double amplitude = 0;      // of the day's wave: 0.5 goes from half to one and a half
  double short_share = 0.8;  // of the jobs
  double long_factor = 20;   // how much more a long one takes
  double short_seconds = 4.86;
  int tenants = 50;  // the k-th sends 1/k as much as the first (Zipf)
  double high_share = 0;
  double low_share = 0;
  std::uint64_t seed = 1;
};

// Poisson arrivals. The same options give the same trace.
Trace MakeTrace(const TraceOptions& options);

// A recorded one, by its file's ending. CSV: a header with the columns arrival_seconds, shape,
// steps, begin_seconds, step_seconds, decode_seconds, and if need be tenant, weight, priority,
// deadline_seconds, in any order. JSON: an array of objects with these keys. A shape's seconds are
// those of its first job. Throws Error(kInvalidArgument) that names the line or the job.
Trace ReadTrace(const std::string& path);

}  // namespace slalom
