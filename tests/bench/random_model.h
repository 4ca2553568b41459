// A complete model folder of random weights in the diffusers layout: for measuring speed and memory
// where the published weights are not at hand, and for tests that need a model which loads.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/core/dtype.h"
#include "model/config.h"

namespace slalom {

struct RandomModelOptions {
  TransformerConfig transformer;  // default: Wan2.1-T2V-1.3B
  TextEncoderConfig text_encoder;
  VaeConfig vae;
  double flow_shift = 3.0;
  // What is stored. The published folders hold f32 throughout; Wan's own text encoder is bf16.
  DType transformer_dtype = DType::kF32;
  DType text_encoder_dtype = DType::kBF16;
  DType vae_dtype = DType::kF32;
  // Which networks get weights; the small files are always written.
  bool write_transformer = true;
  bool write_text_encoder = true;
  bool write_vae = true;
  std::uint64_t seed = 1;
  std::int64_t shard_bytes = 5'000'000'000;
  int threads = 0;  // 0: one per core
};

// The transformer of "1.3b" or "14b". Throws Error(kInvalidArgument) for other names.
TransformerConfig PublishedTransformer(const std::string& size);

// Writes model_index.json, scheduler, tokenizer (one piece per printable ASCII character), and
// config.json with weights for each network, into `folder`, which is created. Old weights of the
// networks that are written are removed first. The same options give the same bytes. Throws
// Error(kUnavailable) when the disk refuses.
void WriteRandomModel(const std::string& folder, const RandomModelOptions& options);

}  // namespace slalom
