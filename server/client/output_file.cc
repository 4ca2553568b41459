#include "server/client/output_file.h"

#include <fcntl.h>
#include <grpcpp/support/status_code_enum.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "server/client/client.h"

namespace slalom::client {
namespace {

[[noreturn]] void Fail(const std::string& what, const std::string& path, int error) {
  const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  throw CallError(
      full ? grpc::StatusCode::RESOURCE_EXHAUSTED : grpc::StatusCode::FAILED_PRECONDITION,
      what + " " + path + ": " + std::strerror(error),
      std::string(full ? "make room there, or name another place by -o"
                       : "name a file by -o that can be written"));
}

bool IsSpecial(const std::string& path) {
  struct stat info {};
  return stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode) && !S_ISDIR(info.st_mode);
}

}  // namespace

OutputFile::OutputFile(const std::string& path) : path_(path) {
  struct stat info {};
  if (stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode)) Fail("cannot write", path, EISDIR);
  if (!IsSpecial(path)) part_ = path + ".part";
  const std::string& target = part_.empty() ? path_ : part_;
  fd_ = open(target.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd_ < 0) Fail("cannot write", target, errno);
}

OutputFile::~OutputFile() {
  if (fd_ < 0) return;
  close(fd_);
  if (!part_.empty()) unlink(part_.c_str());
}

void OutputFile::Write(std::int64_t offset, std::string_view bytes) {
  if (offset != size_) {
    throw CallError(
        grpc::StatusCode::DATA_LOSS,
        "the stream jumped from byte " + std::to_string(size_) + " to " + std::to_string(offset));
  }
  while (!bytes.empty()) {
    const ssize_t written = write(fd_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) Fail("cannot write", path_, written < 0 ? errno : ENOSPC);
    bytes.remove_prefix(static_cast<std::size_t>(written));
    size_ += written;
  }
}

void OutputFile::Commit() {
  if (!part_.empty() && fsync(fd_) != 0) Fail("cannot write", path_, errno);
  const int fd = fd_;
  fd_ = -1;
  const bool closed = close(fd) == 0;
  const int error = errno;
  if (part_.empty()) {
    if (!closed) Fail("cannot write", path_, error);
    return;
  }
  if (!closed || rename(part_.c_str(), path_.c_str()) != 0) {
    const int reason = closed ? errno : error;
    unlink(part_.c_str());
    Fail("cannot write", path_, reason);
  }
}

}  // namespace slalom::client
