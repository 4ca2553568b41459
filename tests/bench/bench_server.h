// BenchServer: slalomd as a child process, and what it costs.
#pragma once

#include <string>
#include <vector>

#include "tests/e2e/process.h"

namespace slalom::bench {

// What a thread has had of the cores since it started, by the kernel's clock.
struct ThreadTime {
  double run_seconds = 0;
  double wait_seconds = 0;  // ready to run, but others ran
};
// Of the calling thread.
ThreadTime OwnThreadTime();

// Throws std::runtime_error where the server does not answer.
class BenchServer {
 public:
  // On free ports. Returns once it is ready.
  BenchServer(const std::string& slalomd, const std::vector<std::string>& arguments);

  const std::string& address() const { return address_; }
  double CpuSeconds() const;        // user and system, of all threads
  ThreadTime DeviceThread() const;  // of the device's worker
  double ResidentMib() const;
  int Threads() const;
  // The sum over the metric's series.
  double Metric(const std::string& name) const;

 private:
  double Status(const std::string& key) const;

  Process process_;
  std::string address_;
  std::string http_address_;
  std::string device_thread_;  // its folder under /proc
};

}  // namespace slalom::bench
