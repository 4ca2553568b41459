#include "tests/e2e/soak_server.h"

#include <csignal>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace slalom {

SoakServer::SoakServer(std::string slalomd, std::string model, std::string folder)
    : slalomd_(std::move(slalomd)), model_(std::move(model)), folder_(std::move(folder)) {
  Start("127.0.0.1:0");
}

void SoakServer::Start(const std::string& listen) {
  process_ = std::make_unique<Process>(std::vector<std::string>{
      slalomd_, "--models", model_, "--listen", listen, "--http-listen", "127.0.0.1:0", "--device",
      "cpu", "--cpu-threads", "1", "--state-dir", folder_ + "/state",
      // Every step, so that every kill finds one.
      "--checkpoint-seconds", "0", "--max-kept-jobs", "1000000", "--log-level", "warn"});
  const std::string ready = "slalomd ready grpc=";
  if (!process_->WaitForOutput(ready)) throw std::runtime_error("no start: " + process_->err());
  const std::string out = process_->out();
  const std::size_t begin = out.find(ready) + ready.size();
  address_ = out.substr(begin, out.find(' ', begin) - begin);
}

void SoakServer::KillAndRestart() {
  std::lock_guard lock(mutex_);
  process_->Signal(SIGKILL);
  process_->Wait();
  KeepReports();
  Start(address_);
}

// A process that is killed has no exit code by which a sanitizer could tell.
void SoakServer::KeepReports() {
  const std::string log = process_->err();
  for (const char* sign : {"Sanitizer", "runtime error:"}) {
    if (log.find(sign) == std::string::npos) continue;
    reports_ += log;
    return;
  }
}

std::string SoakServer::sanitizer_reports() const {
  std::lock_guard lock(mutex_);
  return reports_;
}

int SoakServer::Stop() {
  process_->Signal(SIGTERM);
  return process_->Wait();
}

std::string SoakServer::log() const {
  std::lock_guard lock(mutex_);
  return process_->err();
}

double SoakServer::Status(const std::string& key) const {
  std::lock_guard lock(mutex_);
  std::ifstream file("/proc/" + std::to_string(process_->pid()) + "/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(key + ":")) return std::stod(line.substr(key.size() + 1));
  }
  return -1;
}

double SoakServer::ResidentMib() const { return Status("VmRSS") / 1024; }
int SoakServer::Threads() const { return static_cast<int>(Status("Threads")); }

int SoakServer::Descriptors() const {
  std::lock_guard lock(mutex_);
  const std::filesystem::directory_iterator files("/proc/" + std::to_string(process_->pid()) +
                                                  "/fd");
  return static_cast<int>(std::distance(begin(files), end(files)));
}

}  // namespace slalom
