// Loops over one row at a time. Reductions keep four independent sums in a fixed order.
#pragma once

#include <cstdint>

#include "kernels/cpu/simd/kernels.h"
#include "kernels/cpu/simd/math.h"

namespace slalom::simd {

// body(i, n) for the pieces of [0, n): n is the number of lanes, or less in the last piece. Load
// and Store below take either.
template <typename V, typename Body>
inline __attribute__((always_inline)) void ForVectors(std::int64_t n, const Body& body) {
  std::int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) body(i, V::kLanes);
  if (i < n) body(i, static_cast<int>(n - i));
}

template <typename V, typename T>
inline __attribute__((always_inline)) V Get(const T* p, int n) {
  return n == V::kLanes ? V::Load(p) : V::LoadN(p, n);
}

template <typename V, typename T>
inline __attribute__((always_inline)) void Put(V x, T* p, int n) {
  if (n == V::kLanes) {
    x.Store(p);
  } else {
    x.StoreN(p, n);
  }
}

// Sum of value(i, n) over the vectors of [0, count); value must give zeros beyond n.
template <typename V, typename Value>
inline __attribute__((always_inline)) float SumVectors(std::int64_t count, const Value& value) {
  V sums[4] = {V::Zero(), V::Zero(), V::Zero(), V::Zero()};
  std::int64_t i = 0;
  for (; i + 4 * V::kLanes <= count; i += 4 * V::kLanes) {
    for (int s = 0; s < 4; ++s) sums[s] = sums[s] + value(i + s * V::kLanes, V::kLanes);
  }
  for (; i < count; i += V::kLanes) {
    const std::int64_t left = count - i;
    sums[0] = sums[0] + value(i, left < V::kLanes ? static_cast<int>(left) : V::kLanes);
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])).Sum();
}

template <typename V, typename T>
inline float SumOfSquares(const T* x, std::int64_t d) {
  return SumVectors<V>(d, [&](std::int64_t i, int n) {
    const V v = Get<V>(x + i, n);
    return v * v;
  });
}

template <typename V, typename In, typename T>
void LayerNormRow(const In* x, const float* weight, const float* bias, const float* scale,
                  const float* shift, float eps, std::int64_t d, T* out) {
  const float count = static_cast<float>(d);
  const V mean =
      V::Set(SumVectors<V>(d, [&](std::int64_t i, int n) { return Get<V>(x + i, n); }) / count);
  const float squares = SumVectors<V>(d, [&](std::int64_t i, int n) {
    const V centred = V::Keep(Get<V>(x + i, n) - mean, n, V::Zero());
    return centred * centred;
  });
  const V inverse = V::Set(1.0f / __builtin_sqrtf(squares / count + eps));
  ForVectors<V>(d, [&](std::int64_t i, int n) {
    V y = (Get<V>(x + i, n) - mean) * inverse;
    if (weight != nullptr) y = V::Fma(y, Get<V>(weight + i, n), Get<V>(bias + i, n));
    if (scale != nullptr) {
      y = V::Fma(y, V::Set(1.0f) + Get<V>(scale + i, n), Get<V>(shift + i, n));
    }
    Put(y, out + i, n);
  });
}

template <typename V, typename In, typename T>
void RmsNormRow(const In* x, const float* weight, float eps, std::int64_t d, T* out) {
  const V inverse =
      V::Set(1.0f / __builtin_sqrtf(SumOfSquares<V>(x, d) / static_cast<float>(d) + eps));
  ForVectors<V>(d, [&](std::int64_t i, int n) {
    Put(Get<V>(x + i, n) * inverse * Get<V>(weight + i, n), out + i, n);
  });
}

