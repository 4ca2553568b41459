#include "server/replay_buffer.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <memory>
#include <utility>

#include "kernels/core/error.h"

namespace slalom {
namespace {

[[noreturn]] void FailErrno(const std::string& what, int error) {
  const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  throw Error(full ? ErrorCode::kResourceExhausted : ErrorCode::kInternal,
              "state_dir: " + what + ": " + std::strerror(error));
}

int OpenTemporary() {
  std::string path = (std::filesystem::temp_directory_path() / "slalom-XXXXXX").string();
  const int fd = mkostemp(path.data(), O_CLOEXEC);
  if (fd < 0) FailErrno("cannot create '" + path + "'", errno);
  unlink(path.c_str());
  return fd;
}

}  // namespace

ReplayBuffer::ReplayBuffer() : fd_(OpenTemporary()) {}

ReplayBuffer::ReplayBuffer(const std::string& path)
    : fd_(open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600)), path_(path) {
  if (fd_ < 0) FailErrno("cannot create '" + path + "'", errno);
}

ReplayBuffer::ReplayBuffer(int fd, std::string path, std::int64_t size)
    : fd_(fd), path_(std::move(path)), size_(size) {}

std::unique_ptr<ReplayBuffer> ReplayBuffer::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) FailErrno("cannot open '" + path + "'", errno);
  struct stat info {};
  if (fstat(fd, &info) != 0) {
    const int error = errno;
    close(fd);
    FailErrno("cannot read '" + path + "'", error);
  }
  return std::unique_ptr<ReplayBuffer>(new ReplayBuffer(fd, path, info.st_size));
}

ReplayBuffer::~ReplayBuffer() { close(fd_); }

void ReplayBuffer::Append(std::span<const std::byte> bytes) {
  std::int64_t offset = size_.load(std::memory_order_relaxed);
  while (!bytes.empty()) {
    const ssize_t written = pwrite(fd_, bytes.data(), bytes.size(), offset);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) FailErrno("cannot keep the video", written < 0 ? errno : ENOSPC);
    offset += written;
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
  size_.store(offset, std::memory_order_release);
}

std::string ReplayBuffer::Read(std::int64_t offset, std::size_t limit) const {
  const std::int64_t available = size() - offset;
  if (available <= 0) return {};
  std::string bytes(std::min<std::size_t>(limit, static_cast<std::size_t>(available)), '\0');
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got = pread(fd_, bytes.data() + done, bytes.size() - done,
                              offset + static_cast<std::int64_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      throw Error(ErrorCode::kDataLoss,
                  "the kept video cannot be read: " +
                      std::string(got < 0 ? std::strerror(errno) : "cut off"));
    }
    done += static_cast<std::size_t>(got);
  }
  return bytes;
}

void ReplayBuffer::Remove() {
  if (!path_.empty()) unlink(path_.c_str());
}

}  // namespace slalom
