// simulate: plays a day of jobs with several policies and compares them.
//
//   simulate --jobs 1000000 --devices 300 --amplitude 0.3
//   simulate --jobs 200000 --devices 1 --policies service,fcfs
//   simulate --trace day.csv --devices 8 --json
//
// Policies: service (what slalomd does), fcfs (by arrival, nothing else), priority (classes, then
// arrival), stretch=N and usage=N (the service's with another PolicyOrder::stretch or
// usage_stretch).
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "kernels/core/error.h"
#include "tests/bench/simulation.h"
#include "tests/bench/trace.h"

namespace slalom {
namespace {

using Json = nlohmann::ordered_json;

PolicyOrder OrderOf(const std::string& name) {
  PolicyOrder order;
  constexpr char kStretch[] = "stretch=";
  constexpr char kUsage[] = "usage=";
  if (name == "service") return order;
  if (name.starts_with(kUsage)) {
    order.usage_stretch = std::stod(name.substr(sizeof kUsage - 1));
    return order;
  }
  if (name.starts_with(kStretch)) {
    order.stretch = std::stod(name.substr(sizeof kStretch - 1));
    return order;
  }
  order.stretch = 0;
  order.usage_stretch = 0;
  order.ageing_seconds = 0;
  order.classes = name == "priority";
  if (name != "fcfs" && name != "priority") {
    throw Error(ErrorCode::kInvalidArgument,
                "policy '" + name + "' must be service, fcfs, priority, stretch=N or usage=N");
  }
  return order;
}

Json ToJson(const Percentiles& p) {
  return {{"p50", p.p50}, {"p95", p.p95}, {"p99", p.p99}, {"mean", p.mean}};
}

Json ToJson(const std::string& policy, const SimulationResult& result) {
  Json classes = Json::array();
  for (const SimulatedClass& each : result.classes) {
    classes.push_back({{"shape", each.shape},
                       {"priority", PriorityName(each.priority)},
                       {"jobs", each.jobs},
                       {"expired", each.expired},
                       {"latency_seconds", ToJson(each.latency)},
                       {"wait_seconds", ToJson(each.wait)}});
  }
  Json errors = Json::array();
  for (const CostError& error : result.cost_errors) {
    errors.push_back({{"device", error.device},
                      {"phase", CostPhaseName(error.phase)},
                      {"samples", error.samples},
                      {"mean_error", error.mean_error},
                      {"bias", error.bias}});
  }
  return {{"policy", policy},
          {"classes", classes},
          {"makespan_seconds", result.makespan},
          {"utilisation", result.utilisation},
          {"jobs_per_second", result.jobs_per_second},
          {"worst_slowdown", result.worst_slowdown},
          {"slowdown_of_heaviest_tenant", result.heaviest_slowdown},
          {"slowdown_of_other_tenants", result.others_slowdown},
          {"turns", result.turns},
          {"simulation_seconds", result.seconds},
          {"cost_errors", errors}};
}

void Print(const std::string& policy, const SimulationResult& result) {
  std::printf(
      "%s: %.4g jobs/s, utilisation %.3f; mean slowdown: heaviest tenant %.2f, others %.2f; "
      "%lld turns in %.1f s (%.2f us each)\n",
      policy.c_str(), result.jobs_per_second, result.utilisation, result.heaviest_slowdown,
      result.others_slowdown, static_cast<long long>(result.turns), result.seconds,
      1e6 * result.seconds / static_cast<double>(std::max<std::int64_t>(1, result.turns)));
  for (const SimulatedClass& each : result.classes) {
    std::printf("  %-12s %-7s %9lld jobs  latency p50 %10.2f  p95 %10.2f  p99 %10.2f s\n",
                each.shape.c_str(), PriorityName(each.priority), static_cast<long long>(each.jobs),
                each.latency.p50, each.latency.p95, each.latency.p99);
  }
}

int Main(int argc, char** argv) {
  CLI::App app("Plays a day of jobs with several policies and compares them.");
  TraceOptions made;
  SimulationOptions options;
  std::string file;
  std::vector<std::string> policies = {"service", "fcfs"};
  double slow_share = 0;
  double slow_speed = 0.5;
  bool json = false;
  app.add_option("--trace", file, "a recorded trace, CSV or JSON, instead of a made-up one");
  app.add_option("--jobs", made.jobs, "jobs to make up")->capture_default_str();
  app.add_option("--devices", made.devices, "how many")->capture_default_str();
  app.add_option("--load", made.load, "of the devices, on average")->capture_default_str();
  app.add_option("--amplitude", made.amplitude, "of the day's wave")->capture_default_str();
  app.add_option("--short-share", made.short_share, "of the jobs")->capture_default_str();
  app.add_option("--long-factor", made.long_factor, "a long job over a short one")
      ->capture_default_str();
  app.add_option("--short-seconds", made.short_seconds, "of a short job")->capture_default_str();
  app.add_option("--tenants", made.tenants, "the k-th sends 1/k of the first")
      ->capture_default_str();
  app.add_option("--high-share", made.high_share, "jobs of high priority")->capture_default_str();
  app.add_option("--low-share", made.low_share, "jobs of low priority")->capture_default_str();
  app.add_option("--seed", made.seed)->capture_default_str();
  app.add_option("--slow-share", slow_share, "of the devices are slower")->capture_default_str();
  app.add_option("--slow-speed", slow_speed, "of those")->capture_default_str();
  app.add_option("--max-batch", options.limits.max_batch, "clips per step")->capture_default_str();
  app.add_option("--max-in-flight", options.limits.max_in_flight, "clips begun, per device")
      ->capture_default_str();
  app.add_option("--marginal", options.marginal, "a further clip's part of a shared step")
      ->capture_default_str();
  app.add_option("--noise", options.noise, "of every piece of work")->capture_default_str();
  app.add_option("--policies", policies, "service, fcfs, priority, stretch=N, usage=N")
      ->delimiter(',');
  app.add_flag("--json", json, "one JSON object on standard output");
  CLI11_PARSE(app, argc, argv);

  const Trace trace = file.empty() ? MakeTrace(made) : ReadTrace(file);
  const auto slow = static_cast<int>(slow_share * made.devices + 0.5);
  for (int i = 0; i < made.devices; ++i) options.speeds.push_back(i < slow ? slow_speed : 1.0);
  options.seed = made.seed;

  std::vector<SimulationOptions> runs(policies.size(), options);
  for (std::size_t i = 0; i < runs.size(); ++i) runs[i].limits.order = OrderOf(policies[i]);
  std::vector<SimulationResult> results(runs.size());
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    threads.emplace_back([&, i] { results[i] = Simulate(trace, runs[i]); });
  }
  for (std::thread& thread : threads) thread.join();

  Json all = Json::array();
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (json) {
      all.push_back(ToJson(policies[i], results[i]));
    } else {
      Print(policies[i], results[i]);
    }
  }
  if (json) {
    std::cout
        << Json({{"jobs", trace.jobs.size()}, {"devices", made.devices}, {"runs", all}}).dump(2)
        << '\n';
  }
  return 0;
}

}  // namespace
}  // namespace slalom

int main(int argc, char** argv) {
  try {
    return slalom::Main(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "simulate: " << error.what() << '\n';
    return 1;
  }
}
