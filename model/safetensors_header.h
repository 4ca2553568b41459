// The header of a safetensors file, parsed and checked. Internal to model/.
// Format: https://github.com/huggingface/safetensors (u64 length, JSON, data).
#pragma once

#include <cstddef>
#include <map>
#include <span>
#include <string>

#include "kernels/core/tensor.h"

namespace slalom {

struct SafetensorsEntry {
  Shape shape;
  DType dtype = DType::kF32;
  std::size_t offset = 0;  // of the first byte, from the start of the file
};

struct SafetensorsHeader {
  std::map<std::string, SafetensorsEntry> tensors;
  std::map<std::string, std::string> metadata;
};

// `file` is the whole file, `path` its name for messages. On return every entry lies inside the
// file, is aligned to its element size and overlaps no other; together they cover the data, as the
// format demands. Throws Error(kDataLoss) when that is not so, Error(kInvalidArgument) for element
// types and ranks that we don't have.
SafetensorsHeader ParseSafetensorsHeader(std::span<const std::byte> file, const std::string& path);

}  // namespace slalom
