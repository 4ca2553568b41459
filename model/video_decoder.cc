// The decoder's pass over the pyramid. Loading is in video_decoder_load.cc, predictions are in
// video_decoder_cost.cc.
#include "model/video_decoder.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>

#include "kernels/core/error.h"

namespace slalom {

// One call of Decode: walks through the layers and, in the same order, through the state's slots.
class VideoDecoder::Pass {
 public:
  Pass(const VideoDecoder& decoder, Backend& backend, DecoderState& state)
      : decoder_(decoder), backend_(backend), state_(state), first_(state.fresh()) {}

  Tensor Run(const Tensor& latents) {
    Tensor x = latents;
    if (x.dtype() != decoder_.dtype_) {
      x = Allocate(x, x.dim(3));
      backend_.Copy(latents, x);
    }
    x = Pointwise(decoder_.post_quant_, x);
    x = Causal(decoder_.conv_in_, x);
    x = Residual(decoder_.middle_in_, x);
    x = Attention(decoder_.middle_attention_, x);
    x = Residual(decoder_.middle_out_, x);
    for (const Stage& stage : decoder_.stages_) {
      for (const ResidualBlock& block : stage.blocks) x = Residual(block, x);
      if (stage.time_conv.weight.defined()) x = DoubleFrames(stage.time_conv, x);
      if (stage.resample.weight.defined()) x = DoubleSize(stage.resample, x);
    }
    backend_.ChannelNorm({.x = x, .gamma = decoder_.norm_out_, .silu = true, .out = x});
    x = Causal(decoder_.conv_out_, x);
    state_.started_ = true;
    return x;
  }

 private:
  // Like x, with other channels.
  Tensor Allocate(const Tensor& x, std::int64_t channels) {
    return backend_.Allocate({x.dim(0), x.dim(1), x.dim(2), channels}, decoder_.dtype_);
  }

  Tensor Pointwise(const Conv& conv, const Tensor& x) {
    const std::int64_t channels = conv.weight.dim(0);
    Tensor out = Allocate(x, channels);
    backend_.Linear({.x = x,
                     .weight = conv.weight.Reshape({channels, conv.weight.dim(-1)}),
                     .bias = conv.bias,
                     .out = out});
    return out;
  }

  Tensor& NextSlot() {
    if (slot_ == state_.history_.size()) state_.history_.emplace_back();
    return state_.history_[slot_++];
  }

  // A convolution that sees the frames before x; with `residual`, the sum replaces its values.
  Tensor Causal(const Conv& conv, const Tensor& x, const Tensor& residual = {}) {
    Tensor& history = NextSlot();
    Tensor out = residual.defined() ? residual : Allocate(x, conv.weight.dim(0));
    backend_.Conv({.x = x,
                   .history = history,
                   .weight = conv.weight,
                   .bias = conv.bias,
                   .residual = residual,
                   .out = out});
    Remember(x, conv.weight.dim(1) - 1, history);
    return out;
  }

  // Keeps the last `depth` frames of history followed by x. They are copied: a slice of x would
  // keep all of x alive.
  void Remember(const Tensor& x, std::int64_t depth, Tensor& history) {
    const std::int64_t from_x = std::min(depth, x.dim(0));
    const std::int64_t before = history.defined() ? history.dim(0) : 0;
    const std::int64_t from_history = std::min(depth - from_x, before);
    Tensor kept =
        backend_.Allocate({from_history + from_x, x.dim(1), x.dim(2), x.dim(3)}, x.dtype());
    if (from_history > 0) {
      backend_.Copy(history.Slice(before - from_history, before), kept.Slice(0, from_history));
    }
    backend_.Copy(x.Slice(x.dim(0) - from_x, x.dim(0)), kept.Slice(from_history, kept.dim(0)));
    history = std::move(kept);
  }

  // shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))); x's memory is reused.
  Tensor Residual(const ResidualBlock& block, const Tensor& x) {
    Tensor h = Allocate(x, x.dim(3));
    backend_.ChannelNorm({.x = x, .gamma = block.norm1, .silu = true, .out = h});
    h = Causal(block.conv1, h);
    backend_.ChannelNorm({.x = h, .gamma = block.norm2, .silu = true, .out = h});
    const bool same = !block.shortcut.weight.defined();
    return Causal(block.conv2, h, same ? x : Pointwise(block.shortcut, x));
  }

