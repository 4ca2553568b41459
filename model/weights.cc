#include "model/weights.h"

#include <filesystem>
#include <utility>

#include "kernels/core/error.h"
#include "model/json_file.h"
#include "model/mapped_file.h"
#include "model/safetensors_header.h"

namespace slalom {
namespace {

namespace fs = std::filesystem;

struct Shard {
  std::string path;
  std::shared_ptr<const MappedFile> file;
  SafetensorsHeader header;
};

Shard OpenShard(const std::string& path) {
  Shard shard{path, std::make_shared<const MappedFile>(path), {}};
  shard.header = ParseSafetensorsHeader({shard.file->data(), shard.file->size()}, path);
  return shard;
}

// A shard stands beside its index: a name with a separator could reach any file of the machine.
std::string ShardName(const nlohmann::json& value, const std::string& index_path) {
  if (!value.is_string()) {
    throw Error(ErrorCode::kDataLoss, index_path + ": a shard's name is " + value.dump());
  }
  auto name = value.get<std::string>();
  if (name.empty() || name == "." || name == ".." ||
      name.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos) {
    throw Error(
        ErrorCode::kInvalidArgument,
        index_path + ": " + value.dump() + " is not the plain name of a file in the same folder");
  }
  return name;
}

// tensor -> shard's file name.
std::map<std::string, std::string> ReadIndex(const std::string& path) {
  const nlohmann::json index = ReadJsonFile(path);
  const auto weight_map = index.find("weight_map");
  if (weight_map == index.end() || !weight_map->is_object() || weight_map->empty()) {
    throw Error(ErrorCode::kDataLoss, path + ": has no weight_map");
  }
  std::map<std::string, std::string> result;
  for (const auto& [tensor, file] : weight_map->items()) {
    result.emplace(tensor, ShardName(file, path));
  }
  return result;
}

bool IsFloat(DType type) {
  return type == DType::kF32 || type == DType::kBF16 || type == DType::kF16 || type == DType::kF64;
}

}  // namespace

struct Weights::State {
  struct Entry {
    Tensor tensor;
    const std::string* file = nullptr;  // points into `files`
  };

  std::string path;
  std::map<std::string, Entry, std::less<>> tensors;
  std::map<std::string, std::string> metadata;
  std::map<std::string, std::shared_ptr<const MappedFile>> files;
  std::int64_t parameters = 0;

  void AddTensor(const std::string& name, const SafetensorsEntry& entry, const Shard& shard) {
    // The mapping is read-only; Tensor has no const form, and its users of Get only read.
    auto* address = const_cast<std::byte*>(shard.file->data() + entry.offset);
    const std::shared_ptr<std::byte> data(
        shard.file, address);  // shares ownership of the mapping, points into it
    const auto file = files.emplace(shard.path, shard.file).first;
    parameters += entry.shape.NumElements();
    tensors.emplace(name, Entry{Tensor(data, entry.shape, entry.dtype, Device{}), &file->first});
  }

  const Entry& Find(std::string_view name) const {
    const auto it = tensors.find(name);
    if (it == tensors.end()) {
      throw Error(ErrorCode::kNotFound, path + ": has no tensor '" + std::string(name) + "'");
    }
    return it->second;
  }
};

void Weights::CheckStored(const State& state, std::string_view name, const Shape& expected,
                          DType dtype) {
  const State::Entry& entry = state.Find(name);
  const Tensor& stored = entry.tensor;
  const std::string where = *entry.file + ": tensor '" + std::string(name) + "' ";
  if (!(stored.shape() == expected)) {
    throw Error(ErrorCode::kInvalidArgument, where + "has the shape " + ToString(stored.shape()) +
                                                 ", expected " + ToString(expected));
  }
  if (stored.dtype() != dtype && !(IsFloat(stored.dtype()) && IsFloat(dtype))) {
    throw Error(ErrorCode::kInvalidArgument, where + "has the element type " +
                                                 DTypeName(stored.dtype()) + ", expected " +
                                                 DTypeName(dtype));
  }
}

Weights Weights::Open(const std::string& folder, const std::string& stem) {
  const std::string single = (fs::path(folder) / (stem + ".safetensors")).string();
  const std::string index_path = single + ".index.json";
  std::error_code ignored;
  if (fs::exists(single, ignored)) return OpenFile(single);
  if (!fs::exists(index_path, ignored)) {
    throw Error(ErrorCode::kNotFound,
                folder + ": has neither " + stem + ".safetensors nor its .index.json");
  }

  auto state = std::make_shared<State>();
  state->path = index_path;
  std::map<std::string, Shard> shards;
  for (const auto& [tensor, file] : ReadIndex(index_path)) {
    auto it = shards.find(file);
    if (it == shards.end()) {
      it = shards.emplace(file, OpenShard((fs::path(folder) / file).string())).first;
      state->metadata.insert(it->second.header.metadata.begin(), it->second.header.metadata.end());
    }
    const Shard& shard = it->second;
    const auto entry = shard.header.tensors.find(tensor);
    if (entry == shard.header.tensors.end()) {
      throw Error(ErrorCode::kDataLoss,
                  shard.path + ": has no tensor '" + tensor + "', which the index expects there");
    }
    state->AddTensor(tensor, entry->second, shard);
  }
  return Weights(std::move(state));
}

Weights Weights::OpenFile(const std::string& path) {
  const Shard shard = OpenShard(path);
  auto state = std::make_shared<State>();
  state->path = path;
  state->metadata = shard.header.metadata;
  for (const auto& [name, entry] : shard.header.tensors) state->AddTensor(name, entry, shard);
  return Weights(std::move(state));
}

bool Weights::Has(std::string_view name) const { return state_->tensors.contains(name); }

Tensor Weights::Get(std::string_view name) const { return state_->Find(name).tensor; }

Tensor Weights::Load(Backend& backend, std::string_view name, const Shape& expected,
                     DType dtype) const {
  // Checked before the allocation: a wrong expectation should not end as "out of memory".
  CheckStored(*state_, name, expected, dtype);
  Tensor loaded = backend.Allocate(expected, dtype);
  backend.Copy(Get(name), loaded);
  return loaded;
}

void Weights::LoadInto(Backend& backend, std::string_view name, const Tensor& out) const {
  CheckStored(*state_, name, out.shape(), out.dtype());
  backend.Copy(Get(name), out);
}

std::vector<std::string> Weights::Names() const {
  std::vector<std::string> names;
  names.reserve(state_->tensors.size());
  for (const auto& [name, entry] : state_->tensors) names.push_back(name);
  return names;
}

const std::map<std::string, std::string>& Weights::metadata() const { return state_->metadata; }

std::int64_t Weights::NumParameters() const { return state_->parameters; }

const std::string& Weights::path() const { return state_->path; }

}  // namespace slalom
