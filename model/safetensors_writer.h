// Writing safetensors: for tests, run_network and tools that make models.
#pragma once

#include <map>
#include <string>

#include "kernels/core/tensor.h"

namespace slalom {

// Writes host tensors to one file. The data stands in descending order of element size, so that
// every tensor is aligned without padding, which the format forbids. The file appears under its
// name only when it is complete. Throws Error(kInvalidArgument) for an undefined or a device tensor
// and for a name that is empty or reserved, Error(kUnavailable) naming the path when the disk
// refuses.
void WriteSafetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                      const std::map<std::string, std::string>& metadata = {});

}  // namespace slalom
