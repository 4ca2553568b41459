// Reading the video decoder's weights: diffusers' names, repacked for channels-last convolutions.
#include <string>
#include <utility>
#include <vector>

#include "kernels/core/error.h"
#include "model/host_floats.h"
#include "model/video_decoder.h"

namespace slalom {

class VideoDecoder::Loader {
 public:
  Loader(Backend& backend, const Weights& weights, DType dtype)
      : backend_(backend), weights_(weights), dtype_(dtype) {}

  // On disk [Co, Ci, kt, kh, kw], or [Co, Ci, kh, kw] for kt = 1.
  Conv LoadConv(const std::string& name, std::int64_t in, std::int64_t out, std::int64_t kt,
                std::int64_t kernel, bool plane = false) const {
    const Shape expected =
        plane ? Shape{out, in, kernel, kernel} : Shape{out, in, kt, kernel, kernel};
    const Tensor stored = Checked(name + ".weight", expected);
    const std::vector<float> values = ToFloats(stored);
    const std::int64_t taps = kt * kernel * kernel;
    Tensor repacked = Tensor::Host({out, kt, kernel, kernel, in}, DType::kF32);
    auto* to = repacked.data<float>();
    for (std::int64_t o = 0; o < out; ++o) {
      for (std::int64_t i = 0; i < in; ++i) {
        const float* from = values.data() + (o * in + i) * taps;
        for (std::int64_t tap = 0; tap < taps; ++tap) to[(o * taps + tap) * in + i] = from[tap];
      }
    }
    return {Upload(repacked, dtype_), LoadVector(name + ".bias", out)};
  }

  Tensor LoadVector(const std::string& name, std::int64_t n) const {
    return weights_.Load(backend_, name, {n}, DType::kF32);
  }

  // [C, 1, 1, 1], or [C, 1, 1] in the attention block.
  Tensor LoadGamma(const std::string& name, std::int64_t channels, bool plane = false) const {
    const Shape stored = plane ? Shape{channels, 1, 1} : Shape{channels, 1, 1, 1};
    return weights_.Load(backend_, name, stored, DType::kF32).Reshape({channels});
  }

  ResidualBlock LoadResidual(const std::string& name, std::int64_t in, std::int64_t out) const {
    ResidualBlock block;
    block.norm1 = LoadGamma(name + ".norm1.gamma", in);
    block.conv1 = LoadConv(name + ".conv1", in, out, 3, 3);
    block.norm2 = LoadGamma(name + ".norm2.gamma", out);
    block.conv2 = LoadConv(name + ".conv2", out, out, 3, 3);
    if (in != out) block.shortcut = LoadConv(name + ".conv_shortcut", in, out, 1, 1);
    return block;
  }

  AttentionBlock LoadAttention(const std::string& name, std::int64_t channels) const {
    const auto matrix = [&](const std::string& leaf, std::int64_t rows) {
      return weights_.Load(backend_, name + leaf, {rows, channels, 1, 1}, dtype_)
          .Reshape({rows, channels});
    };
    return {.norm = LoadGamma(name + ".norm.gamma", channels, true),
            .qkv = matrix(".to_qkv.weight", 3 * channels),
            .qkv_bias = LoadVector(name + ".to_qkv.bias", 3 * channels),
            .proj = matrix(".proj.weight", channels),
            .proj_bias = LoadVector(name + ".proj.bias", channels)};
  }

 private:
  Tensor Checked(const std::string& name, const Shape& expected) const {
    Tensor stored = weights_.Get(name);
    if (!(stored.shape() == expected)) {
      throw Error(ErrorCode::kInvalidArgument, weights_.path() + ": tensor '" + name +
                                                   "' has the shape " + ToString(stored.shape()) +
                                                   ", expected " + ToString(expected));
    }
    return stored;
  }

  Tensor Upload(const Tensor& host, DType dtype) const {
    Tensor tensor = backend_.Allocate(host.shape(), dtype);
    backend_.Copy(host, tensor);
    return tensor;
  }

  Backend& backend_;
  const Weights& weights_;
  const DType dtype_;
};

VideoDecoder::VideoDecoder(Backend& backend, const Weights& weights, const VaeConfig& config,
                           DType dtype)
    : config_(config), dtype_(dtype), packs_input_(backend.device().is_cpu()) {
  const Loader loader(backend, weights, dtype);
  const std::int64_t z = config.z_dim;
  const auto levels = static_cast<int>(config.dim_mult.size());
  // Widths from the coarsest level to the finest.
  const auto width = [&](int level) {
    return std::int64_t{config.base_dim} *
           config.dim_mult[static_cast<std::size_t>(levels - 1 - level)];
  };

  std::int64_t channels = width(0);
  post_quant_ = loader.LoadConv("post_quant_conv", z, z, 1, 1);
  conv_in_ = loader.LoadConv("decoder.conv_in", z, channels, 3, 3);
  middle_in_ = loader.LoadResidual("decoder.mid_block.resnets.0", channels, channels);
  middle_attention_ = loader.LoadAttention("decoder.mid_block.attentions.0", channels);
  middle_out_ = loader.LoadResidual("decoder.mid_block.resnets.1", channels, channels);

  for (int level = 0; level < levels; ++level) {
    const std::string name = "decoder.up_blocks." + std::to_string(level);
    const std::int64_t out = width(level);
    Stage stage;
    for (int i = 0; i <= config.num_res_blocks; ++i) {
      stage.blocks.push_back(
          loader.LoadResidual(name + ".resnets." + std::to_string(i), channels, out));
      channels = out;
    }
    if (level + 1 < levels) {
      // The encoder's downsampling, in reverse.
      const auto mirrored = static_cast<std::size_t>(levels - 2 - level);
      if (config.temporal_downsample[mirrored]) {
        stage.time_conv =
            loader.LoadConv(name + ".upsamplers.0.time_conv", channels, 2 * channels, 3, 1);
      }
      stage.resample = loader.LoadConv(name + ".upsamplers.0.resample.1", channels, channels / 2, 1,
                                       3, /*plane=*/true);
      channels /= 2;
    }
    stages_.push_back(std::move(stage));
  }
  norm_out_ = loader.LoadGamma("decoder.norm_out.gamma", channels);
  conv_out_ = loader.LoadConv("decoder.conv_out", channels, 3, 3, 3);
}

}  // namespace slalom
