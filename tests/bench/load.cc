// Load generator: calls a running slalomd from many connections and reports latencies.
//
//   slalom_load --server 127.0.0.1:8500 --clients 8 --jobs 200                     closed loop
//   slalom_load --server 127.0.0.1:8500 --rate 3 --jobs 500 --mix short:80:...     open loop
#include <CLI/CLI.hpp>
#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <random>
#include <thread>

#include "tests/bench/load_report.h"

namespace slalom::bench {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  std::string server = "127.0.0.1:8500";
  std::string mix = "short:80:64x32x5:3,long:20:64x32x33:12";
  std::string token;
  std::string json;
  int clients = 4;
  double rate = 0;
  int jobs = 100;
  double deadline = 0;
  double disconnect = 0;
  double slow = 0;
  double pause = 0.2;
  int server_pid = 0;
  std::uint64_t seed = 1;
};

// A field of /proc/PID/status; 0 when there is none.
double ProcessStatus(int pid, const std::string& key) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(key + ":")) return std::stod(line.substr(key.size() + 1));
  }
  return 0;
}

class Load {
 public:
  explicit Load(const Options& options)
      : options_(options), mix_(ParseMix(options.mix)), random_(options.seed) {
    for (int i = 0; i < options.clients; ++i) {
      grpc::ChannelArguments arguments;
      // A connection of its own, as from another machine.
      arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
      stubs_.push_back(v1::VideoGeneration::NewStub(grpc::CreateCustomChannel(
          options.server, grpc::InsecureChannelCredentials(), arguments)));
    }
  }

  LoadReport Run() {
    const double before = ProcessStatus(options_.server_pid, "VmRSS") / 1024;
    const auto start = Clock::now();
    std::thread watcher([this] { Watch(); });
    if (options_.rate > 0) {
      RunOpen();
    } else {
      for (int i = 0; i < options_.clients; ++i) StartNext(static_cast<std::size_t>(i));
    }
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return static_cast<int>(results_.size()) == options_.jobs; });
      finished_ = true;
    }
    changed_.notify_all();
    watcher.join();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    std::lock_guard lock(mutex_);
    LoadReport report = MakeReport(mix_, results_, seconds);
    report.server_mib_before = before;
    report.server_mib_peak = peak_mib_;
    report.server_threads_peak = peak_threads_;
    return report;
  }

 private:
  // Arrivals of a Poisson process, over the connections in turn.
  void RunOpen() {
    std::mt19937_64 random(options_.seed + 1);
    std::exponential_distribution<double> gap(options_.rate);
    auto next = Clock::now();
    for (int i = 0; i < options_.jobs; ++i) {
      std::this_thread::sleep_until(next);
      StartNext(static_cast<std::size_t>(i) % stubs_.size());
      next +=
          std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(gap(random)));
    }
  }

  void StartNext(std::size_t client) {
    CallPlan plan;
    {
      std::lock_guard lock(mutex_);
      if (started_ == options_.jobs) return;
      ++started_;
      plan.load_class = Draw(mix_, random_);
      plan.request = mix_[plan.load_class].request;
      plan.request.set_seed(random_());
      plan.token = options_.token;
      std::uniform_real_distribution<double> chance(0, 1);
      if (options_.deadline > 0) plan.deadline_seconds = options_.deadline;
      if (chance(random_) < options_.disconnect) {
        plan.disconnect_after = 1 + static_cast<int>(random_() % 6);
      }
      if (chance(random_) < options_.slow) plan.pause_seconds = options_.pause;
    }
    StartCall(*stubs_[client], std::move(plan), [this, client](const CallResult& result) {
      if (options_.rate <= 0) StartNext(client);
      std::lock_guard lock(mutex_);
      results_.push_back(result);
      changed_.notify_all();
    });
  }

  void Watch() {
    std::unique_lock lock(mutex_);
    do {
      peak_mib_ = std::max(peak_mib_, ProcessStatus(options_.server_pid, "VmRSS") / 1024);
      peak_threads_ =
          std::max(peak_threads_, static_cast<int>(ProcessStatus(options_.server_pid, "Threads")));
    } while (!changed_.wait_for(lock, std::chrono::milliseconds(200), [&] { return finished_; }));
  }

  const Options options_;
  const std::vector<LoadClass> mix_;
  std::vector<std::unique_ptr<v1::VideoGeneration::Stub>> stubs_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::mt19937_64 random_;
  int started_ = 0;
  bool finished_ = false;
  std::vector<CallResult> results_;
  double peak_mib_ = 0;
  int peak_threads_ = 0;
};

}  // namespace
}  // namespace slalom::bench

int main(int argc, char** argv) {
  slalom::bench::Options options;
  CLI::App app{"Calls a running slalomd and reports latencies", "slalom_load"};
  app.add_option("--server", options.server, "HOST:PORT (127.0.0.1:8500)");
  app.add_option("--mix", options.mix, "NAME:SHARE:WxHxFRAMES:STEPS[:PRIORITY],...");
  app.add_option("--clients", options.clients, "connections; without --rate one call each (4)")
      ->check(CLI::PositiveNumber);
  app.add_option("--rate", options.rate, "open loop: calls per second, as a Poisson process");
  app.add_option("--jobs", options.jobs, "calls in all (100)")->check(CLI::PositiveNumber);
  app.add_option("--deadline", options.deadline, "seconds, of every call; 0: none");
  app.add_option("--disconnect", options.disconnect, "share of the calls that are left midway");
  app.add_option("--slow", options.slow, "share of the calls whose reader is slow");
  app.add_option("--pause", options.pause, "seconds between a slow reader's messages (0.2)");
  app.add_option("--token", options.token, "bearer token");
  app.add_option("--server-pid", options.server_pid, "report this process's memory and threads");
  app.add_option("--seed", options.seed, "of everything random (1)");
  app.add_option("--json", options.json, "write the report to this file, too");
  CLI11_PARSE(app, argc, argv);
  try {
    const slalom::bench::LoadReport report = slalom::bench::Load(options).Run();
    std::fputs(slalom::bench::ToTable(report).c_str(), stdout);
    if (!options.json.empty()) std::ofstream(options.json) << slalom::bench::ToJson(report);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "slalom_load: %s\n", error.what());
    return 2;
  }
}
