// Safetensors files of random values, written faster than a disk takes them and without holding
// them in memory.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/core/dtype.h"
#include "tests/bench/model_layout.h"

namespace slalom {

struct RandomShardsOptions {
  DType dtype = DType::kF32;  // f32 or bf16
  std::uint64_t seed = 1;
  // A network that is larger is cut into shards of at most so much, with an index, as diffusers
  // and transformers cut it. A single tensor may be larger.
  std::int64_t shard_bytes = 5'000'000'000;
  int threads = 0;  // 0: one per core
};

// Writes <folder>/<stem>.safetensors, or <stem>-0000i-of-0000n.safetensors with
// <stem>.safetensors.index.json. The folder is created. A value depends on the seed, the tensor's
// name and its place in the tensor alone: not on threads, shards or the other tensors. Each thread
// holds a few MB. Throws Error(kUnavailable) naming the file when the disk refuses.
void WriteRandomShards(const std::string& folder, const std::string& stem,
                       const NetworkLayout& layout, const RandomShardsOptions& options);

}  // namespace slalom
