#include "tests/bench/service_throughput.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "model/pipeline.h"
#include "server/request.h"
#include "tests/bench/bench_server.h"
#include "tests/bench/load_call.h"

namespace slalom::bench {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Seconds for each clip of a round.
struct Round {
  double wall = 0;
  double device_run = 0;  // the thread that drives the device, on a core
  double process = 0;     // the whole process, on cores
  double busy_share = 0;  // of the wall time: the device at work
};

void MakeClip(const Pipeline& pipeline, const ClipSpec& spec) {
  const std::unique_ptr<Generation> clip = pipeline.Begin(spec);
  const std::array<Generation*, 1> batch = {clip.get()};
  while (!clip->denoised()) {
    if (!pipeline.DenoiseStep(batch).empty()) throw std::runtime_error("the clip is not finite");
  }
  while (pipeline.DecodeNext(*clip).num_frames() > 0 && !clip->decoded()) {
  }
}

Round RunBare(const Pipeline& pipeline, const ServiceBenchOptions& options) {
  ClipSpec spec = ResolveRequest(options.clip, pipeline);
  const ThreadTime thread = OwnThreadTime();
  const auto start = Clock::now();
  for (int i = 0; i < options.clips; ++i) {
    spec.seed = static_cast<std::uint64_t>(i);
    MakeClip(pipeline, spec);
  }
  Round round;
  round.wall = SecondsSince(start) / options.clips;
  round.device_run = (OwnThreadTime().run_seconds - thread.run_seconds) / options.clips;
  round.process = round.device_run;
  round.busy_share = 1;
  return round;
}

// `clients` calls at a time until `clips` are done.
class ClosedLoop {
 public:
  ClosedLoop(const ServiceBenchOptions& options,
             const std::vector<std::unique_ptr<v1::VideoGeneration::Stub>>& stubs)
      : options_(options), stubs_(stubs) {}

  void Run() {
    for (std::size_t i = 0; i < stubs_.size(); ++i) StartNext(i);
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return done_ == options_.clips; });
    if (failed_ > 0) throw std::runtime_error(std::to_string(failed_) + " calls failed");
  }

 private:
  void StartNext(std::size_t client) {
    CallPlan plan;
    plan.request = options_.clip;
    {
      const std::lock_guard lock(mutex_);
      if (started_ == options_.clips) return;
      plan.request.set_seed(static_cast<std::uint64_t>(started_++));
    }
    StartCall(*stubs_[client], std::move(plan), [this, client](const CallResult& result) {
      StartNext(client);
      const std::lock_guard lock(mutex_);
      ++done_;
      if (result.code != 0) ++failed_;
      changed_.notify_all();
    });
  }

  const ServiceBenchOptions& options_;
  const std::vector<std::unique_ptr<v1::VideoGeneration::Stub>>& stubs_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int started_ = 0;
  int done_ = 0;
  int failed_ = 0;
};

Round RunServed(const BenchServer& server, const ServiceBenchOptions& options,
                const std::vector<std::unique_ptr<v1::VideoGeneration::Stub>>& stubs) {
  const double busy = server.Metric("slalom_device_busy_seconds_total");
  const double process = server.CpuSeconds();
  const ThreadTime thread = server.DeviceThread();
  const auto start = Clock::now();
  ClosedLoop(options, stubs).Run();
  const double wall = SecondsSince(start);
  Round round;
  round.wall = wall / options.clips;
  round.device_run = (server.DeviceThread().run_seconds - thread.run_seconds) / options.clips;
  round.process = (server.CpuSeconds() - process) / options.clips;
  round.busy_share = (server.Metric("slalom_device_busy_seconds_total") - busy) / wall;
  return round;
}

void Print(const char* what, const std::vector<Round>& rounds) {
  const auto median = [&](double Round::*field) {
    std::vector<double> values;
    for (const Round& round : rounds) values.push_back(round.*field);
    return Median(std::move(values));
  };
  std::printf("%-14s %10.1f %12.4f %12.4f %12.4f %9.1f %%\n", what, 3600 / median(&Round::wall),
              median(&Round::wall), median(&Round::device_run), median(&Round::process),
              100 * median(&Round::busy_share));
}

}  // namespace

void BenchThroughput(const ServiceBenchOptions& options) {
  const auto pipeline = LoadPipeline(
      options.model, {.device = ParseDevice(options.device), .cpu_threads = options.threads});
  const BenchServer server(options.slalomd, options.ServerArguments());
  std::vector<std::unique_ptr<v1::VideoGeneration::Stub>> stubs;
  for (int i = 0; i < options.clients; ++i) {
    stubs.push_back(v1::VideoGeneration::NewStub(
        grpc::CreateChannel(server.address(), grpc::InsecureChannelCredentials())));
  }
  // Once without being counted: plans and caches.
  RunBare(*pipeline, options);
  RunServed(server, options, stubs);
  std::vector<Round> bare;
  std::vector<Round> served;
  std::vector<double> wall_ratios;
  std::vector<double> run_ratios;
  for (int i = 0; i < options.rounds; ++i) {
    bare.push_back(RunBare(*pipeline, options));
    served.push_back(RunServed(server, options, stubs));
    wall_ratios.push_back(bare.back().wall / served.back().wall);
    run_ratios.push_back(bare.back().device_run / served.back().device_run);
    std::printf(
        "round %d: server / bare pipeline: clips per hour %.3f, device thread's work %.3f\n", i + 1,
        wall_ratios.back(), run_ratios.back());
  }
  std::printf("%-14s %10s %12s %12s %12s %11s\n", "", "clips/h", "s/clip", "device CPU s",
              "process CPU s", "busy");
  Print("bare pipeline", bare);
  Print("server", served);
  std::printf("server / bare pipeline, median of rounds: clips per hour %.3f, work %.3f\n",
              Median(wall_ratios), Median(run_ratios));
}

}  // namespace slalom::bench
