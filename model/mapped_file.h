// A file mapped into memory for reading. Internal to model/.
#pragma once

#include <cstddef>
#include <string>

namespace slalom {

// Owns the mapping; the file descriptor is closed once it is made. Concurrent reads are safe.
// Shortening the file while it is mapped makes later reads fault (SIGBUS), as with every mapping:
// replace model files by renaming new ones over them.
class MappedFile {
 public:
  // Throws Error: kNotFound, kPermissionDenied, kInvalidArgument (not a regular file), else
  // kUnavailable; each names the path.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::byte* data() const { return data_; }  // null when the file is empty
  std::size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace slalom
