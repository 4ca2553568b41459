// Reference operations on rows. Naive on purpose: each is its formula in backend.h, written out.
#pragma once

#include <algorithm>
#include <cmath>

#include "tests/reference/array.h"

namespace slalom::reference {

enum class Act { kNone, kGeluTanh, kSilu };

template <typename Real>
Real Apply(Act act, Real x) {
  if (act == Act::kGeluTanh) {
    const Real inner = Real(0.79788456080286535588) * (x + Real(0.044715) * x * x * x);
    return Real(0.5) * x * (Real(1) + std::tanh(inner));
  }
  if (act == Act::kSilu) return x / (Real(1) + std::exp(-x));
  return x;
}

// x [M, K], weight [N, K]; bias [N], residual [M, N], gate [B, N] optional.
template <typename P>
Array Linear(const Array& x, const Array& weight, const Array& bias, Act act, const Array& residual,
             const Array& gate) {
  using Real = typename P::Real;
  const std::int64_t n = weight.dim(0);
  const std::int64_t k = weight.dim(1);
  const std::int64_t m = x.size() / k;
  Array out(Shape{m, n});
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      Real sum = 0;
      for (std::int64_t c = 0; c < k; ++c) {
        sum += static_cast<Real>(x[i * k + c]) * static_cast<Real>(weight[j * k + c]);
      }
      if (bias.defined()) sum += static_cast<Real>(bias[j]);
      Real y = P::Store(Apply(act, sum));
      if (gate.defined()) y *= static_cast<Real>(gate[i / (m / gate.dim(0)) * n + j]);
      if (residual.defined()) y += static_cast<Real>(residual[i * n + j]);
      out[i * n + j] = P::Store(y);
    }
  }
  return out;
}

// x [B, L, d]; weight, bias [d] and scale, shift [B, d] optional.
template <typename P>
Array LayerNorm(const Array& x, const Array& weight, const Array& bias, const Array& scale,
                const Array& shift, double eps) {
  using Real = typename P::Real;
  const std::int64_t d = x.dim(2);
  Array out(x.shape);
  for (std::int64_t r = 0; r < x.dim(0) * x.dim(1); ++r) {
    const std::int64_t b = r / x.dim(1);
    Real mean = 0;
    for (std::int64_t c = 0; c < d; ++c) mean += static_cast<Real>(x[r * d + c]);
    mean /= static_cast<Real>(d);
    Real variance = 0;
    for (std::int64_t c = 0; c < d; ++c) {
      const Real centred = static_cast<Real>(x[r * d + c]) - mean;
      variance += centred * centred;
    }
    variance /= static_cast<Real>(d);
    const Real inverse = Real(1) / std::sqrt(variance + static_cast<Real>(eps));
    for (std::int64_t c = 0; c < d; ++c) {
      Real y = (static_cast<Real>(x[r * d + c]) - mean) * inverse;
      if (weight.defined()) y = y * static_cast<Real>(weight[c]) + static_cast<Real>(bias[c]);
      if (scale.defined()) {
        y = y * (Real(1) + static_cast<Real>(scale[b * d + c])) +
            static_cast<Real>(shift[b * d + c]);
      }
      out[r * d + c] = P::Store(y);
    }
  }
  return out;
}

template <typename P>
Array RmsNorm(const Array& x, const Array& weight, double eps) {
  using Real = typename P::Real;
  const std::int64_t d = weight.size();
  Array out(x.shape);
  for (std::int64_t r = 0; r < x.size() / d; ++r) {
    Real squares = 0;
    for (std::int64_t c = 0; c < d; ++c) {
      squares += static_cast<Real>(x[r * d + c]) * static_cast<Real>(x[r * d + c]);
    }
    const Real inverse =
        Real(1) / std::sqrt(squares / static_cast<Real>(d) + static_cast<Real>(eps));
    for (std::int64_t c = 0; c < d; ++c) {
      out[r * d + c] =
          P::Store(static_cast<Real>(x[r * d + c]) * inverse * static_cast<Real>(weight[c]));
    }
  }
  return out;
}

