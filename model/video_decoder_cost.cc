// What decoding costs, as functions of the clip's shape alone.
#include <algorithm>

#include "kernels/core/dtype.h"
#include "model/video_decoder.h"

namespace slalom {

template <typename Visitor>
void VideoDecoder::ForEachConv(std::int64_t frames, std::int64_t h, std::int64_t w, bool first,
                               const Visitor& visit) const {
  const auto visit_block = [&](const ResidualBlock& block) {
    visit(block.conv1, frames, h, w);
    visit(block.conv2, frames, h, w);
    if (block.shortcut.weight.defined()) visit(block.shortcut, frames, h, w);
  };
  visit(post_quant_, frames, h, w);
  visit(conv_in_, frames, h, w);
  visit_block(middle_in_);
  visit_block(middle_out_);
  for (const Stage& stage : stages_) {
    for (const ResidualBlock& block : stage.blocks) visit_block(block);
    if (stage.time_conv.weight.defined()) {
      const std::int64_t doubled = frames - (first ? 1 : 0);
      visit(stage.time_conv, doubled, h, w);
      frames += doubled;
    }
    if (stage.resample.weight.defined()) {
      // The input is doubled in size before the convolution sees it.
      h *= 2;
      w *= 2;
      visit(stage.resample, frames, h, w);
    }
  }
  visit(conv_out_, frames, h, w);
}

double VideoDecoder::Flops(std::int64_t frames, std::int64_t h, std::int64_t w) const {
  double flops = 0;
  ForEachConv(frames, h, w, /*first=*/true,
              [&](const Conv& conv, std::int64_t n, std::int64_t height, std::int64_t width) {
                flops += 2.0 * static_cast<double>(conv.weight.NumElements()) *
                         static_cast<double>(n * height * width);
              });
  const auto positions = static_cast<double>(h * w);
  const auto channels = static_cast<double>(middle_attention_.proj.dim(0));
  flops += static_cast<double>(frames) * positions * channels * (8.0 * channels + 4.0 * positions);
  return flops;
}

std::size_t VideoDecoder::StateBytes(std::int64_t h, std::int64_t w) const {
  std::int64_t elements = 0;
  ForEachConv(1, h, w, /*first=*/false,
              [&](const Conv& conv, std::int64_t, std::int64_t height, std::int64_t width) {
                const std::int64_t depth = conv.weight.dim(1) - 1;
                elements += depth * height * width * conv.weight.dim(4);
              });
  return static_cast<std::size_t>(elements) * ByteSize(dtype_);
}

std::size_t VideoDecoder::WorkBytes(std::int64_t h, std::int64_t w) const {
  // Around one convolution live its input, its output and the block's input; then the frames that
  // are being copied into the state or, before that, the input as the back end packs it.
  std::int64_t most = 0;
  ForEachConv(1, h, w, /*first=*/false,
              [&](const Conv& conv, std::int64_t n, std::int64_t height, std::int64_t width) {
                const std::int64_t in = conv.weight.dim(4);
                const std::int64_t out = conv.weight.dim(0);
                const std::int64_t depth = conv.weight.dim(1) - 1;
                // A kernel over space alone reads an input of half this height and width.
                const bool doubles = depth == 0 && conv.weight.dim(2) > 1;
                const std::int64_t alive =
                    doubles ? n * in / 4 + n * out : n * (in + out + std::max(in, out));
                const std::int64_t kept = depth * in;
                const std::int64_t packed = doubles || depth > 0 ? (n + depth) * in : 0;
                const std::int64_t wide = alive + (packs_input_ ? std::max(kept, packed) : kept);
                most = std::max(most, height * width * wide);
              });
  return static_cast<std::size_t>(most) * ByteSize(dtype_);
}

}  // namespace slalom
