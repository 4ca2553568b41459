#include "model/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "kernels/core/error.h"
#include "tests/unit/model/expect_error.h"

namespace slalom {
namespace {

std::vector<float> Head(const std::vector<float>& values, std::size_t n) {
  return {values.begin(), values.begin() + static_cast<std::ptrdiff_t>(n)};
}
std::vector<float> Tail(const std::vector<float>& values, std::size_t n) {
  return {values.end() - static_cast<std::ptrdiff_t>(n), values.end()};
}

// Integer timesteps as the two reference implementations print them.
TEST(SigmaSchedule, UniPcGridsOfBothReferences) {
  using V = std::vector<float>;
  const SigmaSchedule diffusers = UniPcSchedule(50, 3.0);
  EXPECT_EQ(Head(diffusers.timesteps, 4), (V{999, 993, 986, 979}));
  EXPECT_EQ(Tail(diffusers.timesteps, 3), (V{162, 113, 60}));
  EXPECT_NEAR(diffusers.sigmas[49], 0.060405, 5e-7);
  EXPECT_EQ(diffusers.sigmas[0], static_cast<float>(1.0 - 1e-6));
  EXPECT_EQ(diffusers.sigmas[50], 0.0f);
  EXPECT_EQ(Tail(UniPcSchedule(50, 5.0).timesteps, 3), (V{244, 175, 96}));

  const SigmaSchedule wan = UniPcSchedule(50, 3.0, UniPcGrid::kWan);
  EXPECT_EQ(Head(wan.timesteps, 4), (V{999, 992, 985, 978}));
  EXPECT_EQ(Tail(wan.timesteps, 3), (V{160, 111, 57}));
  EXPECT_NEAR(wan.sigmas[49], 0.057637, 5e-7);
  EXPECT_EQ(Tail(UniPcSchedule(50, 5.0, UniPcGrid::kWan).timesteps, 3), (V{241, 172, 92}));
}

TEST(SigmaSchedule, EulerShiftsTwice) {
  // By hand, shift 3, 2 steps: the range ends at g(0.001) = 0.003 / 1.002, and g is applied again.
  const SigmaSchedule schedule = EulerSchedule(2, 3.0);
  const double end = 0.003 / 1.002;
  EXPECT_FLOAT_EQ(schedule.sigmas[0], 1.0f);
  EXPECT_NEAR(schedule.sigmas[1], 3.0 * end / (1.0 + 2.0 * end), 1e-8);
  EXPECT_EQ(schedule.sigmas[2], 0.0f);
  EXPECT_FLOAT_EQ(schedule.timesteps[0], 1000.0f);
  EXPECT_NEAR(schedule.timesteps[1], 1000.0 * schedule.sigmas[1], 1e-5);
  EXPECT_EQ(EulerSchedule(1, 3.0).sigmas, (std::vector<float>{1.0f, 0.0f}));
}

TEST(SigmaSchedule, RcmTimes) {
  const SigmaSchedule schedule = RcmSchedule(4);
  EXPECT_EQ(schedule.timesteps, (std::vector<float>{988, 932, 852, 608}));
  const std::vector<double> expected = {0.98765432, 0.93378106, 0.85289539, 0.60897905, 0};
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(schedule.sigmas[i], expected[i], 1e-7);
  }
  ExpectError(ErrorCode::kInternal, {"5"}, [] { RcmSchedule(5); });
}

// A probability flow whose exact velocity is known: data N(mean, spread^2) in every element. For
// x = (1 - s) data + s noise, v(x, s) = E[noise - data | x].
struct Gaussian {
  double mean = 0.7;
  double spread = 0.5;

  double Velocity(double x, double s) const {
    const double variance = (1 - s) * (1 - s) * spread * spread + s * s;
    const double residual = x - (1 - s) * mean;
    return (s - (1 - s) * spread * spread) * residual / variance - mean;
  }
  // Where the flow takes noise z to: the mean plus the spread, linearly.
  double End(double z) const { return mean + spread * z; }
};

class SamplerTest : public testing::Test {
 protected:
  // The largest distance from the exact end of the flow.
  double Error(SamplerKind kind, int steps) {
    const Gaussian flow;
    const std::vector<float> noise = {-2.0f, -0.5f, 0.0f, 0.3f, 1.7f};
    Sampler sampler(kind, MakeSchedule(kind, steps, 3.0));
    Tensor latent = Upload(noise);
    while (!sampler.done()) {
      const double s = sampler.schedule().sigmas[static_cast<std::size_t>(sampler.step())];
      std::vector<float> velocity;
      for (std::size_t i = 0; i < noise.size(); ++i) {
        velocity.push_back(static_cast<float>(flow.Velocity(latent.data<float>()[i], s)));
      }
      sampler.Step(*backend_, Upload(velocity), {}, latent);
    }
    double worst = 0;
    for (std::size_t i = 0; i < noise.size(); ++i) {
      worst = std::max(worst, std::abs(latent.data<float>()[i] - flow.End(noise[i])));
    }
    return worst;
  }

  Tensor Upload(const std::vector<float>& values) {
    return Tensor::FromFloats({static_cast<std::int64_t>(values.size())}, values);
  }

