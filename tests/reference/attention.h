// Reference attention: dense, SLA and SALAD, and block maps. Naive on purpose.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/attention.h"
#include "tests/reference/array.h"
#include "tests/reference/rows.h"

namespace slalom::reference {

// Classes of all block pairs as whole numbers (BlockClass), [B, H, Nq, Nk].
struct Classes {
  int block_q = 64;
  int block_k = 64;
  std::int64_t batch = 0, heads = 0, query_blocks = 0, key_blocks = 0;
  std::vector<std::uint8_t> values;
  TokenGrid grid;  // set for window maps: heads [H / 2, H) order their tokens (y, x, t)

  BlockClass at(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    const std::int64_t index = ((b * heads + h) * query_blocks + i) * key_blocks + j;
    return static_cast<BlockClass>(values[static_cast<std::size_t>(index)]);
  }
};

// The token at a position of a head's own order.
inline std::int64_t TokenAt(const TokenGrid& grid, std::int64_t heads, std::int64_t head,
                            std::int64_t position) {
  if (grid.size() == 0 || head < heads / 2) return position;
  const std::int64_t t = position % grid.frames;
  const std::int64_t x = position / grid.frames % grid.width;
  const std::int64_t y = position / grid.frames / grid.width;
  return (t * grid.height + y) * grid.width + x;
}

// One row: softmax over the keys listed. q, k, v are [B, L, H, D]; `bias(key)` is added to the
// scores. Returns [D] values and, in `lse`, the log of the sum.
template <typename P, typename Bias>
std::vector<typename P::Real> SoftmaxRow(const Array& q, const Array& k, const Array& v,
                                         std::int64_t b, std::int64_t h, std::int64_t query,
                                         const std::vector<std::int64_t>& keys, double scale,
                                         const Bias& bias, double* lse) {
  using Real = typename P::Real;
  const std::int64_t heads = q.dim(2);
  const std::int64_t size = q.dim(3);
  const auto at = [&](const Array& x, std::int64_t token, std::int64_t c) {
    return static_cast<Real>(x[((b * x.dim(1) + token) * heads + h) * size + c]);
  };
  std::vector<Real> scores;
  Real largest = -std::numeric_limits<Real>::infinity();
  for (const std::int64_t key : keys) {
    Real dot = 0;
    for (std::int64_t c = 0; c < size; ++c) dot += at(q, query, c) * at(k, key, c);
    scores.push_back(dot * static_cast<Real>(scale) + static_cast<Real>(bias(key)));
    largest = std::max(largest, scores.back());
  }
  Real sum = 0;
  for (Real& s : scores) sum += s = std::exp(s - largest);
  if (lse != nullptr) *lse = static_cast<double>(largest + std::log(sum));
  std::vector<Real> out(static_cast<std::size_t>(size), Real(0));
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const Real p = P::Store(scores[i] / sum);
    for (std::int64_t c = 0; c < size; ++c)
      out[static_cast<std::size_t>(c)] += p * at(v, keys[i], c);
  }
  return out;
}

// relative_bias [H, Lq + Lk - 1] optional; lse [B, H, Lq] filled if given.
template <typename P>
Array Attention(const Array& q, const Array& k, const Array& v, double scale,
                const Array& relative_bias, Array* lse) {
  const std::int64_t lq = q.dim(1);
  const std::int64_t lk = k.dim(1);
  const std::int64_t heads = q.dim(2);
  const std::int64_t size = q.dim(3);
  std::vector<std::int64_t> keys(static_cast<std::size_t>(lk));
  std::iota(keys.begin(), keys.end(), 0);
  Array out(q.shape);
  for (std::int64_t b = 0; b < q.dim(0); ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t i = 0; i < lq; ++i) {
        const auto bias = [&](std::int64_t key) {
          return relative_bias.defined() ? relative_bias[h * (lq + lk - 1) + key - i + lq - 1]
                                         : 0.0;
        };
        double row_lse = 0;
        const auto row = SoftmaxRow<P>(q, k, v, b, h, i, keys, scale, bias, &row_lse);
        if (lse != nullptr) (*lse)[(b * heads + h) * lq + i] = row_lse;
        for (std::int64_t c = 0; c < size; ++c) {
          out[((b * lq + i) * heads + h) * size + c] = P::Store(row[static_cast<std::size_t>(c)]);
        }
      }
    }
  }
  return out;
}

