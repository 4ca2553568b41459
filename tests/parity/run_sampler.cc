// A sampler from injected noise and injected network outputs.
#include <algorithm>
#include <vector>

#include "kernels/core/error.h"
#include "model/sampler.h"
#include "tests/parity/run_network.h"

namespace slalom {
namespace {

// Row i of a host tensor [n, ...] in the shape of `like`, on the device.
Tensor Row(Backend& backend, const Tensor& rows, std::int64_t i, const Tensor& like) {
  return Upload(backend, rows.Slice(i, i + 1).Reshape(like.shape()), DType::kF32);
}

}  // namespace

TensorMap RunSampler(Backend& backend, const NetworkOptions& options, const NetworkInputs& inputs) {
  const std::int64_t steps = options.steps;
  if (options.sampler == SamplerKind::kRcm && steps > kMaxRcmSteps) {
    throw Error(ErrorCode::kInvalidArgument,
                "rcm takes 1 to " + std::to_string(kMaxRcmSteps) + " steps");
  }
  const Tensor initial = inputs.Get("latents", DType::kF32);
  if (initial.shape().rank() >= Shape::kMaxRank) {
    throw Error(ErrorCode::kInvalidArgument, "tensor 'latents' has too many dimensions");
  }
  std::vector<std::int64_t> dims = {steps};
  std::ranges::copy(initial.shape().dims(), std::back_inserter(dims));
  const Tensor velocities = inputs.Get("velocities", DType::kF32, dims);
  const bool rcm = options.sampler == SamplerKind::kRcm;
  const Tensor noise = rcm ? inputs.Get("noise", DType::kF32, dims) : Tensor();

  Sampler sampler(options.sampler, MakeSchedule(options.sampler, options.steps, options.shift));
  Tensor latent = Upload(backend, initial, DType::kF32);
  const std::vector<Tensor> start = {latent};
  const std::vector<float> scale = {sampler.initial_scale()};
  backend.Combine({.inputs = start, .coefficients = scale, .out = latent});

  ++dims[0];
  Tensor trail = Tensor::Host(Shape(dims), DType::kF32);
  const auto keep = [&](std::int64_t i) {
    backend.Copy(latent, trail.Slice(i, i + 1).Reshape(latent.shape()));
  };
  keep(0);
  for (std::int64_t i = 0; i < steps; ++i) {
    const Tensor fresh = sampler.needs_noise() ? Row(backend, noise, i, latent) : Tensor();
    sampler.Step(backend, Row(backend, velocities, i, latent), fresh, latent);
    keep(i + 1);
  }
  return {{"timesteps", Tensor::FromFloats({steps}, sampler.schedule().timesteps)},
          {"sigmas", Tensor::FromFloats({steps + 1}, sampler.schedule().sigmas)},
          {"latents", trail}};
}

}  // namespace slalom
