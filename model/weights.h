// Weights: named tensors in safetensors files, memory-mapped and checked before the first use.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/tensor.h"

namespace slalom {

// An immutable map name -> tensor over one safetensors file or over the shards that an index file
// names. Opening reads and checks the headers alone; data pages come in when they are touched.
//
// The files are treated as hostile: everything that the header claims is checked against the file
// before a pointer is made from it. Errors name the file and, where there is one, the tensor:
//   kNotFound         the file, a shard or a tensor is not there
//   kDataLoss         the bytes are damaged: truncated, bad JSON, offsets that overlap or run out
//   kInvalidArgument  well-formed, but not for us: an index that points out of its folder, an
//                     element type that we don't have, a shape other than the expected one
//
// Copies share the mapping, and so does every tensor from Get: the file stays mapped until the last
// of them goes. Concurrent use is safe.
class Weights {
 public:
  // <folder>/<stem>.safetensors, or else <folder>/<stem>.safetensors.index.json with its shards.
  // The stem is "diffusion_pytorch_model" for diffusers' networks, "model" for the text encoder.
  static Weights Open(const std::string& folder, const std::string& stem);
  static Weights OpenFile(const std::string& path);

  bool Has(std::string_view name) const;
  // Host view of the mapped bytes in the stored type. Read-only: writing to it crashes.
  Tensor Get(std::string_view name) const;
  // A copy on the backend's device, converted to `dtype`, when the shape is as expected.
  Tensor Load(Backend& backend, std::string_view name, const Shape& expected, DType dtype) const;
  // The same into memory that is already there, whose shape is the expected one.
  void LoadInto(Backend& backend, std::string_view name, const Tensor& out) const;

  // Sorted.
  std::vector<std::string> Names() const;
  // The file's __metadata__; for shards, all of them together.
  const std::map<std::string, std::string>& metadata() const;
  // Elements of all tensors.
  std::int64_t NumParameters() const;
  // What was opened: the file, or the index of the shards. For messages.
  const std::string& path() const;

 private:
  struct State;
  explicit Weights(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  static void CheckStored(const State& state, std::string_view name, const Shape& expected,
                          DType dtype);

  std::shared_ptr<const State> state_;
};

}  // namespace slalom