  std::unique_ptr<Backend> backend_ = MakeBackend(Device{}, {.cpu_threads = 1});
};

TEST_F(SamplerTest, ConvergesToTheExactFlow) {
  EXPECT_LT(Error(SamplerKind::kUniPc, 50), 5e-3);
  EXPECT_LT(Error(SamplerKind::kEuler, 500), 2e-2);
  // Second order: better than first order at once, and an error that falls with the square.
  EXPECT_LT(Error(SamplerKind::kUniPc, 20), 0.25 * Error(SamplerKind::kEuler, 20));
  EXPECT_LT(Error(SamplerKind::kUniPc, 40), 0.3 * Error(SamplerKind::kUniPc, 20));
}

// UniPC as the paper's update is written down, one element in double precision, all differences
// explicit; the velocities are arbitrary.
TEST_F(SamplerTest, UniPcFollowsTheFormula) {
  constexpr int kSteps = 5;
  const SigmaSchedule schedule = UniPcSchedule(kSteps, 3.0);
  const std::vector<float> velocities = {0.9f, -0.3f, 0.5f, 1.2f, -0.7f};
  std::vector<double> lambda;
  for (int i = 0; i < kSteps; ++i) {
    const float sigma = schedule.sigmas[static_cast<std::size_t>(i)];
    lambda.push_back(std::log(1.0f - sigma) - std::log(sigma));
  }

  Sampler sampler(SamplerKind::kUniPc, schedule);
  Tensor latent = Upload({0.4f});
  double x = 0.4f;
  double c = 0;
  std::vector<double> m;
  for (int i = 0; i < kSteps; ++i) {
    const auto at = [&](int k) {
      return static_cast<double>(schedule.sigmas[static_cast<std::size_t>(k)]);
    };
    m.push_back(x - at(i) * velocities[static_cast<std::size_t>(i)]);
    const auto M = [&](int k) { return m[static_cast<std::size_t>(k)]; };
    if (i == 0) {
      c = x;
    } else {
      const double h = lambda[i] - lambda[i - 1];
      const double e = std::expm1(-h);
      const double base = at(i) / at(i - 1) * c - (1 - at(i)) * e * M(i - 1);
      if (i == 1) {
        c = base - 0.5 * (1 - at(i)) * e * (M(i) - M(i - 1));
      } else {
        const double r = (lambda[i - 2] - lambda[i - 1]) / h;
        const double d = (M(i - 2) - M(i - 1)) / r;
        // rho solves [1 1; r 1] rho = b.
        const double phi = e / -h - 1;
        const double b1 = phi / e;
        const double b2 = 2 * (phi / -h - 0.5) / e;
        const double rho1 = (b1 - b2) / (1 - r);
        c = base - (1 - at(i)) * e * (rho1 * d + (b1 - rho1) * (M(i) - M(i - 1)));
      }
    }
    if (i + 1 == kSteps) {
      x = M(i);
    } else {
      const double h = lambda[i + 1] - lambda[i];
      const double e = std::expm1(-h);
      x = at(i + 1) / at(i) * c - (1 - at(i + 1)) * e * M(i);
      if (i > 0 && i + 2 <= kSteps) {
        const double r = (lambda[i - 1] - lambda[i]) / h;
        x -= 0.5 * (1 - at(i + 1)) * e * (M(i - 1) - M(i)) / r;
      }
    }
    sampler.Step(*backend_, Upload({velocities[static_cast<std::size_t>(i)]}), {}, latent);
    EXPECT_NEAR(latent.data<float>()[0], x, 2e-6 * std::max(1.0, std::abs(x))) << "step " << i;
    EXPECT_NEAR(sampler.x0().data<float>()[0], M(i), 2e-6);
  }
  EXPECT_TRUE(sampler.done());
}

TEST_F(SamplerTest, RcmMixesFreshNoiseUntilTheLastStep) {
  Sampler sampler(SamplerKind::kRcm, RcmSchedule(2));
  EXPECT_FLOAT_EQ(sampler.initial_scale(), 80.0f / 81.0f);
  Tensor latent = Upload({0.5f});
  const double t0 = sampler.schedule().sigmas[0];
  const double t1 = sampler.schedule().sigmas[1];
  EXPECT_TRUE(sampler.needs_noise());
  sampler.Step(*backend_, Upload({0.25f}), Upload({-1.5f}), latent);
  const double x1 = (1 - t1) * (0.5 - t0 * 0.25) - 1.5 * t1;
  EXPECT_NEAR(latent.data<float>()[0], x1, 1e-6);
  EXPECT_FALSE(sampler.needs_noise());
  sampler.Step(*backend_, Upload({0.75f}), {}, latent);
  EXPECT_NEAR(latent.data<float>()[0], x1 - t1 * 0.75, 1e-6);
  ExpectError(ErrorCode::kInternal, {"end"},
              [&] { sampler.Step(*backend_, Upload({0.0f}), {}, latent); });
}

// A batch that runs out of memory halfway must leave its clips as they were.
TEST_F(SamplerTest, TheOldLatentStaysAsItWas) {
  for (const SamplerKind kind : {SamplerKind::kUniPc, SamplerKind::kEuler, SamplerKind::kRcm}) {
    Sampler sampler(kind, MakeSchedule(kind, 3, 3.0));
    Tensor latent = Upload({0.5f});
    const Tensor before = latent;
    sampler.Step(*backend_, Upload({0.25f}), Upload({0.1f}), latent);
    EXPECT_EQ(before.data<float>()[0], 0.5f);
    EXPECT_NE(latent.data<float>()[0], 0.5f);
  }
}

}  // namespace
}  // namespace slalom
