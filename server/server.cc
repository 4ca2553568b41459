#include "server/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "kernels/core/error.h"
#include "scheduler/scheduler.h"
#include "server/drain.h"
#include "server/grpc_log.h"
#include "server/http.h"
#include "server/job_archive.h"
#include "server/metrics.h"
#include "server/service.h"

namespace slalom {
namespace {

// A request is a prompt and some numbers; so much that one with far too long a prompt is still told
// of the limit.
constexpr int kMaxRequestBytes = 4 << 20;
// How long clients may read on after the last job is done.
constexpr auto kFlushTime = std::chrono::seconds(5);
// And in a hurry: those that listen hear why their job has ended.
constexpr auto kHurriedFlushTime = std::chrono::seconds(2);
constexpr const char* kCostNote = "costs";
constexpr int kTicksPerCostNote = 60;
constexpr auto kPollTime = std::chrono::milliseconds(100);
// A dead client is noticed within this, even where nothing resets its connection.
constexpr int kKeepaliveMs = 20'000;
constexpr int kKeepaliveTimeoutMs = 10'000;
// And a client may ask likewise: a stream that waits for its turn may be silent for long, and by
// default gRPC takes more than a ping in five minutes for an attack and ends the connection, which
// would cancel the job. Go's and Java's clients ask every ten seconds where they are told to.
constexpr int kClientPingMs = 1'000;
constexpr const char* kNotAccepting = "no connection is accepted any more";

// What the fullest device has for clips beside its weights, but for a reserve that no prediction
// covers: library handles, fragments. 0, no limit, where a device does not say.
std::size_t ClipMemory(const std::vector<std::unique_ptr<Pipeline>>& pipelines) {
  constexpr double kUsable = 0.95;
  std::map<std::string, MemoryStats> devices;
  for (const auto& pipeline : pipelines) {
    const MemoryStats memory = pipeline->Memory();
    MemoryStats& device = devices[ToString(pipeline->device())];
    device.bytes_in_use += memory.bytes_in_use;
    device.bytes_total = std::max(device.bytes_total, memory.bytes_total);
  }
  std::size_t least = std::numeric_limits<std::size_t>::max();
  for (const auto& [name, memory] : devices) {
    const auto usable = static_cast<std::size_t>(kUsable * static_cast<double>(memory.bytes_total));
    if (usable <= memory.bytes_in_use) return 0;
    least = std::min(least, usable - memory.bytes_in_use);
  }
  return devices.empty() ? 0 : least;
}

ServiceOptions MakeServiceOptions(const ServerConfig& config) {
  ServiceOptions options;
  options.desk.tenants = config.tenants;
  options.desk.retention = {config.job_retention_seconds, config.max_kept_jobs,
                            static_cast<std::int64_t>(config.max_kept_mib) << 20};
  // 0 would be "none" to the scheduler.
  options.desk.checkpoint_seconds = std::max(config.checkpoint_seconds, 1e-9);
  options.max_streams = config.max_streams;
  return options;
}

}  // namespace

class Server::Impl {
 public:
  explicit Impl(const ServerConfig& config)
      : config_(config), archive_(config.state_dir), service_(Options(), &archive_, &metrics_) {
    StartGrpc();
    http_ = std::make_unique<HttpServer>(
        config_.http_listen,
        HttpHandlers{[this] { return MetricsText(); }, [this] { return NotReady(); },
                     [this] { return Broken(); }});
  }

  ~Impl() {
    Drain([] { return true; });
    http_.reset();
    grpc_->Shutdown(std::chrono::system_clock::now());
    service_.Stop();
  }

  HostPort grpc_address() const { return {config_.listen.host, grpc_port_}; }
  HostPort http_address() const { return {config_.http_listen.host, http_->port()}; }

  void Serve(std::vector<std::unique_ptr<Pipeline>> pipelines) {
    SchedulerOptions options;
    options.max_queue = config_.max_queue;
    options.stall_seconds = config_.stall_seconds;
    // Without a limit of ours, each pipeline's MaxBatch decides.
    constexpr int kNoLimit = 1 << 10;
    options.limits.max_batch = config_.max_batch > 0 ? config_.max_batch : kNoLimit;
    options.limits.max_in_flight = config_.max_in_flight;
    options.limits.max_decoding = config_.max_decoding;
    options.limits.memory_bytes = config_.clip_memory_mib > 0
                                      ? static_cast<std::size_t>(config_.clip_memory_mib) << 20
                                      : ClipMemory(pipelines);
    options.cost_state = archive_.Note(kCostNote);
    options.on_step = [this](const StepObservation& step) { metrics_.ObserveStep(step); };
    auto scheduler = std::make_unique<Scheduler>(std::move(pipelines), std::move(options));
    {
      std::lock_guard lock(mutex_);
      scheduler_ = std::move(scheduler);
    }
    service_.Serve(scheduler_.get());
    serving_ = true;
    SetServing(true);
  }