// x [B, L, H * D] -> [B, L, H, D]; weight [H * D], cos and sin [L, D / 2] optional.
template <typename P>
Array QkNormRope(const Array& x, const Array& weight, double eps, const Array& cos,
                 const Array& sin, bool relu, std::int64_t heads) {
  using Real = typename P::Real;
  const std::int64_t d = x.dim(2);
  const std::int64_t size = d / heads;
  // Norm and rotation are one pass: nothing is stored in between.
  struct Unrounded {
    using Real = typename P::Real;
    static Real Store(Real value) { return value; }
  };
  Array y = weight.defined() ? RmsNorm<Unrounded>(x, weight, eps) : x;
  if (relu) {
    for (double& v : y.values) v = std::max(v, 0.0);
  }
  Array out(Shape{x.dim(0), x.dim(1), heads, size});
  for (std::int64_t i = 0; i < y.size(); i += cos.defined() ? 2 : 1) {
    if (!cos.defined()) {
      out[i] = P::Store(static_cast<Real>(y[i]));
      continue;
    }
    const std::int64_t angle = i / d % x.dim(1) * (size / 2) + i % size / 2;
    const auto c = static_cast<Real>(cos[angle]);
    const auto s = static_cast<Real>(sin[angle]);
    const auto even = static_cast<Real>(y[i]);
    const auto odd = static_cast<Real>(y[i + 1]);
    out[i] = P::Store(even * c - odd * s);
    out[i + 1] = P::Store(even * s + odd * c);
  }
  return out;
}

template <typename P>
Array Activate(Act act, const Array& x) {
  using Real = typename P::Real;
  Array out(x.shape);
  for (std::int64_t i = 0; i < x.size(); ++i) {
    out[i] = P::Store(Apply(act, static_cast<Real>(x[i])));
  }
  return out;
}

// x [M, 2 F] -> [M, F].
template <typename P>
Array GatedGelu(const Array& x) {
  using Real = typename P::Real;
  const std::int64_t f = x.dim(1) / 2;
  Array out(Shape{x.dim(0), f});
  for (std::int64_t r = 0; r < x.dim(0); ++r) {
    for (std::int64_t c = 0; c < f; ++c) {
      const Real y = P::Store(Apply(Act::kGeluTanh, static_cast<Real>(x[r * 2 * f + c])));
      out[r * f + c] = P::Store(y * static_cast<Real>(x[r * 2 * f + f + c]));
    }
  }
  return out;
}

// table [n, d], t [B, n, d] or [B, d] -> [n, B, d].
template <typename P>
Array Modulation(const Array& table, const Array& t) {
  using Real = typename P::Real;
  const std::int64_t n = table.dim(0);
  const std::int64_t d = table.dim(1);
  const std::int64_t batch = t.dim(0);
  Array out(Shape{n, batch, d});
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t c = 0; c < d; ++c) {
        const std::int64_t from = t.shape.rank() == 2 ? b * d + c : (b * n + i) * d + c;
        out[(i * batch + b) * d + c] =
            static_cast<Real>(table[i * d + c]) + static_cast<Real>(t[from]);
      }
    }
  }
  return out;
}

template <typename P>
Array TimestepEmbedding(const Array& timesteps, std::int64_t n) {
  using Real = typename P::Real;
  const std::int64_t half = n / 2;
  Array out(Shape{timesteps.size(), n});
  for (std::int64_t b = 0; b < timesteps.size(); ++b) {
    for (std::int64_t j = 0; j < half; ++j) {
      const Real frequency =
          std::exp(-std::log(Real(10000)) * static_cast<Real>(j) / static_cast<Real>(half));
      const Real angle = static_cast<Real>(timesteps[b]) * frequency;
      out[b * n + j] = std::cos(angle);
      out[b * n + half + j] = std::sin(angle);
    }
  }
  return out;
}

}  // namespace slalom::reference
