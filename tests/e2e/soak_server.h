// SoakServer: slalomd that is killed and started again on the same ports and state folder.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "tests/e2e/process.h"

namespace slalom {

// Thread-safe but for Stop.
class SoakServer {
 public:
  // Starts the server; its state folder comes to lie in `folder`.
  SoakServer(std::string slalomd, std::string model, std::string folder);

  std::string address() const { return address_; }
  std::string jobs_folder() const { return folder_ + "/state/jobs"; }
  void KillAndRestart();
  // What sanitizers have said in the servers that were killed; "" when nothing.
  std::string sanitizer_reports() const;
  // Drains it. The exit code.
  int Stop();
  std::string log() const;

  // From /proc, of the process that runs now.
  double ResidentMib() const;
  int Threads() const;
  int Descriptors() const;

 private:
  void Start(const std::string& listen);
  void KeepReports();
  double Status(const std::string& key) const;

  const std::string slalomd_;
  const std::string model_;
  const std::string folder_;
  std::string address_;
  mutable std::mutex mutex_;
  std::unique_ptr<Process> process_;
  std::string reports_;
};

}  // namespace slalom
