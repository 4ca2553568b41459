// Reference gradients of SLA and SALAD, with the map held: the chain rule over pairs of tokens, as
// naive as the forward forms. They are held against finite differences of those.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/reference/array.h"
#include "tests/reference/attention.h"

namespace slalom::reference {

struct SlaGradients {
  Array q, k, v, proj_weight, proj_bias;
};

struct SaladGradients {
  Array q, k, v, q_normed, k_normed, x, proj_weight, proj_bias, gate_weight, gate_bias;
};

template <typename Real>
using Rows = std::vector<std::vector<Real>>;

template <typename Real>
Rows<Real> ZeroRows(std::int64_t rows, std::int64_t size) {
  return Rows<Real>(static_cast<std::size_t>(rows),
                    std::vector<Real>(static_cast<std::size_t>(size), Real(0)));
}

// to[b, :, h, :] += rows, each sum stored.
template <typename P>
void AddHead(const Rows<typename P::Real>& rows, std::int64_t b, std::int64_t h, Array& to) {
  const std::int64_t size = to.dim(3);
  for (std::int64_t t = 0; t < to.dim(1); ++t) {
    for (std::int64_t c = 0; c < size; ++c) {
      double& at = to[((b * to.dim(1) + t) * to.dim(2) + h) * size + c];
      at = P::Store(static_cast<typename P::Real>(at) +
                    rows[static_cast<std::size_t>(t)][static_cast<std::size_t>(c)]);
    }
  }
}

// at += x in the policy's type.
template <typename P>
void Accumulate(typename P::Real x, double& at) {
  at = static_cast<typename P::Real>(at) + x;
}

template <typename Real>
Real Dot(const std::vector<Real>& a, const std::vector<Real>& b) {
  Real sum = 0;
  for (std::size_t c = 0; c < a.size(); ++c) sum += a[c] * b[c];
  return sum;
}

template <typename Real>
void AddScaled(Real factor, const std::vector<Real>& x, std::vector<Real>& to) {
  for (std::size_t c = 0; c < x.size(); ++c) to[c] += factor * x[c];
}

// What the output holds beside the sparse branch.
template <typename P>
Array BesideSparse(Array out, const Array& q, const Array& k, const Array& v, const Classes& map) {
  const Array sparse = SparseBranch<P>(q, k, v, map);
  for (std::int64_t i = 0; i < out.size(); ++i) out[i] -= sparse[i];
  return out;
}

// d_q, d_k, d_v [B, L, H, D] += the sparse branch's gradients. The branch's output is had as a
// plain implementation has it: from the whole output as it was stored, less the `rest`, which it
// computes again and stores likewise.
template <typename P>
void SparseBranchBackward(const Array& q, const Array& k, const Array& v, const Classes& map,
                          const Array& rest, const Array& d_out, Array& d_q, Array& d_k,
                          Array& d_v) {
  using Real = typename P::Real;
  const std::int64_t length = q.dim(1), heads = q.dim(2), size = q.dim(3);
  const Real scale = static_cast<Real>(1.0 / std::sqrt(static_cast<double>(size)));
  for (std::int64_t b = 0; b < q.dim(0); ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const auto qs = HeadOf<Real>(q, b, h), ks = HeadOf<Real>(k, b, h);
      const auto vs = HeadOf<Real>(v, b, h), ds = HeadOf<Real>(d_out, b, h);
      auto dq = ZeroRows<Real>(length, size), dk = dq, dv = dq;
      for (std::int64_t p = 0; p < length; ++p) {
        const auto keys = KeysOf(map, length, b, h, p / map.block_q,
                                 [](BlockClass c) { return c == BlockClass::kCritical; });
        if (keys.empty()) continue;
        const auto i = static_cast<std::size_t>(TokenAt(map.grid, heads, h, p));
        double lse = 0;
        auto out = SoftmaxRow<P>(
            q, k, v, b, h, static_cast<std::int64_t>(i), keys, static_cast<double>(scale),
            [](std::int64_t) { return 0.0; }, &lse);
        for (std::size_t c = 0; c < out.size(); ++c) {
          const auto at = ((b * length + static_cast<std::int64_t>(i)) * heads + h) * size +
                          static_cast<std::int64_t>(c);
          const Real other = rest.defined() ? static_cast<Real>(rest[at]) : Real(0);
          out[c] = P::Store(out[c] + other) - P::Store(other);
        }
        const Real delta = Dot(out, ds[i]);
        for (const std::int64_t key : keys) {
          const auto j = static_cast<std::size_t>(key);
          const Real share = std::exp(Dot(qs[i], ks[j]) * scale - static_cast<Real>(lse));
          const Real slope = P::Store(share * (Dot(ds[i], vs[j]) - delta)) * scale;
          AddScaled<Real>(P::Store(share), ds[i], dv[j]);
          AddScaled(slope, ks[j], dq[i]);
          AddScaled(slope, qs[i], dk[j]);
        }
      }
      AddHead<P>(dq, b, h, d_q);
      AddHead<P>(dk, b, h, d_k);
      AddHead<P>(dv, b, h, d_v);
    }
  }
}

