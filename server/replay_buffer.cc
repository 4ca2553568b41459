#include "server/replay_buffer.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "kernels/core/error.h"

namespace slalom {
namespace {

[[noreturn]] void FailErrno(const std::string& what, int error) {
  const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  throw Error(full ? ErrorCode::kResourceExhausted : ErrorCode::kInternal,
              "state_dir: " + what + ": " + std::strerror(error) +
                  (full ? "; make room on the server's disk" : ""));
}

}  // namespace

// An open descriptor; the last user closes it.
class ReplayBuffer::File {
 public:
  explicit File(int fd) : fd(fd) {}
  ~File() { close(fd); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  static std::shared_ptr<File> Temporary() {
    std::error_code none;
    const std::filesystem::path folder = std::filesystem::temp_directory_path(none);
    std::string path = (folder / "slalom-XXXXXX").string();
    const int fd = none ? -1 : mkostemp(path.data(), O_CLOEXEC);
    if (fd < 0) {
      FailErrno("is not set, and no temporary file can be made (TMPDIR, else /tmp)",
                none ? none.value() : errno);
    }
    unlink(path.c_str());
    return std::make_shared<File>(fd);
  }
  static std::shared_ptr<File> Named(const std::string& path, int flags) {
    const int fd = open(path.c_str(), flags | O_CLOEXEC, 0600);
    if (fd < 0) FailErrno("cannot open '" + path + "'", errno);
    return std::make_shared<File>(fd);
  }

  const int fd;
};

ReplayBuffer::ReplayBuffer() = default;

ReplayBuffer::ReplayBuffer(std::string path) : path_(std::move(path)) {
  struct stat info {};
  if (stat(path_.c_str(), &info) == 0) {
    size_ = info.st_size;
  } else if (errno != ENOENT) {
    FailErrno("cannot read '" + path_ + "'", errno);
  }
}

ReplayBuffer::~ReplayBuffer() = default;

void ReplayBuffer::Append(std::span<const std::byte> bytes) {
  std::shared_ptr<File> file;
  {
    std::lock_guard lock(mutex_);
    if (removed_) throw Error(ErrorCode::kCancelled, "the video has been removed");
    if (!file_) file_ = path_.empty() ? File::Temporary() : File::Named(path_, O_RDWR | O_CREAT);
    file = file_;
  }
  const auto again = std::clamp<std::int64_t>(size() - end_, 0, std::ssize(bytes));
  if (again > 0) {
    CheckAgainst(bytes.first(static_cast<std::size_t>(again)));
    bytes = bytes.subspan(static_cast<std::size_t>(again));
    end_ += again;
  }
  while (!bytes.empty()) {
    const ssize_t written = pwrite(file->fd, bytes.data(), bytes.size(), end_);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) FailErrno("cannot keep the video", written < 0 ? errno : ENOSPC);
    end_ += written;
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
  if (end_ > size()) size_.store(end_, std::memory_order_release);
}

void ReplayBuffer::CheckAgainst(std::span<const std::byte> bytes) const {
  std::int64_t offset = end_;
  while (!bytes.empty()) {
    const std::string kept = Read(offset, std::min<std::size_t>(bytes.size(), 1 << 16));
    if (kept.empty() || std::memcmp(kept.data(), bytes.data(), kept.size()) != 0) {
      throw Error(ErrorCode::kDataLoss,
                  "the video came out differently when it was made once more, near byte " +
                      std::to_string(offset) + "; readers may have the first half of another");
    }
    offset += static_cast<std::int64_t>(kept.size());
    bytes = bytes.subspan(kept.size());
  }
}

void ReplayBuffer::Close(bool sync) {
  std::lock_guard lock(mutex_);
  if (path_.empty() || !file_) return;
  if (sync && fdatasync(file_->fd) != 0) FailErrno("cannot keep the video", errno);
  file_.reset();
}

std::shared_ptr<ReplayBuffer::File> ReplayBuffer::OpenFile() const {
  {
    std::lock_guard lock(mutex_);
    if (file_) return file_;
  }
  return File::Named(path_, O_RDONLY);
}

std::string ReplayBuffer::Read(std::int64_t offset, std::size_t limit) const {
  const std::int64_t available = size() - offset;
  if (available <= 0) return {};
  const std::shared_ptr<File> file = OpenFile();
  std::string bytes(std::min<std::size_t>(limit, static_cast<std::size_t>(available)), '\0');
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got = pread(file->fd, bytes.data() + done, bytes.size() - done,
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
  std::lock_guard lock(mutex_);
  removed_ = true;
  if (!path_.empty()) file_.reset();
  if (!path_.empty()) unlink(path_.c_str());
}

}  // namespace slalom
