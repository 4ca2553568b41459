// What slalomd is told: flags and configuration file. The only place of the server that reads
// either.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "kernels/core/device.h"

namespace slalom {

struct HostPort {
  std::string host;
  int port = 0;  // 0: any free one

  std::string ToString() const;  // "127.0.0.1:8500", "[::1]:8500"
};

// Parses "HOST:PORT" or "[IPV6]:PORT". Throws Error(kInvalidArgument) that names `field`.
HostPort ParseHostPort(const std::string& field, const std::string& text);

struct TenantOptions {
  std::string name;
  std::string token;
  int max_jobs = 0;                // live jobs at a time; 0: no limit of its own
  double requests_per_minute = 0;  // of GenerateVideo, refused ones included; 0: no limit
  double burst = 0;                // so many at once; 0: a minute's worth
  double weight = 1;               // share of the devices where tenants compete
};

struct ServerConfig {
  std::vector<std::string> models;  // folders; empty: the shipped demo model
  HostPort listen{"127.0.0.1", 8500};
  HostPort http_listen{"127.0.0.1", 9500};
  std::vector<Device> devices;     // empty: auto, every CUDA device there is, else the CPU
  std::string dtype = "auto";      // auto | f32 | bf16
  int cpu_threads = 0;             // of a CPU device; 0: one per core
  int max_batch = 0;               // clips per denoising step; 0: what the device takes
  int max_in_flight = 8;           // clips begun and not done, per device
  int max_decoding = 1;            // decoders at a time, per device
  int clip_memory_mib = 0;         // device memory for clips in flight; 0: what the device has
  std::string state_dir;           // where jobs and videos survive; empty: nothing does
  double checkpoint_seconds = 10;  // of a job's denoising between checkpoints, with a state_dir
  int prompt_cache_mib = 64;       // host memory per pipeline for prompts' embeddings
  std::string warm_up = "auto";    // auto | none | WxHxFRAMES[,...], see warm_up.h
  int max_queue = 64;              // jobs that wait
  int max_streams = 4096;          // open GenerateVideo and ResumeVideo calls
  double drain_seconds = 300;      // how long running jobs may finish after SIGTERM
  double stall_seconds = 120;      // an encoder that takes no frames for so long loses its job
  double job_retention_seconds = 3600;  // how long an ended job and its video are kept
  int max_kept_jobs = 1000;             // ended jobs kept at most
  int max_kept_mib = 0;                 // their videos; 0: no limit
  std::string log_level = "info";       // trace | debug | info | warn | error
  std::vector<TenantOptions> tenants;   // only in the file; empty: everybody, without a token
};

struct CommandLine {
  ServerConfig config;
  // Set for --help and --version: print it and exit with 0.
  std::optional<std::string> message;
};

// Reads the flags, and the file that --config names; a flag wins over the file. Throws
// Error(kInvalidArgument) that names the option, its value and what is allowed; kNotFound when the
// file is not there.
CommandLine ReadCommandLine(int argc, const char* const* argv);

// The file alone, YAML or JSON, on top of `base`. For ReadCommandLine and tests.
ServerConfig ReadConfigFile(const std::string& path, const ServerConfig& base);

// The shipped model's folder: beside an installed executable (../share/slalom/models/demo) or in
// the source tree above a build folder. Throws Error(kNotFound).
std::string DemoModelFolder();

}  // namespace slalom