template <typename V, typename T>
void QkNormRopeRow(const T* x, const float* weight, float eps, const float* cos, const float* sin,
                   bool relu, std::int64_t heads, std::int64_t head_size, T* out) {
  const std::int64_t d = heads * head_size;
  V inverse = V::Set(1.0f);
  if (weight != nullptr) {
    inverse = V::Set(1.0f / __builtin_sqrtf(SumOfSquares<V>(x, d) / static_cast<float>(d) + eps));
  }
  for (std::int64_t h = 0; h < heads; ++h) {
    const std::int64_t base = h * head_size;
    ForVectors<V>(head_size, [&](std::int64_t i, int n) {
      V y = Get<V>(x + base + i, n) * inverse;
      if (weight != nullptr) y = y * Get<V>(weight + base + i, n);
      if (relu) y = V::Max(V::Zero(), y);
      if (cos != nullptr) {
        V c, s;
        if (n == V::kLanes) {
          c = V::LoadTwice(cos + i / 2);
          s = V::LoadTwice(sin + i / 2);
        } else {
          float pairs[2][V::kLanes] = {};
          for (int p = 0; p < n; ++p) {
            pairs[0][p] = cos[(i + p) / 2];
            pairs[1][p] = sin[(i + p) / 2];
          }
          c = V::Load(pairs[0]);
          s = V::Load(pairs[1]);
        }
        y = V::Fma(y, c, y.SwapPairs().NegateEven() * s);
      }
      Put(y, out + base + i, n);
    });
  }
}

template <typename V, typename T>
void ChannelNormRows(const T* x, const float* gamma, bool silu, std::int64_t rows,
                     std::int64_t channels, T* out) {
  const float root = __builtin_sqrtf(static_cast<float>(channels));
  for (std::int64_t r = 0; r < rows; ++r, x += channels, out += channels) {
    const float norm = __builtin_sqrtf(SumOfSquares<V>(x, channels));
    const V factor = V::Set(root / (norm > 1e-12f || norm != norm ? norm : 1e-12f));
    ForVectors<V>(channels, [&](std::int64_t i, int n) {
      V y = Get<V>(x + i, n) * factor * Get<V>(gamma + i, n);
      if (silu) y = Silu(y);
      Put(y, out + i, n);
    });
  }
}

template <typename V>
inline __attribute__((always_inline)) V ApplyActivation(Activation activation, V x) {
  switch (activation) {
    case Activation::kGeluTanh:
      return GeluTanh(x);
    case Activation::kSilu:
      return Silu(x);
    case Activation::kNone:
      break;
  }
  return x;
}

template <typename V, typename T>
void Activate(Activation activation, const T* x, std::int64_t count, T* out) {
  ForVectors<V>(count, [&](std::int64_t i, int n) {
    Put(ApplyActivation(activation, Get<V>(x + i, n)), out + i, n);
  });
}

template <typename V, typename T>
void GatedGelu(const T* x, const T* gate, std::int64_t count, T* out) {
  ForVectors<V>(count, [&](std::int64_t i, int n) {
    Put(GeluTanh(Get<V>(x + i, n)) * Get<V>(gate + i, n), out + i, n);
  });
}

template <typename V, typename T>
void Widen(const T* x, float scale, std::int64_t count, float* out) {
  ForVectors<V>(count,
                [&](std::int64_t i, int n) { Put(Get<V>(x + i, n) * V::Set(scale), out + i, n); });
}

template <typename V, typename T>
void Narrow(const float* x, std::int64_t count, T* out) {
  ForVectors<V>(count, [&](std::int64_t i, int n) { Put(Get<V>(x + i, n), out + i, n); });
}

template <typename V, typename T>
void Add(const T* x, std::int64_t count, float* sum) {
  ForVectors<V>(count, [&](std::int64_t i, int n) {
    Put(Get<V>(sum + i, n) + Get<V>(x + i, n), sum + i, n);
  });
}

template <typename V, typename T>
void Finish(const float* x, float scale, const float* extra, std::int64_t count, T* out) {
  ForVectors<V>(count, [&](std::int64_t i, int n) {
    const V y = Get<V>(x + i, n) * V::Set(scale);
    Put(extra != nullptr ? y + Get<V>(extra + i, n) : y, out + i, n);
  });
}

template <typename V, typename T>
float Dot(const T* a, const float* b, std::int64_t count) {
  return SumVectors<V>(count,
                       [&](std::int64_t i, int n) { return Get<V>(a + i, n) * Get<V>(b + i, n); });
}