// Gradients with respect to the features of one head: numerators (feature) and denominators.
template <typename Real>
struct LinearGradients {
  Rows<Real> q_feature, q_divisor, k_feature, k_divisor, v;
};

// One head of LinearRow for every token: its outputs, and the gradients given those of the outputs.
template <typename P>
struct LinearHead {
  using Real = typename P::Real;
  Rows<Real> q_feature, q_divisor, k_feature, k_divisor, v;

  LinearGradients<Real> Zero() const {
    const auto zero =
        ZeroRows<Real>(static_cast<std::int64_t>(v.size()), static_cast<std::int64_t>(v[0].size()));
    return {zero, zero, zero, zero, zero};
  }
  std::vector<Real> Row(std::size_t i, const std::vector<std::int64_t>& keys) const {
    return LinearRow<P>(q_feature[i], q_divisor[i], k_feature, k_divisor, v, keys);
  }
  // out is what Row gave.
  void AddBackward(std::size_t i, const std::vector<std::int64_t>& keys,
                   const std::vector<Real>& out, const std::vector<Real>& d_out,
                   LinearGradients<Real>& to) const {
    Real divisor = Real(1e-5);
    for (const std::int64_t j : keys) {
      divisor += Dot(q_divisor[i], k_divisor[static_cast<std::size_t>(j)]);
    }
    const Real d_divisor = -Dot(d_out, out) / divisor;
    for (const std::int64_t key : keys) {
      const auto j = static_cast<std::size_t>(key);
      const Real d_weight = Dot(d_out, v[j]) / divisor;
      AddScaled(d_weight, k_feature[j], to.q_feature[i]);
      AddScaled(d_weight, q_feature[i], to.k_feature[j]);
      AddScaled(d_divisor, k_divisor[j], to.q_divisor[i]);
      AddScaled(d_divisor, q_divisor[i], to.k_divisor[j]);
      AddScaled(Dot(q_feature[i], k_feature[j]) / divisor, d_out, to.v[j]);
    }
  }
};

// d x of phi(x), given phi(x) and d phi(x).
template <typename Real>
std::vector<Real> FeatureBackward(FeatureMap map, const std::vector<Real>& x,
                                  const std::vector<Real>& feature, std::vector<Real> d) {
  const Real mean = map == FeatureMap::kSoftmax ? Dot(d, feature) : Real(0);
  for (std::size_t c = 0; c < x.size(); ++c) {
    if (map == FeatureMap::kSoftmax) d[c] = feature[c] * (d[c] - mean);
    if (map == FeatureMap::kElu) d[c] *= x[c] > 0 ? Real(1) : std::exp(x[c]);
    if (map == FeatureMap::kRelu) d[c] *= x[c] > 0 ? Real(1) : Real(0);
  }
  return d;
}

template <typename P>
SlaGradients SlaBackward(const Array& q, const Array& k, const Array& v, const Classes& map,
                         LinearScope scope, FeatureMap feature_map, const Array& proj_weight,
                         const Array& proj_bias, const Array& d_out) {
  using Real = typename P::Real;
  const std::int64_t length = q.dim(1), heads = q.dim(2), size = q.dim(3);
  SlaGradients g{Array(q.shape), Array(q.shape), Array(q.shape), {}, {}};
  Array rest;
  if (proj_weight.defined()) {
    rest = BesideSparse<P>(Sla<P>(q, k, v, map, scope, feature_map, proj_weight, proj_bias), q, k,
                           v, map);
  }
  SparseBranchBackward<P>(q, k, v, map, rest, d_out, g.q, g.k, g.v);
  if (!proj_weight.defined()) return g;
  g.proj_weight = Array(proj_weight.shape);
  g.proj_bias = Array(Shape{size});
  const auto features = [&](Rows<Real> rows) {
    for (auto& row : rows) {
      row = Feature(feature_map, row);
      for (Real& x : row) x = P::Store(x);
    }
    return rows;
  };
  for (std::int64_t b = 0; b < q.dim(0); ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const auto qs = HeadOf<Real>(q, b, h), ks = HeadOf<Real>(k, b, h);
      const auto ds = HeadOf<Real>(d_out, b, h);
      const auto qf = features(qs), kf = features(ks);
      const LinearHead<P> head{qf, qf, kf, kf, HeadOf<Real>(v, b, h)};
      LinearGradients<Real> to = head.Zero();
      for (std::int64_t t = 0; t < length; ++t) {
        const auto i = static_cast<std::size_t>(t);
        for (std::int64_t e = 0; e < size; ++e)
          Accumulate<P>(ds[i][static_cast<std::size_t>(e)], g.proj_bias[e]);
        const auto keys = KeysOf(map, length, b, h, t / map.block_q,
                                 [&](BlockClass c) { return InScope(scope, c); });
        if (keys.empty()) continue;
        const auto out = head.Row(i, keys);
        std::vector<Real> d_linear(static_cast<std::size_t>(size), Real(0));
        for (std::int64_t e = 0; e < size; ++e) {
          for (std::int64_t c = 0; c < size; ++c) {
            const auto ec = static_cast<std::size_t>(e), cc = static_cast<std::size_t>(c);
            d_linear[cc] += ds[i][ec] * static_cast<Real>(proj_weight[e * size + c]);
            Accumulate<P>(ds[i][ec] * out[cc], g.proj_weight[e * size + c]);
          }
        }
        for (Real& x : d_linear) x = P::Store(x);
        head.AddBackward(i, keys, out, d_linear, to);
      }
      for (std::size_t i = 0; i < qs.size(); ++i) {
        AddScaled(Real(1), to.q_divisor[i], to.q_feature[i]);
        AddScaled(Real(1), to.k_divisor[i], to.k_feature[i]);
        to.q_feature[i] = FeatureBackward(feature_map, qs[i], qf[i], to.q_feature[i]);
        to.k_feature[i] = FeatureBackward(feature_map, ks[i], kf[i], to.k_feature[i]);
      }
      AddHead<P>(to.q_feature, b, h, g.q);
      AddHead<P>(to.k_feature, b, h, g.k);
      AddHead<P>(to.v, b, h, g.v);
    }
  }
  return g;
}