  bool Drain(const std::function<bool()>& hurry) {
    if (drained_.exchange(true)) return true;
    serving_ = false;
    SetServing(false);
    const auto deadline =
        SchedulerClock::now() + std::chrono::duration_cast<SchedulerClock::duration>(
                                    std::chrono::duration<double>(config_.drain_seconds));
    bool clean = true;
    if (scheduler_) {
      scheduler_->StopAccepting();
      service_.ParkQueue();
      while (SchedulerClock::now() < deadline && !hurry() && Busy()) {
        std::this_thread::sleep_for(kPollTime);
      }
      clean = scheduler_->Drain(SchedulerClock::now());
      KeepCosts();
      // Frames that the devices have made may still be waiting for their encoders.
      const DrainTimes times = {.at_least = SchedulerClock::now() + kFlushTime,
                                .deadline = deadline};
      const auto settled = [this] { return service_.Settle(SchedulerClock::now() + kPollTime); };
      clean = SettleUntil(times, settled, hurry) && clean;
    }
    grpc_->Shutdown(std::chrono::system_clock::now() + (hurry() ? kHurriedFlushTime : kFlushTime));
    return clean || archive_.durable();
  }

 private:
  ServiceOptions Options() {
    ServiceOptions options = MakeServiceOptions(config_);
    // Probes by gRPC must hear of a lost device too.
    options.desk.on_tick = [this] {
      if (++ticks_ % kTicksPerCostNote == 0) KeepCosts();
      if (serving_ && !NotReady().empty() && serving_.exchange(false)) SetServing(false);
    };
    return options;
  }

  void StartGrpc() {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    // Two servers on one port would each get half of the calls.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                               kClientPingMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    builder.SetMaxReceiveMessageSize(kMaxRequestBytes);
    builder.AddListeningPort(config_.listen.ToString(), grpc::InsecureServerCredentials(),
                             &grpc_port_);
    builder.RegisterService(service_.grpc_service());
    grpc_ = builder.BuildAndStart();
    if (!grpc_ || grpc_port_ == 0) {
      throw Error(ErrorCode::kUnavailable, "listen: cannot bind " + config_.listen.ToString() +
                                               "; is another server running there?");
    }
    SetServing(false);
  }

  // What the scheduler has learnt about costs: the next process need not learn it again.
  void KeepCosts() {
    std::lock_guard lock(mutex_);
    if (!scheduler_) return;
    try {
      archive_.SetNote(kCostNote, scheduler_->CostState());
    } catch (const Error& error) {
      spdlog::warn("the learnt costs cannot be kept: {}", error.what());
    }
  }

  void SetServing(bool serving) {
    grpc::HealthCheckServiceInterface* health = grpc_->GetHealthCheckService();
    if (health == nullptr) return;
    health->SetServingStatus("", serving);
    health->SetServingStatus("slalom.v1.VideoGeneration", serving);
  }

  bool Busy() const {
    const SchedulerStats stats = scheduler_->Stats();
    int jobs = stats.in_flight;
    for (const int queued : stats.queued) jobs += queued;
    return jobs > 0;
  }

  std::string NotReady() const {
    std::lock_guard lock(mutex_);
    if (drained_) return "draining";
    if (!scheduler_) return "warming up";
    if (!scheduler_->accepting()) return "draining";
    if (!scheduler_->healthy()) return "a device is lost";
    if (GrpcStoppedAccepting()) return kNotAccepting;
    return "";
  }

  std::string Broken() const {
    std::lock_guard lock(mutex_);
    if (scheduler_ && scheduler_->lost()) return "every device is lost";
    return GrpcStoppedAccepting() ? kNotAccepting : "";
  }

  std::string MetricsText() {
    std::lock_guard lock(mutex_);
    if (!scheduler_) return metrics_.Text(nullptr);
    const SchedulerStats stats = scheduler_->Stats();
    return metrics_.Text(&stats);
  }

  const ServerConfig config_;
  Metrics metrics_;
  std::atomic<bool> serving_ = false;  // what health says
  std::atomic<bool> drained_ = false;
  int ticks_ = 0;             // the service's thread's
  mutable std::mutex mutex_;  // scheduler_ itself, which appears while HTTP is being served
  JobArchive archive_;
  // The service's jobs hold the encoders that the scheduler's jobs write to, and its handlers call
  // the scheduler: gRPC goes first, then the scheduler, then the service.
  VideoService service_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<grpc::Server> grpc_;
  std::unique_ptr<HttpServer> http_;
  int grpc_port_ = 0;
};

Server::Server(const ServerConfig& config) : impl_(std::make_unique<Impl>(config)) {}
Server::~Server() = default;
HostPort Server::grpc_address() const { return impl_->grpc_address(); }
HostPort Server::http_address() const { return impl_->http_address(); }
void Server::Serve(std::vector<std::unique_ptr<Pipeline>> pipelines) {
  impl_->Serve(std::move(pipelines));
}
bool Server::Drain(const std::function<bool()>& hurry) { return impl_->Drain(hurry); }

}  // namespace slalom
