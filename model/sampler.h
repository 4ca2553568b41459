// Samplers: from noise to a clean latent in a few steps. (Diffusers calls a sampler a scheduler.)
#pragma once

#include <vector>

#include "kernels/backend.h"
#include "kernels/core/tensor.h"
#include "model/pipeline.h"

namespace slalom {

// How much noise a latent holds before each step, and what the network is told about it.
struct SigmaSchedule {
  std::vector<float> sigmas;     // [steps + 1], falling; the last is 0
  std::vector<float> timesteps;  // [steps]
  int steps() const { return static_cast<int>(timesteps.size()); }
};

// The two published UniPC grids: they differ in the third digit and in nothing else.
enum class UniPcGrid {
  kDiffusers,  // UniPCMultistepScheduler with use_flow_sigmas
  kWan,        // Wan2.1's fm_solvers_unipc.py
};

// Whole timesteps, truncated from the fp64 value as both references do. steps >= 1, shift > 0.
SigmaSchedule UniPcSchedule(int steps, double shift, UniPcGrid grid = UniPcGrid::kDiffusers);

// FlowMatchEulerDiscreteScheduler's grid, which applies the shift twice: once to its range, once to
// the points in it. Timesteps stay fractional.
SigmaSchedule EulerSchedule(int steps, double shift);

// rCM's fixed times (arXiv 2510.08431 as TurboDiffusion uses it), 1 to 4 steps. The timesteps are
// rounded to bfloat16, for the distilled weights have only ever seen those.
inline constexpr int kMaxRcmSteps = 4;
inline constexpr double kRcmSigmaMax = 80.0;
SigmaSchedule RcmSchedule(int steps, double sigma_max = kRcmSigmaMax);

// The schedule that a clip with these settings follows; rCM has no shift.
SigmaSchedule MakeSchedule(SamplerKind kind, int steps, double shift);

// One clip's walk along its schedule. A value type: it holds the few latents of history that the
// method needs, as f32 on the device, and is touched by one thread at a time.
//
//   UniPC  order 2, bh2, predicts x0, corrector always on, lower order at the end (Zhao et al.
//          2023; UniPCMultistepScheduler as Wan configures it), in f32 throughout as Wan does
//   Euler  x + (sigma' - sigma) v
//   rCM    back to noise level sigma' with fresh noise from the estimate of x0
class Sampler {
 public:
  Sampler() = default;
  Sampler(SamplerKind kind, SigmaSchedule schedule);

  const SigmaSchedule& schedule() const { return schedule_; }
  int step() const { return step_; }  // steps done
  bool done() const { return step_ >= schedule_.steps(); }
  // What the network is told in the step to come. Requires !done().
  float timestep() const { return schedule_.timesteps[static_cast<std::size_t>(step_)]; }
  // The first latent is N(0, 1) noise times this.
  float initial_scale() const;
  // The step to come mixes in fresh N(0, 1) noise.
  bool needs_noise() const;

  // Takes `latent` from its noise level to the next, `velocity` being the network's output for it,
  // both f32 of one shape. `noise` is used when needs_noise() says so. `latent` becomes a new
  // tensor: whoever shares the old memory keeps the old values, and a throw leaves both it and the
  // sampler as they were.
  void Step(Backend& backend, const Tensor& velocity, const Tensor& noise, Tensor& latent);

  // The latest estimate of the clean latent; undefined before the first step.
  const Tensor& x0() const { return estimate_; }
  // Drops the history that only further steps would need.
  void Release();

  // All that the walk depends on beside its schedule. A new sampler with the same schedule that is
  // given it by GoOn takes the same steps from there.
  struct History {
    int step = 0;
    Tensor estimate;
    Tensor previous_estimate;
    Tensor sample;
  };
  History history() const { return {step_, estimate_, previous_estimate_, sample_}; }
  void GoOn(History history);

 private:
  Tensor Correct(Backend& backend, const Tensor& latent, const Tensor& estimate) const;
  Tensor Predict(Backend& backend, const Tensor& sample, const Tensor& estimate) const;
  double Alpha(int i) const;
  double Lambda(int i) const;
  double Sigma(int i) const { return schedule_.sigmas[static_cast<std::size_t>(i)]; }
  int Order(int i) const;

  SamplerKind kind_ = SamplerKind::kUniPc;
  SigmaSchedule schedule_;
  int step_ = 0;
  Tensor estimate_;           // x0 of the last step (UniPC's m_{i-1})
  Tensor previous_estimate_;  // UniPC: m_{i-2}
  Tensor sample_;             // UniPC: the last corrected sample, c_{i-1}
};

}  // namespace slalom