// Gradients of the gate's logits [B, L], given those of the gate's values.
inline Array SaladLogitGradients(const SaladInputs& in, const Array& d_gate) {
  SaladInputs per_token = in;
  per_token.gate = SaladGate::kToken;
  const Array gate = SaladGateValues<Exact>(per_token);
  Array d(gate.shape);
  const std::int64_t length = gate.dim(1);
  for (std::int64_t b = 0; b < gate.dim(0); ++b) {
    double mean = 0;
    for (std::int64_t t = 0; t < length; ++t) mean += d_gate[b * length + t];
    mean /= static_cast<double>(length);
    for (std::int64_t t = 0; t < length; ++t) {
      const std::int64_t i = b * length + t;
      d[i] = (in.gate == SaladGate::kSample ? mean : d_gate[i]) * gate[i] * (1 - gate[i]);
    }
  }
  return d;
}

// Rotates (forward) or turns back the pairs of one token's row.
template <typename Real>
std::vector<Real> RotateRow(const SaladInputs& in, std::int64_t token, std::vector<Real> row,
                            bool back) {
  const auto half = static_cast<std::int64_t>(row.size() / 2);
  for (std::int64_t p = 0; p < half; ++p) {
    const auto even = static_cast<std::size_t>(2 * p), odd = even + 1;
    const Real c = static_cast<Real>(in.cos[token * half + p]);
    const Real s = static_cast<Real>(in.sin[token * half + p]) * Real(back ? -1 : 1);
    const Real x = row[even], y = row[odd];
    row[even] = x * c - y * s;
    row[odd] = x * s + y * c;
  }
  return row;
}

// SALAD's linear branch of one head.
template <typename P>
LinearHead<P> SaladHead(const SaladInputs& in, std::int64_t b, std::int64_t h) {
  using Real = typename P::Real;
  const auto divisors = [&](const Array& x) {
    auto rows = HeadOf<Real>(x, b, h);
    for (auto& row : rows) row = Feature(FeatureMap::kRelu, row);
    return rows;
  };
  const auto rotated = [&](Rows<Real> rows) {
    for (std::size_t t = 0; t < rows.size(); ++t) {
      rows[t] = RotateRow(in, static_cast<std::int64_t>(t), rows[t], false);
      for (Real& x : rows[t]) x = P::Store(x);
    }
    return rows;
  };
  const auto q = divisors(in.q_normed), k = divisors(in.k_normed);
  return {rotated(q), q, rotated(k), k, HeadOf<Real>(in.v, b, h)};
}

// d x of both kinds of features of x, which is [L][D].
template <typename Real>
Rows<Real> SaladFeatureBackward(const SaladInputs& in, const Rows<Real>& x, Rows<Real> d_feature,
                                const Rows<Real>& d_divisor) {
  for (std::size_t t = 0; t < x.size(); ++t) {
    auto row = RotateRow(in, static_cast<std::int64_t>(t), d_feature[t], true);
    AddScaled(Real(1), d_divisor[t], row);
    d_feature[t] = FeatureBackward(FeatureMap::kRelu, x[t], x[t], row);
  }
  return d_feature;
}

