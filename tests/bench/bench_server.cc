#include "tests/bench/bench_server.h"

#include <httplib.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>

namespace slalom::bench {
namespace {

namespace fs = std::filesystem;

std::vector<std::string> CommandLine(const std::string& slalomd,
                                     const std::vector<std::string>& arguments) {
  std::vector<std::string> line = {slalomd,       "--listen",    "127.0.0.1:0", "--http-listen",
                                   "127.0.0.1:0", "--log-level", "warn"};
  line.insert(line.end(), arguments.begin(), arguments.end());
  return line;
}

std::string ReadFile(const fs::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// What follows `key` up to the next blank.
std::string Field(const std::string& text, const std::string& key) {
  const std::size_t begin = text.find(key);
  if (begin == std::string::npos) throw std::runtime_error("slalomd's ready line has no " + key);
  const std::size_t end = text.find_first_of(" \n", begin);
  return text.substr(begin + key.size(), end - begin - key.size());
}

// proc(5), schedstat: nanoseconds on a core, nanoseconds on a run queue, slices.
ThreadTime ReadThreadTime(const std::string& folder) {
  std::istringstream text(ReadFile(folder + "/schedstat"));
  double run = 0;
  double wait = 0;
  text >> run >> wait;
  return {run * 1e-9, wait * 1e-9};
}

// The worker of the first device, by the name that it gives itself.
std::string FindDeviceThread(pid_t pid) {
  for (const auto& task : fs::directory_iterator("/proc/" + std::to_string(pid) + "/task")) {
    if (ReadFile(task.path() / "comm").starts_with("device ")) return task.path();
  }
  throw std::runtime_error("slalomd has no device thread");
}

}  // namespace

ThreadTime OwnThreadTime() { return ReadThreadTime("/proc/thread-self"); }

BenchServer::BenchServer(const std::string& slalomd, const std::vector<std::string>& arguments)
    : process_(CommandLine(slalomd, arguments)) {
  if (!process_.WaitForOutput("slalomd ready ")) {
    throw std::runtime_error("slalomd does not start: " + process_.err());
  }
  process_.WaitForOutput(" models=");
  address_ = Field(process_.out(), "grpc=");
  http_address_ = Field(process_.out(), "http=");
  device_thread_ = FindDeviceThread(process_.pid());
}

double BenchServer::CpuSeconds() const {
  // proc(5), stat: after the name in brackets come the state and ten numbers, then user and system.
  const std::string text = ReadFile("/proc/" + std::to_string(process_.pid()) + "/stat");
  std::istringstream rest(text.substr(text.rfind(')') + 1));
  std::string skipped;
  for (int i = 0; i < 11; ++i) rest >> skipped;
  double user = 0;
  double system = 0;
  rest >> user >> system;
  return (user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

ThreadTime BenchServer::DeviceThread() const { return ReadThreadTime(device_thread_); }

double BenchServer::Status(const std::string& key) const {
  std::istringstream text(ReadFile("/proc/" + std::to_string(process_.pid()) + "/status"));
  for (std::string line; std::getline(text, line);) {
    if (line.starts_with(key + ":")) return std::stod(line.substr(key.size() + 1));
  }
  throw std::runtime_error("slalomd has ended: " + process_.err());
}

double BenchServer::ResidentMib() const { return Status("VmRSS") / 1024; }
int BenchServer::Threads() const { return static_cast<int>(Status("Threads")); }

double BenchServer::Metric(const std::string& name) const {
  httplib::Client client("http://" + http_address_);
  const auto response = client.Get("/metrics");
  if (!response) throw std::runtime_error("slalomd has no /metrics");
  double sum = 0;
  std::istringstream text(response->body);
  for (std::string line; std::getline(text, line);) {
    if (line.starts_with(name + " ") || line.starts_with(name + "{")) {
      sum += std::stod(line.substr(line.rfind(' ')));
    }
  }
  return sum;
}

}  // namespace slalom::bench