// Pooled scores [B, H, Nq, Nk] of a kTopK map.
template <typename P>
Array PooledScores(const Array& q, const Array& k, int block_q, int block_k) {
  using Real = typename P::Real;
  const std::int64_t length = q.dim(1);
  const std::int64_t heads = q.dim(2);
  const std::int64_t size = q.dim(3);
  const auto mean = [&](const Array& x, std::int64_t b, std::int64_t h, std::int64_t block,
                        std::int64_t index, std::int64_t c) {
    const std::int64_t end = std::min(length, (index + 1) * block);
    Real sum = 0;
    for (std::int64_t t = index * block; t < end; ++t) {
      sum += static_cast<Real>(x[((b * length + t) * heads + h) * size + c]);
    }
    return sum / static_cast<Real>(end - index * block);
  };
  const std::int64_t nq = (length + block_q - 1) / block_q;
  const std::int64_t nk = (length + block_k - 1) / block_k;
  Array scores(Shape{q.dim(0), heads, nq, nk});
  std::int64_t index = 0;
  for (std::int64_t b = 0; b < q.dim(0); ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t i = 0; i < nq; ++i) {
        for (std::int64_t j = 0; j < nk; ++j) {
          Real dot = 0;
          for (std::int64_t c = 0; c < size; ++c) {
            dot += mean(q, b, h, block_q, i, c) * mean(k, b, h, block_k, j, c);
          }
          scores[index++] = dot;
        }
      }
    }
  }
  return scores;
}

// phi of one row of D values.
template <typename Real>
std::vector<Real> Feature(FeatureMap map, std::vector<Real> x) {
  if (map == FeatureMap::kSoftmax) {
    const Real largest = *std::max_element(x.begin(), x.end());
    Real sum = 0;
    for (Real& v : x) sum += v = std::exp(v - largest);
    for (Real& v : x) v /= sum;
  }
  for (Real& v : x) {
    if (map == FeatureMap::kElu) v = v > 0 ? v + 1 : std::exp(v);
    if (map == FeatureMap::kRelu) v = std::max(v, Real(0));
  }
  return x;
}

// phi(q) (sum phi(k)^T v) / (psi(q) sum psi(k) + 1e-5) over the keys listed: numerator features qf,
// kf and denominator features qd, kd [rows][D].
template <typename P>
std::vector<typename P::Real> LinearRow(const std::vector<typename P::Real>& q_feature,
                                        const std::vector<typename P::Real>& q_divisor,
                                        const std::vector<std::vector<typename P::Real>>& k_feature,
                                        const std::vector<std::vector<typename P::Real>>& k_divisor,
                                        const std::vector<std::vector<typename P::Real>>& v,
                                        const std::vector<std::int64_t>& keys) {
  using Real = typename P::Real;
  const std::size_t size = q_feature.size();
  std::vector<Real> out(size, Real(0));
  Real divisor = 0;
  // Associated the other way round than a fast kernel does it: (q k^T) v.
  for (const std::int64_t key : keys) {
    const auto j = static_cast<std::size_t>(key);
    Real weight = 0;
    for (std::size_t c = 0; c < size; ++c) {
      weight += q_feature[c] * k_feature[j][c];
      divisor += q_divisor[c] * k_divisor[j][c];
    }
    for (std::size_t c = 0; c < size; ++c) out[c] += weight * v[j][c];
  }
  for (Real& x : out) x = P::Store(keys.empty() ? Real(0) : x / (divisor + Real(1e-5)));
  return out;
}