  // Self-attention among the positions of each frame, one head; added to x in place.
  Tensor Attention(const AttentionBlock& block, const Tensor& x) {
    const std::int64_t frames = x.dim(0);
    const std::int64_t positions = x.dim(1) * x.dim(2);
    const std::int64_t channels = x.dim(3);
    Tensor normed = Allocate(x, channels);
    backend_.ChannelNorm({.x = x, .gamma = block.norm, .out = normed});
    std::array<Tensor, 3> qkv;
    for (std::size_t i = 0; i < qkv.size(); ++i) {
      const auto begin = static_cast<std::int64_t>(i) * channels;
      qkv[i] = backend_.Allocate({frames, positions, 1, channels}, decoder_.dtype_);
      backend_.Linear({.x = normed.Reshape({frames * positions, channels}),
                       .weight = block.qkv.Slice(begin, begin + channels),
                       .bias = block.qkv_bias.Slice(begin, begin + channels),
                       .out = qkv[i].Reshape({frames * positions, channels})});
    }
    Tensor mixed = normed.Reshape({frames, positions, 1, channels});  // normed is no longer needed
    backend_.Attention({.q = qkv[0],
                        .k = qkv[1],
                        .v = qkv[2],
                        .scale = 1.0f / std::sqrt(static_cast<float>(channels)),
                        .out = mixed});
    const Tensor rows = x.Reshape({frames * positions, channels});
    backend_.Linear({.x = mixed.Reshape({frames * positions, channels}),
                     .weight = block.proj,
                     .bias = block.proj_bias,
                     .residual = rows,
                     .out = rows});
    return x;
  }

  // Twice as many frames, but for the clip's first one.
  Tensor DoubleFrames(const Conv& conv, const Tensor& x) {
    const std::int64_t kept = first_ ? 1 : 0;
    const std::int64_t doubled = x.dim(0) - kept;
    if (doubled == 0) {
      NextSlot();
      return x;
    }
    const Tensor pairs = Causal(conv, x.Slice(kept, x.dim(0)));
    Tensor out = backend_.Allocate({kept + 2 * doubled, x.dim(1), x.dim(2), x.dim(3)}, x.dtype());
    if (kept > 0) backend_.Copy(x.Slice(0, kept), out.Slice(0, kept));
    backend_.InterleaveFrames({.x = pairs, .out = out.Slice(kept, out.dim(0))});
    return out;
  }

  Tensor DoubleSize(const Conv& conv, const Tensor& x) {
    Tensor out = backend_.Allocate({x.dim(0), 2 * x.dim(1), 2 * x.dim(2), conv.weight.dim(0)},
                                   decoder_.dtype_);
    backend_.Conv({.x = x, .weight = conv.weight, .bias = conv.bias, .upsample = true, .out = out});
    return out;
  }

  const VideoDecoder& decoder_;
  Backend& backend_;
  DecoderState& state_;
  const bool first_;
  std::size_t slot_ = 0;
};

Tensor VideoDecoder::Decode(Backend& backend, const Tensor& latents, DecoderState& state) const {
  if (latents.shape().rank() != 4 || latents.dim(0) < 1 || latents.dim(3) != config_.z_dim) {
    throw Error(ErrorCode::kInternal, "the video decoder got latents of the shape " +
                                          ToString(latents.shape()) + ", expected [n, h, w, " +
                                          std::to_string(config_.z_dim) + "]");
  }
  return Pass(*this, backend, state).Run(latents);
}

Tensor VideoDecoder::ToDecoderLayout(Backend& backend, const Tensor& latent,
                                     bool normalised) const {
  Tensor host = latent;
  if (!latent.device().is_cpu()) {
    host = Tensor::Host(latent.shape(), DType::kF32);
    backend.Copy(latent, host);
  }
  const std::int64_t channels = latent.dim(0);
  const std::int64_t positions = latent.NumElements() / channels;
  Tensor out = Tensor::Host({latent.dim(1), latent.dim(2), latent.dim(3), channels}, DType::kF32);
  for (std::int64_t c = 0; c < channels; ++c) {
    const auto i = static_cast<std::size_t>(c);
    const float scale = normalised ? config_.latents_std[i] : 1.0f;
    const float shift = normalised ? config_.latents_mean[i] : 0.0f;
    const float* from = host.data<float>() + c * positions;
    float* to = out.data<float>() + c;
    for (std::int64_t p = 0; p < positions; ++p) to[p * channels] = from[p] * scale + shift;
  }
  return out;
}

std::int64_t VideoDecoder::FramesOf(std::int64_t n, bool first) const {
  return n * config_.temporal_scale() - (first ? config_.temporal_scale() - 1 : 0);
}

}  // namespace slalom
