// The gradients of SLA and SALAD against the reference, with the map forced: forward, then backward
// from what forward saved.
#include "tests/reference/attention_backward.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "tests/unit/kernels/sparse_attention_test.h"

namespace slalom {
namespace {

using reference::Array;
using reference::Classes;
using reference::Exact;

constexpr DType kF32 = DType::kF32;

class AttentionBackwardTest : public SparseAttentionTest {
 protected:
  // Sums over many tokens carry the rounding of all of them. A gradient that one branch writes and
  // the other adds to is rounded twice; the plain implementation has both in hand.
  void Expect(const Tensor& actual, const Array& exact, const Array& plain,
              const std::string& what) {
    const double again = actual.dtype() == DType::kBF16 ? 0x1p-8 * Largest(exact) : 0.0;
    ExpectClose(actual, exact, plain, what, 64.0, again);
  }

  struct SlaCase {
    std::int64_t batch = 1, length = 64, heads = 1, size = 64;
    LinearScope scope = LinearScope::kAll;
    FeatureMap feature_map = FeatureMap::kSoftmax;
    bool linear = true;
  };

  void RunSla(const SlaCase& c, const Classes& map) {
    const Shape shape{c.batch, c.length, c.heads, c.size};
    const Qkv in = RandomQkv(c.batch, c.length, c.heads, c.size);
    const Array d_out = Random(shape, type());
    const Projection projection = RandomProjection(c.size, c.linear);
    const BlockMap forced = Force(map);
    SlaArgs forward = SlaArguments(in, projection, forced, c.scope, c.feature_map);
    forward.lse = Poisoned(Shape{c.batch, c.heads, c.length}, kF32);
    backend().SlaAttention(forward);
    SlaBackwardArgs args{.q = forward.q,
                         .k = forward.k,
                         .v = forward.v,
                         .map = &forced,
                         .scope = c.scope,
                         .feature_map = c.feature_map,
                         .proj_weight = forward.proj_weight,
                         .proj_bias = forward.proj_bias,
                         .out = forward.out,
                         .lse = forward.lse,
                         .d_out = Upload(d_out, type()),
                         .d_q = Poisoned(shape, type()),
                         .d_k = Poisoned(shape, type()),
                         .d_v = Poisoned(shape, type())};
    if (c.linear) {
      args.d_proj_weight = Poisoned(projection.weight.shape, kF32);
      args.d_proj_bias = Poisoned(projection.bias.shape, kF32);
    }
    backend().SlaAttentionBackward(args);
    const auto run = [&](auto policy) {
      return reference::SlaBackward<decltype(policy)>(in.q, in.k, in.v, map, c.scope, c.feature_map,
                                                      projection.weight, projection.bias, d_out);
    };
    const reference::SlaGradients exact = run(Exact{});
    const reference::SlaGradients plain =
        type() == DType::kBF16 ? run(reference::PlainBF16{}) : run(reference::PlainF32{});
    const std::string what = "SLA L " + std::to_string(c.length) + " D " + std::to_string(c.size) +
                             " scope " + std::to_string(static_cast<int>(c.scope)) + " features " +
                             std::to_string(static_cast<int>(c.feature_map));
    Expect(args.d_q, exact.q, plain.q, what + " d_q");
    Expect(args.d_k, exact.k, plain.k, what + " d_k");
    Expect(args.d_v, exact.v, plain.v, what + " d_v");
    if (!c.linear) return;
    Expect(args.d_proj_weight, exact.proj_weight, plain.proj_weight, what + " d_proj_weight");
    Expect(args.d_proj_bias, exact.proj_bias, plain.proj_bias, what + " d_proj_bias");
  }

  static double Largest(const Array& array) {
    double largest = 0;
    for (const double x : array.values) largest = std::max(largest, std::abs(x));
    return largest;
  }

  // The gate's gradients are few numbers, each a sum over tokens and channels whose terms nearly
  // cancel: by luck, a plain implementation may be off by next to nothing. This is what rounding
  // may do to such a sum: about four standard deviations, when the branch, its projection and what
  // they are made of are rounded, so that every term is off by up to a unit of bf16.
  static double GateSpread(const reference::SaladInputs& in, const Classes& map,
                           const Array& d_out) {
    const Array mixed =
        reference::BesideSparse<Exact>(reference::Salad<Exact>(in, map), in.q, in.k, in.v, map);
    const Array gate = reference::SaladGateValues<Exact>(in);
    // What a logit gets of each gate: the derivative of the sigmoid, or its mean over a sample.
    Array one(gate.shape);
    std::fill(one.values.begin(), one.values.end(), 1.0);
    const Array slope = reference::SaladLogitGradients(in, one);
    const std::int64_t width = in.x.dim(2), length = in.x.dim(1);
    double sum = 0;
    for (std::int64_t row = 0; row < gate.size(); ++row) {
      double factor = slope[row];
      if (in.gate == SaladGate::kSample) {
        const std::int64_t first = row / length * length;
        factor = 0;
        for (std::int64_t t = first; t < first + length; ++t) factor += slope[t];
        factor /= static_cast<double>(length);
      }
      for (std::int64_t c = 0; c < width; ++c) {
        const std::int64_t i = row * width + c;
        const double term = d_out[i] * mixed[i] / gate[row] * factor;
        sum += term * term;
      }
    }
    return 2 * 0x1p-8 * std::sqrt(sum);
  }