// Rows of one head as vectors, in the policy's type.
template <typename Real>
std::vector<std::vector<Real>> HeadOf(const Array& x, std::int64_t b, std::int64_t h) {
  const std::int64_t size = x.dim(3);
  std::vector<std::vector<Real>> rows;
  for (std::int64_t t = 0; t < x.dim(1); ++t) {
    std::vector<Real> row;
    for (std::int64_t c = 0; c < size; ++c) {
      row.push_back(static_cast<Real>(x[((b * x.dim(1) + t) * x.dim(2) + h) * size + c]));
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

// The keys of the blocks that `wanted(class)` accepts, as tokens.
template <typename Wanted>
std::vector<std::int64_t> KeysOf(const Classes& map, std::int64_t length, std::int64_t b,
                                 std::int64_t h, std::int64_t query_block, const Wanted& wanted) {
  std::vector<std::int64_t> keys;
  for (std::int64_t p = 0; p < length; ++p) {
    if (wanted(map.at(b, h, query_block, p / map.block_k))) {
      keys.push_back(TokenAt(map.grid, map.heads, h, p));
    }
  }
  return keys;
}

inline bool InScope(LinearScope scope, BlockClass c) {
  if (scope == LinearScope::kAll) return true;
  if (scope == LinearScope::kNonCritical) return c != BlockClass::kCritical;
  return c == BlockClass::kMarginal;
}

template <typename P>
Array SparseBranch(const Array& q, const Array& k, const Array& v, const Classes& map) {
  const std::int64_t length = q.dim(1);
  const std::int64_t heads = q.dim(2);
  const std::int64_t size = q.dim(3);
  const double scale = 1.0 / std::sqrt(static_cast<double>(size));
  Array out(q.shape);
  for (std::int64_t b = 0; b < q.dim(0); ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t p = 0; p < length; ++p) {
        const auto keys = KeysOf(map, length, b, h, p / map.block_q,
                                 [](BlockClass c) { return c == BlockClass::kCritical; });
        if (keys.empty()) continue;
        const std::int64_t token = TokenAt(map.grid, heads, h, p);
        const auto row = SoftmaxRow<P>(
            q, k, v, b, h, token, keys, scale, [](std::int64_t) { return 0.0; }, nullptr);
        for (std::int64_t c = 0; c < size; ++c) {
          out[((b * length + token) * heads + h) * size + c] =
              P::Store(row[static_cast<std::size_t>(c)]);
        }
      }
    }
  }
  return out;
}

// proj_weight [D, D], proj_bias [D] optional.
template <typename P>
Array Sla(const Array& q, const Array& k, const Array& v, const Classes& map, LinearScope scope,
          FeatureMap feature_map, const Array& proj_weight, const Array& proj_bias) {
  using Real = typename P::Real;
  const std::int64_t length = q.dim(1);
  const std::int64_t heads = q.dim(2);
  const std::int64_t size = q.dim(3);
  Array out = SparseBranch<P>(q, k, v, map);
  if (!proj_weight.defined()) return out;
  const auto features = [&](const Array& x, std::int64_t b, std::int64_t h) {
    auto rows = HeadOf<Real>(x, b, h);
    for (auto& row : rows) {
      row = Feature(feature_map, row);
      for (Real& value : row) value = P::Store(value);
    }
    return rows;
  };
  for (std::int64_t b = 0; b < q.dim(0); ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const auto qf = features(q, b, h);
      const auto kf = features(k, b, h);
      const auto values = HeadOf<Real>(v, b, h);
      for (std::int64_t t = 0; t < length; ++t) {
        const auto keys = KeysOf(map, length, b, h, t / map.block_q,
                                 [&](BlockClass c) { return InScope(scope, c); });
        const auto& row = qf[static_cast<std::size_t>(t)];
        const auto linear = LinearRow<P>(row, row, kf, kf, values, keys);
        for (std::int64_t e = 0; e < size; ++e) {
          Real y = static_cast<Real>(proj_bias[e]);
          for (std::int64_t c = 0; c < size; ++c) {
            y += static_cast<Real>(proj_weight[e * size + c]) * linear[static_cast<std::size_t>(c)];
          }
          double& o = out[((b * length + t) * heads + h) * size + e];
          o = P::Store(static_cast<Real>(o) + P::Store(y));
        }
      }
    }
  }
  return out;
}

struct SaladInputs {
  Array q, k, v, q_normed, k_normed, cos, sin, x;
  Array proj_weight, proj_bias, gate_weight, gate_bias;  // proj_weight may be undefined
  SaladGate gate = SaladGate::kToken;

  // cos and sin of angles [L, D / 2], in f32.
  void SetAngles(const Array& angles) {
    cos = sin = angles;
    for (std::int64_t i = 0; i < angles.size(); ++i) {
      cos[i] = static_cast<float>(std::cos(angles[i]));
      sin[i] = static_cast<float>(std::sin(angles[i]));
    }
  }
};

template <typename P>
Array SaladGateValues(const SaladInputs& in) {
  using Real = typename P::Real;
  const std::int64_t width = in.x.dim(2);
  Array gate(Shape{in.x.dim(0), in.x.dim(1)});
  for (std::int64_t r = 0; r < gate.size(); ++r) {
    Real sum = static_cast<Real>(in.gate_bias[0]);
    for (std::int64_t c = 0; c < width; ++c) {
      sum += static_cast<Real>(in.x[r * width + c]) * static_cast<Real>(in.gate_weight[c]);
    }
    gate[r] = Real(1) / (Real(1) + std::exp(-sum));
  }
  if (in.gate == SaladGate::kSample) {
    const std::int64_t length = in.x.dim(1);
    for (std::int64_t b = 0; b < gate.dim(0); ++b) {
      double mean = 0;
      for (std::int64_t t = 0; t < length; ++t) mean += gate[b * length + t];
      for (std::int64_t t = 0; t < length; ++t) {
        gate[b * length + t] = t == 0 ? mean / static_cast<double>(length) : gate[b * length];
      }
    }
  }
  return gate;
}

