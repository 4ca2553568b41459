// What the networks of a Wan2.1 folder are made of on disk: diffusers' tensor names and shapes, as
// functions of the config files, and how random values keep the network's activations sane.
#pragma once

#include <string>
#include <vector>

#include "kernels/core/tensor.h"
#include "model/config.h"

namespace slalom {

// Values are drawn from N(mean, deviation^2). Weights have deviation 1 / sqrt(fan in), so that
// every layer keeps the size of its input; norms lie around 1 and biases around 0.
struct TensorSpec {
  std::string name;
  Shape shape;
  double deviation = 0;
  double mean = 0;
};
using NetworkLayout = std::vector<TensorSpec>;

// Mirrors WanTransformer3DModel: 825 tensors for 1.3B, 1,095 for 14B.
NetworkLayout TransformerLayout(const TransformerConfig& config);
// Mirrors UMT5EncoderModel: 242 tensors for UMT5-XXL.
NetworkLayout TextEncoderLayout(const TextEncoderConfig& config);
// Mirrors AutoencoderKLWan, the encoder included: 194 tensors for Wan2.1.
NetworkLayout VaeLayout(const VaeConfig& config);

}  // namespace slalom
