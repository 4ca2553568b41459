#include "model/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <string>
#include <utility>

#include "kernels/core/dtype.h"
#include "kernels/core/error.h"

namespace slalom {
namespace {

constexpr double kTrainTimesteps = 1000.0;

double ShiftSigma(double u, double shift) { return shift * u / (1.0 + (shift - 1.0) * u); }

// numpy.linspace's element i of `intervals` + 1: the same sequence of roundings, because timesteps
// are truncated to integers afterwards.
double Linspace(double start, double stop, int intervals, int i) {
  if (intervals == 0) return start;
  if (i == intervals) return stop;
  const double step = (stop - start) / intervals;
  return i * step + start;
}

void CheckSteps(int steps, int most) {
  if (steps < 1 || steps > most) {
    throw Error(ErrorCode::kInternal, "a schedule of " + std::to_string(steps) + " steps");
  }
}

struct Term {
  double coefficient;
  const Tensor& latent;
};

// A new latent: the sum of the terms.
Tensor Sum(Backend& backend, std::initializer_list<Term> terms) {
  std::array<Tensor, 8> inputs;
  std::array<float, 8> coefficients{};
  std::size_t n = 0;
  for (const Term& term : terms) {
    inputs[n] = term.latent;
    coefficients[n] = static_cast<float>(term.coefficient);
    ++n;
  }
  Tensor out = backend.Allocate(inputs[0].shape(), DType::kF32);
  backend.Combine({.inputs = std::span<const Tensor>(inputs.data(), n),
                   .coefficients = std::span<const float>(coefficients.data(), n),
                   .out = out});
  return out;
}

}  // namespace

SigmaSchedule UniPcSchedule(int steps, double shift, UniPcGrid grid) {
  CheckSteps(steps, static_cast<int>(kTrainTimesteps));
  const bool wan = grid == UniPcGrid::kWan;
  // Wan takes its largest sigma from an fp32 table.
  const double start = wan ? static_cast<double>(0.999f) : 1.0;
  const double stop = wan ? 0.0 : 1.0 / kTrainTimesteps;
  SigmaSchedule schedule;
  for (int i = 0; i < steps; ++i) {
    double sigma = ShiftSigma(Linspace(start, stop, steps, i), shift);
    // alpha = 1 - sigma stands in a logarithm.
    if (i == 0 && !wan && std::abs(sigma - 1.0) < 1e-6) sigma -= 1e-6;
    schedule.timesteps.push_back(static_cast<float>(std::trunc(kTrainTimesteps * sigma)));
    schedule.sigmas.push_back(static_cast<float>(sigma));
  }
  schedule.sigmas.push_back(0.0f);
  return schedule;
}

SigmaSchedule EulerSchedule(int steps, double shift) {
  CheckSteps(steps, static_cast<int>(kTrainTimesteps));
  // The range is shifted in fp32, the points in it in fp64.
  const float shift32 = static_cast<float>(shift);
  const float lowest = 1.0f / static_cast<float>(kTrainTimesteps);
  const float sigma_min = shift32 * lowest / (1.0f + (shift32 - 1.0f) * lowest);
  SigmaSchedule schedule;
  for (int i = 0; i < steps; ++i) {
    const double t = Linspace(kTrainTimesteps, kTrainTimesteps * sigma_min, steps - 1, i);
    const auto sigma = static_cast<float>(ShiftSigma(t / kTrainTimesteps, shift));
    schedule.sigmas.push_back(sigma);
    schedule.timesteps.push_back(sigma * static_cast<float>(kTrainTimesteps));
  }
  schedule.sigmas.push_back(0.0f);
  return schedule;
}

SigmaSchedule RcmSchedule(int steps, double sigma_max) {
  CheckSteps(steps, kMaxRcmSteps);
  // TrigFlow angles; the first is atan(sigma_max).
  constexpr std::array kAngles = {1.5, 1.4, 1.0};
  SigmaSchedule schedule;
  for (int i = 0; i < steps; ++i) {
    const double tangent = i == 0 ? sigma_max : std::tan(kAngles[static_cast<std::size_t>(i) - 1]);
    const auto sigma = static_cast<float>(tangent / (1.0 + tangent));
    schedule.sigmas.push_back(sigma);
    schedule.timesteps.push_back(
        static_cast<float>(BFloat16(sigma * static_cast<float>(kTrainTimesteps))));
  }
  schedule.sigmas.push_back(0.0f);
  return schedule;
}

SigmaSchedule MakeSchedule(SamplerKind kind, int steps, double shift) {
  switch (kind) {
    case SamplerKind::kUniPc:
      return UniPcSchedule(steps, shift);
    case SamplerKind::kEuler:
      return EulerSchedule(steps, shift);
    case SamplerKind::kRcm:
      return RcmSchedule(steps);
  }
  throw Error(ErrorCode::kInternal, "unknown sampler");
}

Sampler::Sampler(SamplerKind kind, SigmaSchedule schedule)
    : kind_(kind), schedule_(std::move(schedule)) {}

float Sampler::initial_scale() const {
  return kind_ == SamplerKind::kRcm ? schedule_.sigmas.front() : 1.0f;
}

bool Sampler::needs_noise() const {
  return kind_ == SamplerKind::kRcm && step_ + 1 < schedule_.steps();
}

void Sampler::Step(Backend& backend, const Tensor& velocity, const Tensor& noise, Tensor& latent) {
  if (done()) throw Error(ErrorCode::kInternal, "a sampler was stepped past its end");
  const double sigma = Sigma(step_);
  const double next_sigma = Sigma(step_ + 1);
  Tensor estimate = Sum(backend, {{1.0, latent}, {-sigma, velocity}});
  Tensor sample;
  Tensor next;
  switch (kind_) {
    case SamplerKind::kUniPc:
      sample = Correct(backend, latent, estimate);
      next = Predict(backend, sample, estimate);
      break;
    case SamplerKind::kEuler:
      next = Sum(backend, {{1.0, latent}, {next_sigma - sigma, velocity}});
      break;
    case SamplerKind::kRcm:
      next = needs_noise() ? Sum(backend, {{1.0 - next_sigma, estimate}, {next_sigma, noise}})
                           : estimate;
      break;
  }
  // Nothing below throws.
  previous_estimate_ = kind_ == SamplerKind::kUniPc ? std::exchange(estimate_, Tensor()) : Tensor();
  estimate_ = std::move(estimate);
  sample_ = std::move(sample);
  latent = std::move(next);
  ++step_;
}

void Sampler::Release() {
  previous_estimate_ = Tensor();
  sample_ = Tensor();
}

void Sampler::GoOn(History history) {
  step_ = history.step;
  estimate_ = std::move(history.estimate);
  previous_estimate_ = std::move(history.previous_estimate);
  sample_ = std::move(history.sample);
}

// alpha and lambda come from the fp32 sigma, in fp32, as in the references: near sigma = 1 a
// different rounding of 1 - sigma would move lambda visibly.
double Sampler::Alpha(int i) const { return 1.0f - schedule_.sigmas[static_cast<std::size_t>(i)]; }

double Sampler::Lambda(int i) const {
  const float sigma = schedule_.sigmas[static_cast<std::size_t>(i)];
  return std::log(1.0f - sigma) - std::log(sigma);
}

int Sampler::Order(int i) const { return std::min({2, schedule_.steps() - i, i + 1}); }

// UniC: moves the sample that the last predictor started from once more, now knowing the estimate
// at its end. Below, m = estimate, m1 and m2 the two before it, c1 the last corrected sample.
Tensor Sampler::Correct(Backend& backend, const Tensor& latent, const Tensor& estimate) const {
  const int i = step_;
  if (i == 0) return latent;
  const double h = Lambda(i) - Lambda(i - 1);
  const double e = std::expm1(-h);
  const double ratio = Sigma(i) / Sigma(i - 1);
  const double alpha_e = Alpha(i) * e;
  if (Order(i - 1) == 1) {
    // c = ratio c1 - alpha e m1 - alpha e (m - m1) / 2
    return Sum(backend,
               {{ratio, sample_}, {-0.5 * alpha_e, estimate_}, {-0.5 * alpha_e, estimate}});
  }
  const double r = (Lambda(i - 2) - Lambda(i - 1)) / h;
  const double y = -h;
  const double phi = e / y - 1.0;
  const double b1 = phi / e;
  const double b2 = 2.0 * (phi / y - 0.5) / e;
  const double rho1 = (b1 - b2) / (1.0 - r);
  const double rho2 = b1 - rho1;
  // c = ratio c1 - alpha e m1 - alpha e (rho1 (m2 - m1) / r + rho2 (m - m1))
  return Sum(backend, {{ratio, sample_},
                       {alpha_e * (rho1 / r + rho2 - 1.0), estimate_},
                       {-alpha_e * rho1 / r, previous_estimate_},
                       {-alpha_e * rho2, estimate}});
}

// UniP: from the corrected sample to the next noise level.
Tensor Sampler::Predict(Backend& backend, const Tensor& sample, const Tensor& estimate) const {
  const int i = step_;
  // At sigma = 0 lambda is infinite and the formula's limit is the estimate itself.
  if (i + 1 == schedule_.steps()) return estimate;
  const double h = Lambda(i + 1) - Lambda(i);
  const double alpha_e = Alpha(i + 1) * std::expm1(-h);
  const double ratio = Sigma(i + 1) / Sigma(i);
  if (Order(i) == 1) return Sum(backend, {{ratio, sample}, {-alpha_e, estimate}});
  const double r = (Lambda(i - 1) - Lambda(i)) / h;
  // x = ratio c - alpha e m - alpha e (m1 - m) / (2 r)
  return Sum(
      backend,
      {{ratio, sample}, {-alpha_e * (1.0 - 0.5 / r), estimate}, {-0.5 * alpha_e / r, estimate_}});
}

}  // namespace slalom