template <typename V>
void Epilogue(const float* y, const float* bias, Activation activation, const float* gate,
              const float* residual, std::int64_t count, float* out) {
  ForVectors<V>(count, [&](std::int64_t i, int n) {
    V value = Get<V>(y + i, n);
    if (bias != nullptr) value = value + Get<V>(bias + i, n);
    value = ApplyActivation(activation, value);
    if (gate != nullptr) value = value * Get<V>(gate + i, n);
    if (residual != nullptr) value = value + Get<V>(residual + i, n);
    Put(value, out + i, n);
  });
}

template <typename V>
void FeatureMapRow(FeatureMap map, const float* x, std::int64_t count, float* out) {
  if (map == FeatureMap::kRelu) {
    ForVectors<V>(count, [&](std::int64_t i, int n) {
      Put(V::Max(V::Zero(), Get<V>(x + i, n)), out + i, n);
    });
    return;
  }
  if (map == FeatureMap::kElu) {
    ForVectors<V>(count, [&](std::int64_t i, int n) {
      const V v = Get<V>(x + i, n);
      Put(V::IfPositive(v, v + V::Set(1.0f), Exp(V::Min(V::Zero(), v))), out + i, n);
    });
    return;
  }
  V largest = V::Set(-__builtin_inff());
  ForVectors<V>(count, [&](std::int64_t i, int n) {
    largest = V::Max(largest, V::Keep(Get<V>(x + i, n), n, largest));
  });
  const V maximum = V::Set(largest.Largest());
  ForVectors<V>(count,
                [&](std::int64_t i, int n) { Put(Exp(Get<V>(x + i, n) - maximum), out + i, n); });
  const V inverse = V::Set(
      1.0f / SumVectors<V>(count, [&](std::int64_t i, int n) { return Get<V>(out + i, n); }));
  ForVectors<V>(count,
                [&](std::int64_t i, int n) { Put(Get<V>(out + i, n) * inverse, out + i, n); });
}

// Static: one copy per instruction set, vectorised by the compiler.
[[maybe_unused]] static std::int64_t CountFrom(const std::int32_t* keys, std::int64_t n,
                                               std::int32_t least) {
  std::int32_t count = 0;
  for (std::int64_t i = 0; i < n; ++i) count += keys[i] >= least ? 1 : 0;
  return count;
}

template <typename V>
void Softmax(const SoftmaxTile& t) {
  const V lowest = V::Set(-__builtin_inff());
  const V score_scale = V::Set(t.scale);
  for (std::int64_t r = 0; r < t.rows; ++r) {
    float* scores = t.scores + r * t.stride;
    V largest = lowest;
    ForVectors<V>(t.columns, [&](std::int64_t i, int n) {
      V score = V::Load(scores + i) * score_scale;
      if (t.bias != nullptr) score = score + Get<V>(t.bias + i - r, n);
      score = V::Keep(score, n, lowest);
      largest = V::Max(largest, score);
      score.Store(scores + i);
    });
    const float tile_maximum = largest.Largest();
    const float before = t.maximum[r];
    const float maximum = tile_maximum > before ? tile_maximum : before;
    // A NaN among the scores reaches the sum through exp, whatever the maximum is.
    const V shift = V::Set(maximum > -__builtin_inff() ? maximum : 0.0f);
    V sum = V::Zero();
    for (std::int64_t i = 0; i < t.padded; i += V::kLanes) {
      const V p = i < t.columns ? Exp(V::Load(scores + i) - shift) : V::Zero();
      sum = sum + p;
      p.Store(scores + i);
      if (t.rounded != nullptr) p.Store(t.rounded + r * t.stride + i);
    }
    t.maximum[r] = maximum;
    if (maximum != before && before > -__builtin_inff()) {
      float factor[V::kLanes];
      Exp(V::Set(before - maximum)).Store(factor);
      t.sum[r] = t.sum[r] * factor[0] + sum.Sum();
      float* accumulator = t.accumulator + r * t.width;
      const V scale = V::Set(factor[0]);
      ForVectors<V>(t.width, [&](std::int64_t i, int n) {
        Put(Get<V>(accumulator + i, n) * scale, accumulator + i, n);
      });
    } else {
      t.sum[r] += sum.Sum();
    }
  }
}

}  // namespace slalom::simd
