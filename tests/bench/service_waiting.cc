#include "tests/bench/service_waiting.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "tests/bench/bench_server.h"
#include "tests/bench/load_call.h"

namespace slalom::bench {
namespace {

constexpr auto kPatience = std::chrono::seconds(60);

// A client with a connection of its own whose job waits until it is let go.
class WaitingClient final : public grpc::ClientReadReactor<v1::GenerateVideoResponse> {
 public:
  WaitingClient(const std::string& address, const v1::GenerateVideoRequest& request) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    stub_ = v1::VideoGeneration::NewStub(
        grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments));
    request_ = request;
    stub_->async()->GenerateVideo(&context_, &request_, this);
    StartRead(&event_);
    StartCall();
  }

  ~WaitingClient() override {
    context_.TryCancel();
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return done_; });
  }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    const std::lock_guard lock(mutex_);
    accepted_ = true;
    changed_.notify_all();
    StartRead(&event_);
  }

  void OnDone(const grpc::Status& status) override {
    const std::lock_guard lock(mutex_);
    status_ = status;
    done_ = true;
    changed_.notify_all();
  }

  void WaitUntilAccepted() {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, kPatience, [this] { return accepted_ || done_; });
    if (!accepted_) throw std::runtime_error("not accepted: " + status_.error_message());
  }

 private:
  std::unique_ptr<v1::VideoGeneration::Stub> stub_;
  grpc::ClientContext context_;
  v1::GenerateVideoRequest request_;
  v1::GenerateVideoResponse event_;
  std::mutex mutex_;
  std::condition_variable changed_;
  grpc::Status status_;
  bool accepted_ = false;
  bool done_ = false;
};

// Keeps the device at work on jobs of high class, which those that wait stand behind.
class Served {
 public:
  Served(const std::string& address, v1::GenerateVideoRequest request)
      : stub_(v1::VideoGeneration::NewStub(
            grpc::CreateChannel(address, grpc::InsecureChannelCredentials()))),
        request_(std::move(request)) {
    request_.set_priority(v1::PRIORITY_HIGH);
    // Two at a time: there is always a next one.
    for (int i = 0; i < 2; ++i) StartNext();
  }
  ~Served() {
    std::unique_lock lock(mutex_);
    stop_ = true;
    changed_.wait(lock, [this] { return running_ == 0; });
  }

  void WaitForClips(int clips) {
    std::unique_lock lock(mutex_);
    const int until = done_ + clips;
    changed_.wait(lock, [&] { return done_ >= until || failed_ > 0; });
    if (failed_ > 0) throw std::runtime_error("a call failed");
  }

 private:
  void StartNext() {
    CallPlan plan;
    plan.request = request_;
    {
      const std::lock_guard lock(mutex_);
      if (stop_) return;
      ++running_;
    }
    StartCall(*stub_, std::move(plan), [this](const CallResult& result) {
      StartNext();
      const std::lock_guard lock(mutex_);
      --running_;
      ++done_;
      if (result.code != 0) ++failed_;
      changed_.notify_all();
    });
  }

  const std::unique_ptr<v1::VideoGeneration::Stub> stub_;
  v1::GenerateVideoRequest request_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stop_ = false;
  int running_ = 0;
  int done_ = 0;
  int failed_ = 0;
};

struct Steps {
  double seconds = 0;  // of one step: by the clock
  double run = 0;      // the device's thread on a core, all of its work over the steps
  double lost = 0;     // the same thread, waiting for a core
};

Steps Measure(const BenchServer& server, Served* served, int clips) {
  served->WaitForClips(1);  // what is under way belongs to neither side
  const double seconds = server.Metric("slalom_denoise_step_seconds_sum");
  const double count = server.Metric("slalom_denoise_step_seconds_count");
  const ThreadTime thread = server.DeviceThread();
  served->WaitForClips(clips);
  const ThreadTime after = server.DeviceThread();
  const double steps = server.Metric("slalom_denoise_step_seconds_count") - count;
  return {(server.Metric("slalom_denoise_step_seconds_sum") - seconds) / steps,
          (after.run_seconds - thread.run_seconds) / steps,
          (after.wait_seconds - thread.wait_seconds) / steps};
}

using Clients = std::vector<std::unique_ptr<WaitingClient>>;

Clients Connect(const BenchServer& server, const ServiceBenchOptions& options) {
  v1::GenerateVideoRequest request = options.clip;
  request.set_priority(v1::PRIORITY_LOW);
  Clients clients;
  for (int i = 0; i < options.clients; ++i) {
    request.set_seed(static_cast<std::uint64_t>(i));
    clients.push_back(std::make_unique<WaitingClient>(server.address(), request));
  }
  for (const auto& client : clients) client->WaitUntilAccepted();
  return clients;
}

void Print(const char* what, const BenchServer& server, const Steps& steps) {
  std::printf("%-10s %9.1f MiB %5d threads   step %8.3f ms   device thread %8.3f ms, %7.3f lost\n",
              what, server.ResidentMib(), server.Threads(), 1e3 * steps.seconds, 1e3 * steps.run,
              1e3 * steps.lost);
}

// Of rounds in pairs, which share what else the machine was doing.
double MedianRatio(const std::vector<Steps>& a, const std::vector<Steps>& b, double Steps::*field) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < a.size(); ++i) ratios.push_back((a[i].*field) / (b[i].*field));
  return Median(std::move(ratios));
}

}  // namespace

void BenchWaiting(const ServiceBenchOptions& options) {
  std::vector<std::string> arguments = options.ServerArguments();
  arguments.insert(arguments.end(), {"--max-queue", std::to_string(options.clients + 10)});
  const BenchServer server(options.slalomd, arguments);
  Served served(server.address(), options.clip);
  served.WaitForClips(2 * options.clips);
  std::vector<Steps> calm;
  std::vector<Steps> crowded;
  std::vector<double> before;
  std::vector<double> with;
  for (int i = 0; i < options.rounds; ++i) {
    calm.push_back(Measure(server, &served, options.clips));
    before.push_back(server.ResidentMib());
    Print("calm", server, calm.back());
    const Clients clients = Connect(server, options);
    crowded.push_back(Measure(server, &served, options.clips));
    with.push_back(server.ResidentMib());
    Print("crowded", server, crowded.back());
  }
  const double added = *std::max_element(with.begin(), with.end()) - before.front();
  std::printf("%d clients that wait: %.1f MiB at most (%.1f KiB each)\n", options.clients, added,
              1024 * added / options.clients);
  std::printf("a step with them / without, median of rounds: %.3f by the clock, %.3f on a core\n",
              MedianRatio(crowded, calm, &Steps::seconds), MedianRatio(crowded, calm, &Steps::run));
}

}  // namespace slalom::bench
