// The decoder half of Wan's causal video VAE: latents -> frames.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/tensor.h"
#include "model/config.h"
#include "model/weights.h"

namespace slalom {

// What one clip's decoding has to remember between pieces: for every convolution that looks back in
// time, the last frames of its input. Dropping it frees the memory.
class DecoderState {
 public:
  // No latent frame has been decoded yet: the one to come is the clip's first.
  bool fresh() const { return !started_; }

 private:
  friend class VideoDecoder;
  bool started_ = false;
  std::vector<Tensor> history_;  // in execution order; [n, H, W, C] T, n <= 2; undefined when empty
};

// Mirrors diffusers' AutoencoderKLWan decoder (Wan2.1). Activations are channels-last,
// [T, H, W, C], one clip at a time.
//
// A clip may be decoded in one piece or in any pieces of whole latent frames: the result is the
// same up to the rounding of the convolutions. The first latent frame of a clip makes one video
// frame, every further one makes temporal_scale() frames. The rule for the first one: an upsampler
// in time passes it on as it is, and it's not part of that upsampler's history either.
//
// Owns its weights. Calls are made by the backend's one thread.
class VideoDecoder {
 public:
  // Reads the tensors of the decoder (the encoder's are left alone); `dtype` is T. Throws Error
  // when one is missing or has another shape.
  VideoDecoder(Backend& backend, const Weights& weights, const VaeConfig& config, DType dtype);

  // Decodes the next latent frames of a clip: latents [n, h, w, z_dim] in T or f32, de-normalised,
  // on the device. Returns [frames, 8h, 8w, 3] T, not clamped.
  Tensor Decode(Backend& backend, const Tensor& latents, DecoderState& state) const;

  // latent [z_dim, F, h, w] f32 as the transformer sees it -> host [F, h, w, z_dim] f32 in the
  // decoder's units: z * std + mean per channel, unless `normalised` is false. A few MB, made on
  // the host once per clip.
  Tensor ToDecoderLayout(Backend& backend, const Tensor& latent, bool normalised = true) const;

  // Frames that n latent frames make, `first` when the clip's first is among them.
  std::int64_t FramesOf(std::int64_t n, bool first) const;

  // --- predictions, from shapes alone ---
  // Multiply-adds x 2 of decoding `frames` latent frames of h x w, the first of the clip included.
  double Flops(std::int64_t frames, std::int64_t h, std::int64_t w) const;
  // Device memory of a DecoderState in full, and of one Decode of one latent frame beside it.
  std::size_t StateBytes(std::int64_t h, std::int64_t w) const;
  std::size_t WorkBytes(std::int64_t h, std::int64_t w) const;

  const VaeConfig& config() const { return config_; }

 private:
  struct Conv {
    Tensor weight;  // [Co, kt, kh, kw, Ci] T
    Tensor bias;    // [Co] f32
  };
  struct ResidualBlock {
    Tensor norm1;  // [Ci] f32
    Conv conv1;
    Tensor norm2;  // [Co] f32
    Conv conv2;
    Conv shortcut;  // 1 x 1 x 1; undefined when Ci == Co
  };
  struct AttentionBlock {
    Tensor norm;       // [C] f32
    Tensor qkv;        // [3C, C] T
    Tensor qkv_bias;   // [3C] f32
    Tensor proj;       // [C, C] T
    Tensor proj_bias;  // [C] f32
  };
  struct Stage {
    std::vector<ResidualBlock> blocks;
    Conv time_conv;  // (3, 1, 1), C -> 2C; undefined when this stage keeps the frame rate
    Conv resample;   // 3 x 3 after doubling, C -> C / 2; undefined in the last stage
  };
  class Loader;
  class Pass;

  // Calls visit(conv, frames, height, width) for every convolution in execution order, with the
  // size of its input when `frames` latent frames of h x w are decoded; `first` as in FramesOf.
  template <typename Visitor>
  void ForEachConv(std::int64_t frames, std::int64_t h, std::int64_t w, bool first,
                   const Visitor& visit) const;

  VaeConfig config_;
  DType dtype_;
  // The CPU's convolution works on a copy of its input: behind its history, or doubled in size.
  bool packs_input_;
  Conv post_quant_;
  Conv conv_in_;
  ResidualBlock middle_in_;
  AttentionBlock middle_attention_;
  ResidualBlock middle_out_;
  std::vector<Stage> stages_;
  Tensor norm_out_;  // [C] f32
  Conv conv_out_;
};

}  // namespace slalom
