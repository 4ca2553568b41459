// Host tensors in and out of the networks under test.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/tensor.h"
#include "model/weights.h"

namespace slalom {

using TensorMap = std::map<std::string, Tensor>;

// The named tensors of one safetensors file, each checked against what a network expects.
class NetworkInputs {
 public:
  // No file: every Get fails.
  NetworkInputs() = default;
  // Throws Error as Weights does.
  explicit NetworkInputs(const std::string& path) : weights_(Weights::OpenFile(path)) {}

  bool Has(const std::string& name) const { return weights_ && weights_->Has(name); }
  // The host tensor `name`. `dims` gives its shape, -1 where any size fits. Throws
  // Error(kInvalidArgument) naming file, tensor and what was expected.
  Tensor Get(const std::string& name, DType dtype, const std::vector<std::int64_t>& dims) const;
  // The same for a tensor that may have any shape.
  Tensor Get(const std::string& name, DType dtype) const;

 private:
  Tensor Find(const std::string& name, DType dtype, const std::vector<std::int64_t>* dims) const;

  std::optional<Weights> weights_;
};

// Copies to the device, converting f32 to `dtype`.
Tensor Upload(Backend& backend, const Tensor& host, DType dtype);
// Copies to the host; floating types arrive as f32.
Tensor Download(Backend& backend, const Tensor& tensor);
// Host f32 [A, B, C, D] -> [A, C, B, D]: between heads first and tokens first.
Tensor SwapMiddle(const Tensor& tensor);

}  // namespace slalom