// The linear branch's output and, with it, what needs it: the gate's, the projection's gradients.
// Returns the gradient of that output [B, L, d].
template <typename P>
Array SaladProjectionBackward(const SaladInputs& in, const Array& linear, const Array& d_out,
                              SaladGradients& g) {
  using Real = typename P::Real;
  const std::int64_t rows = in.x.dim(0) * in.x.dim(1), d = in.x.dim(2);
  const Array gate = SaladGateValues<P>(in);
  Array d_linear(in.x.shape), d_gate(gate.shape);
  g.proj_weight = Array(Shape{d, d});
  g.proj_bias = Array(Shape{d});
  for (std::int64_t r = 0; r < rows; ++r) {
    std::vector<Real> sums(static_cast<std::size_t>(d), Real(0));
    for (std::int64_t e = 0; e < d; ++e) {
      Real projected = static_cast<Real>(in.proj_bias[e]);
      const Real slope = P::Store(static_cast<Real>(d_out[r * d + e]) * static_cast<Real>(gate[r]));
      Accumulate<P>(slope, g.proj_bias[e]);
      for (std::int64_t c = 0; c < d; ++c) {
        const Real w = static_cast<Real>(in.proj_weight[e * d + c]);
        projected += w * static_cast<Real>(linear[r * d + c]);
        sums[static_cast<std::size_t>(c)] += slope * w;
        Accumulate<P>(slope * static_cast<Real>(linear[r * d + c]), g.proj_weight[e * d + c]);
      }
      Accumulate<P>(static_cast<Real>(d_out[r * d + e]) * P::Store(projected), d_gate[r]);
    }
    for (std::int64_t c = 0; c < d; ++c) {
      d_linear[r * d + c] = P::Store(sums[static_cast<std::size_t>(c)]);
    }
  }
  const Array d_logit = SaladLogitGradients(in, d_gate);
  g.x = Array(in.x.shape);
  g.gate_weight = Array(Shape{1, d});
  g.gate_bias = Array(Shape{1});
  for (std::int64_t r = 0; r < rows; ++r) {
    Accumulate<P>(static_cast<Real>(d_logit[r]), g.gate_bias[0]);
    for (std::int64_t c = 0; c < d; ++c) {
      g.x[r * d + c] = P::Store(static_cast<Real>(d_logit[r] * in.gate_weight[c]));
      Accumulate<P>(static_cast<Real>(d_logit[r] * in.x[r * d + c]), g.gate_weight[c]);
    }
  }
  return d_linear;
}

template <typename P>
SaladGradients SaladBackward(const SaladInputs& in, const Classes& map, const Array& d_out) {
  using Real = typename P::Real;
  const Shape by_head = in.q.shape;
  const std::int64_t length = in.q.dim(1), heads = in.q.dim(2);
  SaladGradients g;
  g.q = g.k = g.v = Array(by_head);
  Array d_heads = d_out;
  d_heads.shape = by_head;
  Array rest;
  if (in.proj_weight.defined()) {
    rest = BesideSparse<P>(Salad<P>(in, map), in.q, in.k, in.v, map);
  }
  SparseBranchBackward<P>(in.q, in.k, in.v, map, rest, d_heads, g.q, g.k, g.v);
  if (!in.proj_weight.defined()) return g;
  std::vector<std::int64_t> keys(static_cast<std::size_t>(length));
  std::iota(keys.begin(), keys.end(), 0);
  Array linear(by_head);
  for (std::int64_t b = 0; b < in.q.dim(0); ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const auto head = SaladHead<P>(in, b, h);
      Rows<Real> out;
      for (std::size_t i = 0; i < head.v.size(); ++i) out.push_back(head.Row(i, keys));
      AddHead<P>(out, b, h, linear);
    }
  }
  Array d_linear = SaladProjectionBackward<P>(in, linear, d_out, g);
  d_linear.shape = by_head;
  g.q_normed = g.k_normed = Array(by_head);
  for (std::int64_t b = 0; b < in.q.dim(0); ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const auto head = SaladHead<P>(in, b, h);
      const auto outs = HeadOf<Real>(linear, b, h), ds = HeadOf<Real>(d_linear, b, h);
      LinearGradients<Real> to = head.Zero();
      for (std::size_t i = 0; i < outs.size(); ++i) head.AddBackward(i, keys, outs[i], ds[i], to);
      AddHead<P>(
          SaladFeatureBackward(in, HeadOf<Real>(in.q_normed, b, h), to.q_feature, to.q_divisor), b,
          h, g.q_normed);
      AddHead<P>(
          SaladFeatureBackward(in, HeadOf<Real>(in.k_normed, b, h), to.k_feature, to.k_divisor), b,
          h, g.k_normed);
      AddHead<P>(to.v, b, h, g.v);
    }
  }
  return g;
}

}  // namespace slalom::reference
