// slalomd: reads what it is told, loads the models, serves until a signal.
#include <google/protobuf/stubs/logging.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#include <cstdio>
#include <ctime>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/error.h"
#include "model/pipeline.h"
#include "server/config.h"
#include "server/grpc_log.h"
#include "server/server.h"
#include "server/warm_up.h"

namespace slalom {
namespace {

constexpr int kExitBadConfiguration = 2;

// SIGTERM and SIGINT, blocked in every thread and taken by this one when it asks.
class Signals {
 public:
  Signals() {
    sigemptyset(&set_);
    sigaddset(&set_, SIGTERM);
    sigaddset(&set_, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set_, nullptr);
    // A client that is gone and a full disk are errors of a call, not of the process.
    std::signal(SIGPIPE, SIG_IGN);
    std::signal(SIGXFSZ, SIG_IGN);
  }

  void Wait() const {
    int signal = 0;
    sigwait(&set_, &signal);
  }

  bool Arrived() const {
    const timespec now{};
    return sigtimedwait(&set_, nullptr, &now) > 0;
  }

 private:
  sigset_t set_;
};

// Every client that is connected takes a descriptor, and the usual limit is 1024. An encoder takes
// one for its video, a client may have a connection without a stream.
void RaiseDescriptorLimit(const ServerConfig& config) {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
  const auto wanted = static_cast<rlim_t>(config.max_streams) * 2 + 100;
  if (limit.rlim_max >= wanted) return;
  spdlog::warn("{} descriptors may be open, too few for max_streams {}: allow {} (ulimit -Hn)",
               limit.rlim_max, config.max_streams, wanted);
}

std::vector<Device> Devices(const ServerConfig& config) {
  if (!config.devices.empty()) return config.devices;
  std::vector<Device> devices;
  for (int i = 0; i < CudaDeviceCount(); ++i) devices.push_back({Device::Kind::kCuda, i});
  if (devices.empty()) devices.push_back({});
  return devices;
}

// Empty when a signal came meanwhile: loading may take long.
std::vector<std::unique_ptr<Pipeline>> LoadPipelines(const ServerConfig& config,
                                                     const Signals& signals) {
  std::vector<std::string> folders = config.models;
  if (folders.empty()) folders.push_back(DemoModelFolder());
  std::vector<std::unique_ptr<Pipeline>> pipelines;
  for (const std::string& folder : folders) {
    for (const Device device : Devices(config)) {
      if (signals.Arrived()) return {};
      PipelineOptions options;
      options.device = device;
      options.dtype = config.dtype;
      options.cpu_threads = config.cpu_threads;
      options.max_batch = config.max_batch;
      options.prompt_cache_bytes = static_cast<std::size_t>(config.prompt_cache_mib) << 20;
      pipelines.push_back(LoadPipeline(folder, options));
      const Pipeline& pipeline = *pipelines.back();
      spdlog::info("loaded {} from {} on {}: {}, {:.1f} M parameters", pipeline.info().name, folder,
                   ToString(device), pipeline.device_description(),
                   static_cast<double>(pipeline.info().parameters) / 1e6);
      if (signals.Arrived()) return {};
      WarmUp(pipeline, ParseWarmUp("warm_up", config.warm_up));
    }
  }
  return pipelines;
}

int Run(const ServerConfig& config) {
  umask(0077);  // the state folder holds what people have asked for
  ForwardGrpcLog();
  RaiseDescriptorLimit(config);
  const Signals signals;
  Server server(config);
  spdlog::info("listening: grpc {}, http {}", server.grpc_address().ToString(),
               server.http_address().ToString());
  std::vector<std::unique_ptr<Pipeline>> pipelines = LoadPipelines(config, signals);
  if (pipelines.empty()) {
    spdlog::info("stopped before it was ready");
    return 0;
  }
  std::string models;
  for (const auto& pipeline : pipelines) {
    const std::string& name = pipeline->info().name;
    if (models.find(name) == std::string::npos) models += (models.empty() ? "" : ",") + name;
  }
  server.Serve(std::move(pipelines));
  std::printf("slalomd ready grpc=%s http=%s models=%s\n", server.grpc_address().ToString().c_str(),
              server.http_address().ToString().c_str(), models.c_str());
  std::fflush(stdout);

  signals.Wait();
  spdlog::info("draining: finishing what runs, at most {} s; a second signal ends it now",
               config.drain_seconds);
  bool again = false;
  const bool clean = server.Drain([&] { return again = again || signals.Arrived(); });
  spdlog::info(clean ? "drained" : "stopped with jobs unfinished");
  return clean ? 0 : 1;
}

// A wrong folder or option is a matter of configuration, a damaged file is not.
int ExitCode(const Error& error) {
  const bool configuration = error.code() == ErrorCode::kNotFound || !error.violations().empty();
  return configuration ? kExitBadConfiguration : 1;
}

}  // namespace
}  // namespace slalom

int main(int argc, char** argv) {
  using namespace slalom;
  // A request that cannot be parsed is answered, with the field's name; protobuf's own line about
  // it would let any client fill the log.
  google::protobuf::SetLogHandler(nullptr);
  // The log goes to standard error; standard output has the ready line.
  spdlog::set_default_logger(spdlog::stderr_color_mt("slalomd"));
  CommandLine command_line;
  try {
    command_line = ReadCommandLine(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "slalomd: %s\n", error.what());
    return kExitBadConfiguration;
  }
  if (command_line.message) {
    std::fputs(command_line.message->c_str(), stdout);
    return 0;
  }
  spdlog::set_level(spdlog::level::from_str(command_line.config.log_level));
  try {
    return Run(command_line.config);
  } catch (const Error& error) {
    std::fprintf(stderr, "slalomd: %s: %s\n", ErrorCodeName(error.code()), error.what());
    return ExitCode(error);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "slalomd: %s\n", error.what());
    return 1;
  }
}
