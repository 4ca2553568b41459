#include "tests/e2e/process.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <stdexcept>

namespace slalom {
namespace {

constexpr int kPolls = 6000;  // of ten milliseconds
constexpr auto kPoll = std::chrono::milliseconds(10);

// In the child, after fork: async-signal-safe calls only.
[[noreturn]] void Become(char* const* argv, int out, int err, const Process::Limits& limits) {
  dup2(out, STDOUT_FILENO);
  dup2(err, STDERR_FILENO);
  if (limits.file_bytes) {
    const rlimit limit{*limits.file_bytes, *limits.file_bytes};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  execv(argv[0], argv);
  _exit(127);
}

}  // namespace

Process::Process(const std::vector<std::string>& arguments, Limits limits) {
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  int out[2];
  int err[2];
  if (pipe2(out, O_CLOEXEC) != 0 || pipe2(err, O_CLOEXEC) != 0) {
    throw std::runtime_error("no pipe");
  }
  pid_ = fork();
  if (pid_ < 0) throw std::runtime_error("no fork");
  if (pid_ == 0) Become(argv.data(), out[1], err[1], limits);
  close(out[1]);
  close(err[1]);
  out_reader_ = std::thread([this, fd = out[0]] { Collect(fd, &out_); });
  err_reader_ = std::thread([this, fd = err[0]] { Collect(fd, &err_); });
}

Process::~Process() {
  if (!code_) {
    Signal(SIGKILL);
    Wait();
  }
  out_reader_.join();
  err_reader_.join();
}

void Process::Collect(int fd, std::string* text) {
  char buffer[4096];
  ssize_t n = 0;
  while ((n = read(fd, buffer, sizeof(buffer))) > 0) {
    std::lock_guard lock(mutex_);
    text->append(buffer, static_cast<std::size_t>(n));
  }
  close(fd);
  std::lock_guard lock(mutex_);
  --open_pipes_;
}

void Process::Signal(int signal) {
  if (!code_) kill(pid_, signal);
}

int Process::Wait() {
  for (int i = 0; i < kPolls && !code_; ++i) {
    int status = 0;
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    } else {
      std::this_thread::sleep_for(kPoll);
    }
  }
  // What it wrote last may still be in the pipes.
  for (int i = 0; i < kPolls && code_ && !Ended(); ++i) std::this_thread::sleep_for(kPoll);
  return code_.value_or(-1);
}

bool Process::Ended() const {
  std::lock_guard lock(mutex_);
  return open_pipes_ == 0;
}

std::string Process::out() const {
  std::lock_guard lock(mutex_);
  return out_;
}

std::string Process::err() const {
  std::lock_guard lock(mutex_);
  return err_;
}

bool Process::WaitForOutput(const std::string& text) const {
  for (int i = 0; i < kPolls; ++i) {
    const bool ended = Ended();
    {
      std::lock_guard lock(mutex_);
      if ((out_ + err_).find(text) != std::string::npos) return true;
    }
    if (ended) return false;
    std::this_thread::sleep_for(kPoll);
  }
  return false;
}

}  // namespace slalom