  void RunSalad(const TokenGrid& grid, bool window, SaladGate gate, bool linear, std::int64_t heads,
                std::int64_t size, int block) {
    const std::int64_t batch = 2, length = grid.size(), width = heads * size;
    reference::SaladInputs in = RandomSalad(batch, grid, heads, size, linear);
    in.gate = gate;
    Classes map = RandomClasses(batch, heads, length, block, block);
    if (window) map.grid = grid;
    const BlockMap forced = Force(map);
    const Array d_out = Random(in.x.shape, type());
    SaladArgs forward = SaladArguments(in, forced, grid);
    forward.lse = Poisoned(Shape{batch, heads, length}, kF32);
    backend().SaladAttention(forward);
    SaladBackwardArgs args{.q = forward.q,
                           .k = forward.k,
                           .v = forward.v,
                           .q_normed = forward.q_normed,
                           .k_normed = forward.k_normed,
                           .cos = forward.cos,
                           .sin = forward.sin,
                           .x = forward.x,
                           .map = &forced,
                           .map_kind = forward.map_kind,
                           .grid = grid,
                           .gate = gate,
                           .proj_weight = forward.proj_weight,
                           .proj_bias = forward.proj_bias,
                           .gate_weight = forward.gate_weight,
                           .gate_bias = forward.gate_bias,
                           .out = forward.out,
                           .lse = forward.lse,
                           .d_out = Upload(d_out, type()),
                           .d_q = Poisoned(in.q.shape, type()),
                           .d_k = Poisoned(in.q.shape, type()),
                           .d_v = Poisoned(in.q.shape, type())};
    if (linear) {
      args.d_q_normed = Poisoned(in.q.shape, type());
      args.d_k_normed = Poisoned(in.q.shape, type());
      args.d_x = Poisoned(in.x.shape, type());
      args.d_proj_weight = Poisoned(Shape{width, width}, kF32);
      args.d_proj_bias = Poisoned(Shape{width}, kF32);
      args.d_gate_weight = Poisoned(Shape{1, width}, kF32);
      args.d_gate_bias = Poisoned(Shape{1}, kF32);
    }
    backend().SaladAttentionBackward(args);
    const auto run = [&](auto policy) {
      return reference::SaladBackward<decltype(policy)>(in, map, d_out);
    };
    const reference::SaladGradients exact = run(Exact{});
    const reference::SaladGradients plain =
        type() == DType::kBF16 ? run(reference::PlainBF16{}) : run(reference::PlainF32{});
    Expect(args.d_q, exact.q, plain.q, "SALAD d_q");
    Expect(args.d_k, exact.k, plain.k, "SALAD d_k");
    Expect(args.d_v, exact.v, plain.v, "SALAD d_v");
    if (!linear) return;
    Expect(args.d_q_normed, exact.q_normed, plain.q_normed, "SALAD d_q_normed");
    Expect(args.d_k_normed, exact.k_normed, plain.k_normed, "SALAD d_k_normed");
    Expect(args.d_proj_weight, exact.proj_weight, plain.proj_weight, "SALAD d_proj_weight");
    Expect(args.d_proj_bias, exact.proj_bias, plain.proj_bias, "SALAD d_proj_bias");
    const double spread = type() == DType::kBF16 ? GateSpread(in, map, d_out) : 0.0;
    const double floor = 1024.0;  // of f32, likewise
    const double largest = std::max(Largest(exact.gate_weight), std::abs(exact.gate_bias[0]));
    ExpectClose(args.d_gate_weight, exact.gate_weight, plain.gate_weight, "SALAD d_gate_weight",
                floor, spread);
    ExpectClose(args.d_gate_bias, exact.gate_bias, plain.gate_bias, "SALAD d_gate_bias",
                2 * floor * largest / std::abs(exact.gate_bias[0]), spread);
    // A sample's tokens share the gate's gradient where they share the gate.
    const double shared = gate == SaladGate::kSample ? spread / static_cast<double>(length) : 0.0;
    ExpectClose(args.d_x, exact.x, plain.x, "SALAD d_x", 64.0, shared * Largest(in.gate_weight));
  }
};

constexpr LinearScope kScopes[] = {LinearScope::kMarginal, LinearScope::kNonCritical,
                                   LinearScope::kAll};

TEST_P(AttentionBackwardTest, SlaScopesAndFeatureMaps) {
  for (const LinearScope scope : kScopes) {
    for (const FeatureMap feature_map :
         {FeatureMap::kSoftmax, FeatureMap::kElu, FeatureMap::kRelu}) {
      RunSla({2, 150, 2, 32, scope, feature_map}, RandomClasses(2, 2, 150, 32, 16));
    }
  }
}

TEST_P(AttentionBackwardTest, SlaShapes) {
  RunSla({2, 90, 3, 64}, RandomClasses(2, 3, 90, 16, 8));
  RunSla({.length = 63}, RandomClasses(1, 1, 63, 64, 64));
  RunSla({.length = 200, .heads = 2, .size = 40, .scope = LinearScope::kMarginal},
         RandomClasses(1, 2, 200, 48, 24));
  RunSla({.length = 200, .heads = 2, .linear = false}, RandomClasses(1, 2, 200, 64, 64));
}

// Head sizes and blocks that the fast kernels take, in each scope; lengths that divide nothing.
TEST_P(AttentionBackwardTest, SlaFastShapes) {
  for (const LinearScope scope : kScopes) {
    RunSla({.length = 330, .heads = 2, .size = 128, .scope = scope},
           RandomClasses(1, 2, 330, 128, 64));
    RunSla({2, 260, 1, 64, scope, FeatureMap::kElu}, RandomClasses(2, 1, 260, 64, 64));
    RunSla({.length = 300, .size = 64, .scope = scope}, RandomClasses(1, 1, 300, 64, 128));
  }
}

TEST_P(AttentionBackwardTest, SlaBlocksOf16) {
  for (const LinearScope scope : kScopes) {
    RunSla({.length = 170, .heads = 2, .size = 128, .scope = scope},
           RandomClasses(1, 2, 170, 16, 16));
    RunSla({2, 130, 1, 64, scope, FeatureMap::kElu}, RandomClasses(2, 1, 130, 32, 16));
    RunSla({.length = 150, .size = 64, .scope = scope}, RandomClasses(1, 1, 150, 16, 64));
  }
}

TEST_P(AttentionBackwardTest, SlaEmptySets) {
  Classes none = RandomClasses(1, 1, 128, 32, 32);
  for (const BlockClass only :
       {BlockClass::kNegligible, BlockClass::kCritical, BlockClass::kMarginal}) {
    std::fill(none.values.begin(), none.values.end(), static_cast<std::uint8_t>(only));
    RunSla({.length = 128, .size = 32, .scope = LinearScope::kMarginal}, none);
    RunSla({.length = 128, .size = 32, .scope = LinearScope::kNonCritical}, none);
  }
  Classes fast = RandomClasses(1, 1, 256, 64, 64);
  for (const BlockClass only :
       {BlockClass::kNegligible, BlockClass::kCritical, BlockClass::kMarginal}) {
    std::fill(fast.values.begin(), fast.values.end(), static_cast<std::uint8_t>(only));
    RunSla({.length = 256, .scope = LinearScope::kMarginal}, fast);
  }
}

TEST_P(AttentionBackwardTest, SaladMapsAndGates) {
  for (const bool window : {false, true}) {
    for (const SaladGate gate : {SaladGate::kToken, SaladGate::kSample}) {
      RunSalad({3, 5, 7}, window, gate, true, 2, 32, 16);
    }
  }
  RunSalad({1, 5, 9}, false, SaladGate::kToken, true, 2, 64, 4);
  RunSalad({3, 4, 5}, true, SaladGate::kToken, false, 2, 32, 16);
}

TEST_P(AttentionBackwardTest, SaladFastShapes) {
  RunSalad({3, 6, 9}, true, SaladGate::kToken, true, 2, 64, 64);
  RunSalad({2, 7, 11}, false, SaladGate::kSample, true, 1, 128, 64);
  RunSalad({2, 7, 11}, false, SaladGate::kToken, true, 2, 128, 16);
  RunSalad({4, 8, 8}, false, SaladGate::kToken, true, 2, 64, 64);  // the projection's sum in parts
}

// What forward saves is optional and changes nothing else.
TEST_P(AttentionBackwardTest, SavingLseCostsNoBits) {
  const Shape shape{1, 200, 2, 64};
  const BlockMap map = Force(RandomClasses(1, 2, 200, 64, 64));
  SlaArgs args{.q = Upload(Random(shape, type()), type()),
               .k = Upload(Random(shape, type()), type()),
               .v = Upload(Random(shape, type()), type()),
               .map = &map,
               .proj_weight = Upload(Random(Shape{64, 64}, kF32), kF32),
               .proj_bias = Upload(Random(Shape{64}, kF32), kF32),
               .out = Poisoned(shape, type())};
  backend().SlaAttention(args);
  const auto without = DownloadBytes(args.out);
  args.out = Poisoned(shape, type());
  args.lse = Poisoned(Shape{1, 2, 200}, kF32);
  backend().SlaAttention(args);
  EXPECT_EQ(without, DownloadBytes(args.out));
  const Array lse = Download(args.lse);
  for (const double x : lse.values) EXPECT_FALSE(std::isnan(x));
}

INSTANTIATE_TEST_SUITE_P(Devices, AttentionBackwardTest, testing::ValuesIn(OpCases()), OpCaseName);

}  // namespace
}  // namespace slalom
