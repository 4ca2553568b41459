// OutputFile: a file that is either complete or not there.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace slalom::client {

// Writes to PATH.part; Commit makes it PATH. Without Commit the destructor removes the part. What
// is not a regular file (/dev/null, a pipe) is written directly.
class OutputFile {
 public:
  // Throws CallError(RESOURCE_EXHAUSTED or FAILED_PRECONDITION) that names the file, as all of its
  // methods do.
  explicit OutputFile(const std::string& path);
  ~OutputFile();

  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  // Bytes come in order; `offset` must be where the last ones ended.
  void Write(std::int64_t offset, std::string_view bytes);
  // On disk and under its name when this returns.
  void Commit();
  std::int64_t size() const { return size_; }

 private:
  const std::string path_;
  std::string part_;  // empty when written directly
  int fd_ = -1;
  std::int64_t size_ = 0;
};

}  // namespace slalom::client
