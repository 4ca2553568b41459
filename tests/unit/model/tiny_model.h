// A complete model folder of a few hundred kilobytes with random weights: for tests that need every
// network to run, not to make sense.
#pragma once

#include <cstdint>
#include <string>

namespace slalom {

struct TinyModelOptions {
  int heads = 2;
  int head_dim = 32;
  int layers = 2;
  int ffn_dim = 96;
  int text_dim = 32;
  int text_len = 24;
  int vae_base_dim = 8;
  int vae_res_blocks = 1;
  // Clips that a request gets without further words: 8 tokens per frame pair, 5 frames.
  int width = 64;
  int height = 32;
  int num_frames = 5;
  int steps = 3;
  std::uint64_t seed = 1;
};

// Writes the diffusers layout (transformer, vae, text_encoder, tokenizer, scheduler, model_index,
// slalom.json) into `folder`, which is created. The same options give the same bytes.
void WriteTinyModel(const std::string& folder, const TinyModelOptions& options = {});

}  // namespace slalom
