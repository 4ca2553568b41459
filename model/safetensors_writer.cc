#include "model/safetensors_writer.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <system_error>
#include <vector>

#include "kernels/core/error.h"
#include "nlohmann/json.hpp"

namespace slalom {
namespace {

constexpr std::size_t kDataAlignment = 8;

using NamedTensor = std::pair<const std::string, Tensor>;

std::vector<const NamedTensor*> LayOut(const std::map<std::string, Tensor>& tensors) {
  std::vector<const NamedTensor*> order;
  for (const NamedTensor& item : tensors) {
    const auto& [name, tensor] = item;
    if (name.empty() || name == "__metadata__") {
      throw Error(ErrorCode::kInvalidArgument, "'" + name + "' cannot be a tensor's name");
    }
    if (!tensor.defined() || !tensor.device().is_cpu()) {
      throw Error(ErrorCode::kInvalidArgument, "tensor '" + name + "' is not in host memory");
    }
    order.push_back(&item);
  }
  std::ranges::stable_sort(order, std::greater{},
                           [](const NamedTensor* item) { return ByteSize(item->second.dtype()); });
  return order;
}

std::string MakeHeader(const std::vector<const NamedTensor*>& order,
                       const std::map<std::string, std::string>& metadata,
                       const std::string& path) {
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::uint64_t offset = 0;
  for (const NamedTensor* item : order) {
    const auto& [name, tensor] = *item;
    const auto dims = tensor.shape().dims();
    header[name] = {{"dtype", DTypeName(tensor.dtype())},
                    {"shape", std::vector<std::int64_t>(dims.begin(), dims.end())},
                    {"data_offsets", {offset, offset + tensor.NumBytes()}}};
    offset += tensor.NumBytes();
  }
  try {
    std::string text = header.dump();
    text.resize((text.size() + kDataAlignment - 1) / kDataAlignment * kDataAlignment, ' ');
    return text;
  } catch (const nlohmann::json::exception& e) {
    throw Error(ErrorCode::kInvalidArgument, path + ": a name is not UTF-8: " + e.what());
  }
}

[[noreturn]] void ThrowErrno(const std::string& path, const char* what) {
  throw Error(ErrorCode::kUnavailable,
              path + ": cannot " + what + ": " + std::generic_category().message(errno));
}

// A file under a temporary name; it is deleted again unless Commit gives it its own.
class PendingFile {
 public:
  explicit PendingFile(const std::string& path) : path_(path), temporary_(path + ".partial") {
    file_ = std::fopen(temporary_.c_str(), "wb");
    if (file_ == nullptr) ThrowErrno(temporary_, "create");
  }
  ~PendingFile() {
    if (file_ != nullptr) std::fclose(file_);
    if (!committed_) std::remove(temporary_.c_str());
  }
  PendingFile(const PendingFile&) = delete;
  PendingFile& operator=(const PendingFile&) = delete;

  void Write(const void* data, std::size_t bytes) {
    if (bytes != 0 && std::fwrite(data, 1, bytes, file_) != bytes) ThrowErrno(temporary_, "write");
  }
  void Commit() {
    const bool closed = std::fclose(file_) == 0;
    file_ = nullptr;
    if (!closed) ThrowErrno(temporary_, "write");
    if (std::rename(temporary_.c_str(), path_.c_str()) != 0) ThrowErrno(path_, "create");
    committed_ = true;
  }

 private:
  std::string path_;
  std::string temporary_;
  std::FILE* file_ = nullptr;
  bool committed_ = false;
};

}  // namespace

void WriteSafetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  const std::vector<const NamedTensor*> order = LayOut(tensors);
  const std::string header = MakeHeader(order, metadata, path);
  const std::uint64_t header_bytes = header.size();
  PendingFile file(path);
  file.Write(&header_bytes, sizeof(header_bytes));
  file.Write(header.data(), header.size());
  for (const NamedTensor* item : order) file.Write(item->second.raw(), item->second.NumBytes());
  file.Commit();
}

}  // namespace slalom