// [B, L, H * D].
template <typename P>
Array Salad(const SaladInputs& in, const Classes& map) {
  using Real = typename P::Real;
  const std::int64_t batch = in.q.dim(0);
  const std::int64_t length = in.q.dim(1);
  const std::int64_t heads = in.q.dim(2);
  const std::int64_t size = in.q.dim(3);
  const std::int64_t width = heads * size;
  Array out = SparseBranch<P>(in.q, in.k, in.v, map);
  out.shape = Shape{batch, length, width};
  if (!in.proj_weight.defined()) return out;

  const auto as_rows = [&](const Array& x) {
    Array y = x;
    y.shape = Shape{batch, length, width};
    return y;
  };
  const Array none;
  // q and k with ReLU, before (divisor) and after (feature) the rotation.
  const Array qd = QkNormRope<P>(as_rows(in.q_normed), none, 0, none, none, true, heads);
  const Array kd = QkNormRope<P>(as_rows(in.k_normed), none, 0, none, none, true, heads);
  const Array qf = QkNormRope<P>(as_rows(in.q_normed), none, 0, in.cos, in.sin, true, heads);
  const Array kf = QkNormRope<P>(as_rows(in.k_normed), none, 0, in.cos, in.sin, true, heads);
  std::vector<std::int64_t> keys(static_cast<std::size_t>(length));
  std::iota(keys.begin(), keys.end(), 0);
  Array linear(Shape{batch * length, width});
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const auto q_rows = HeadOf<Real>(qf, b, h), q_divisors = HeadOf<Real>(qd, b, h);
      const auto k_rows = HeadOf<Real>(kf, b, h), k_divisors = HeadOf<Real>(kd, b, h);
      const auto values = HeadOf<Real>(in.v, b, h);
      for (std::int64_t t = 0; t < length; ++t) {
        const auto i = static_cast<std::size_t>(t);
        const auto row = LinearRow<P>(q_rows[i], q_divisors[i], k_rows, k_divisors, values, keys);
        for (std::int64_t c = 0; c < size; ++c) {
          linear[(b * length + t) * width + h * size + c] = row[static_cast<std::size_t>(c)];
        }
      }
    }
  }
  const Array projected = Linear<P>(linear, in.proj_weight, in.proj_bias, Act::kNone, none, none);
  const Array gate = SaladGateValues<P>(in);
  for (std::int64_t i = 0; i < out.size(); ++i) {
    const Real mixed = static_cast<Real>(gate[i / width]) * static_cast<Real>(projected[i]);
    out[i] = P::Store(static_cast<Real>(out[i]) + mixed);
  }
  return out;
}

// The share of each query's softmax mass that lies in critical blocks, averaged over the positions
// (2 s + 1) L / (2 rows) of every head.
inline double MassKept(const Array& q, const Array& k, double scale, const Classes& map,
                       std::int64_t rows) {
  const std::int64_t length = q.dim(1);
  const std::int64_t heads = q.dim(2);
  const std::int64_t size = q.dim(3);
  rows = std::min(rows, length);
  double total = 0;
  for (std::int64_t b = 0; b < q.dim(0); ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t s = 0; s < rows; ++s) {
        const std::int64_t position = (2 * s + 1) * length / (2 * rows);
        const auto row_of = [&](std::int64_t p) {
          return ((b * length + TokenAt(map.grid, heads, h, p)) * heads + h) * size;
        };
        double sum = 0, kept = 0;
        for (std::int64_t p = 0; p < length; ++p) {
          double dot = 0;
          for (std::int64_t c = 0; c < size; ++c) dot += q[row_of(position) + c] * k[row_of(p) + c];
          const double mass = std::exp(dot * scale);
          sum += mass;
          if (map.at(b, h, position / map.block_q, p / map.block_k) == BlockClass::kCritical) {
            kept += mass;
          }
        }
        total += kept / sum;
      }
    }
  }
  return total / static_cast<double>(q.dim(0) * heads * rows);
}

}  // namespace slalom::reference
