// The reference gradients against central differences of the reference itself, in double: along
// random directions of one input at a time.
#include "tests/reference/attention_backward.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace slalom::reference {
namespace {

class AttentionBackwardReference : public testing::Test {
 protected:
  Array Random(const Shape& shape, double scale = 1.0) {
    Array a(shape);
    std::normal_distribution<double> normal(0.0, scale);
    for (double& x : a.values) x = normal(random_);
    return a;
  }

  Classes RandomMap(std::int64_t batch, std::int64_t heads, std::int64_t length, int block_q,
                    int block_k) {
    const std::int64_t nq = (length + block_q - 1) / block_q;
    const std::int64_t nk = (length + block_k - 1) / block_k;
    Classes map{block_q, block_k, batch, heads, nq, nk, {}, {}};
    for (std::int64_t i = 0; i < batch * heads * nq * nk; ++i) {
      map.values.push_back(static_cast<std::uint8_t>(random_() % 3));
    }
    return map;
  }

  // loss(x) = sum of forward(x) * slope; its gradient in x against differences.
  template <typename Forward>
  void Expect(const std::string& name, Array& x, const Array& gradient, const Array& slope,
              const Forward& forward) {
    ASSERT_EQ(x.size(), gradient.size()) << name;
    const auto loss = [&] {
      const Array out = forward();
      double sum = 0;
      for (std::int64_t i = 0; i < out.size(); ++i) sum += out[i] * slope[i];
      return sum;
    };
    const Array start = x;
    for (int trial = 0; trial < 3; ++trial) {
      const Array direction = Random(x.shape);
      double expected = 0, norm = 0;
      for (std::int64_t i = 0; i < x.size(); ++i) {
        expected += direction[i] * gradient[i];
        norm += std::abs(direction[i] * gradient[i]);
      }
      constexpr double kStep = 1e-6;
      const auto at = [&](double step) {
        for (std::int64_t i = 0; i < x.size(); ++i) x[i] = start[i] + step * direction[i];
        const double value = loss();
        x = start;
        return value;
      };
      const double difference = (at(kStep) - at(-kStep)) / (2 * kStep);
      EXPECT_NEAR(expected, difference, 1e-5 * norm + 1e-8) << name;
      EXPECT_GT(norm, 1e-6) << name << ": nothing was tested";
    }
  }

  std::mt19937_64 random_{7};
};

TEST_F(AttentionBackwardReference, Sla) {
  const Shape shape{1, 23, 2, 6};
  for (const FeatureMap feature : {FeatureMap::kSoftmax, FeatureMap::kElu, FeatureMap::kRelu}) {
    for (const LinearScope scope :
         {LinearScope::kMarginal, LinearScope::kNonCritical, LinearScope::kAll}) {
      Array q = Random(shape), k = Random(shape), v = Random(shape);
      Array weight = Random(Shape{6, 6}), bias = Random(Shape{6});
      const Array slope = Random(shape);
      const Classes map = RandomMap(1, 2, 23, 8, 4);
      const auto forward = [&] { return Sla<Exact>(q, k, v, map, scope, feature, weight, bias); };
      const SlaGradients g = SlaBackward<Exact>(q, k, v, map, scope, feature, weight, bias, slope);
      Expect("q", q, g.q, slope, forward);
      Expect("k", k, g.k, slope, forward);
      Expect("v", v, g.v, slope, forward);
      Expect("proj_weight", weight, g.proj_weight, slope, forward);
      Expect("proj_bias", bias, g.proj_bias, slope, forward);
    }
  }
}

TEST_F(AttentionBackwardReference, Salad) {
  const TokenGrid grid{2, 3, 4};
  const std::int64_t length = grid.size(), heads = 2, size = 6, d = heads * size;
  for (const bool window : {false, true}) {
    for (const SaladGate gate : {SaladGate::kToken, SaladGate::kSample}) {
      const Shape by_head{2, length, heads, size};
      SaladInputs in;
      for (Array* x : {&in.q, &in.k, &in.v, &in.q_normed, &in.k_normed}) *x = Random(by_head);
      in.SetAngles(Random(Shape{length, size / 2}));
      in.x = Random(Shape{2, length, d});
      in.proj_weight = Random(Shape{d, d});
      in.proj_bias = Random(Shape{d});
      in.gate_weight = Random(Shape{1, d}, 0.3);
      in.gate_bias = Random(Shape{1});
      in.gate = gate;
      Classes map = RandomMap(2, heads, length, 8, 4);
      if (window) map.grid = grid;
      const Array slope = Random(in.x.shape);
      const auto forward = [&] { return Salad<Exact>(in, map); };
      const SaladGradients g = SaladBackward<Exact>(in, map, slope);
      Expect("q", in.q, g.q, slope, forward);
      Expect("k", in.k, g.k, slope, forward);
      Expect("v", in.v, g.v, slope, forward);
      Expect("q_normed", in.q_normed, g.q_normed, slope, forward);
      Expect("k_normed", in.k_normed, g.k_normed, slope, forward);
      Expect("x", in.x, g.x, slope, forward);
      Expect("proj_weight", in.proj_weight, g.proj_weight, slope, forward);
      Expect("proj_bias", in.proj_bias, g.proj_bias, slope, forward);
      Expect("gate_weight", in.gate_weight, g.gate_weight, slope, forward);
      Expect("gate_bias", in.gate_bias, g.gate_bias, slope, forward);
    }
  }
}

}  // namespace
}  // namespace slalom::reference
