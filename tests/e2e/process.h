// A child process with its output captured.
#pragma once

#include <sys/types.h>

#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace slalom {

class Process {
 public:
  struct Limits {
    std::optional<std::size_t> file_bytes;  // RLIMIT_FSIZE
  };

  explicit Process(const std::vector<std::string>& arguments, Limits limits = {});
  // Kills it if it still runs.
  ~Process();

  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  pid_t pid() const { return pid_; }
  void Signal(int signal);
  // The exit code, or 128 + the signal that ended it; -1 after a minute.
  int Wait();
  // What it has written so far, to standard output and standard error.
  std::string out() const;
  std::string err() const;
  // Polls until the output contains `text`. False when the process ends without, or after a minute.
  bool WaitForOutput(const std::string& text) const;

 private:
  void Collect(int fd, std::string* text);
  bool Ended() const;

  pid_t pid_ = -1;
  mutable std::mutex mutex_;
  std::string out_;
  std::string err_;
  int open_pipes_ = 2;
  std::optional<int> code_;
  std::thread out_reader_;
  std::thread err_reader_;
};

}  // namespace slalom
