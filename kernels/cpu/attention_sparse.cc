// SLA: sparse branch plus projected linear branch.
#include <cmath>
#include <vector>

#include "kernels/cpu/attention_rows.h"
#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_backend.h"

namespace slalom {
namespace {

std::vector<float> Feature(FeatureMap map, std::vector<float> x) {
  if (map == FeatureMap::kSoftmax) {
    const float max = *std::max_element(x.begin(), x.end());
    float sum = 0;
    for (float& v : x) sum += v = std::exp(v - max);
    for (float& v : x) v /= sum;
  } else {
    for (float& v : x) {
      v = map == FeatureMap::kRelu ? std::max(v, 0.0f) : (v > 0 ? v + 1 : std::exp(v));
    }
  }
  return x;
}

template <typename T>
std::vector<float> Load(const T* x, std::int64_t n) {
  std::vector<float> y(n);
  for (std::int64_t i = 0; i < n; ++i) y[i] = ToFloat(x[i]);
  return y;
}

bool InScope(LinearScope scope, std::uint8_t c) {
  const auto k = static_cast<BlockClass>(c);
  if (scope == LinearScope::kAll) return true;
  if (scope == LinearScope::kNonCritical) return k != BlockClass::kCritical;
  return k == BlockClass::kMarginal;
}

}  // namespace

void CpuBackend::SlaAttention(const SlaArgs& args) {
  const Check check("SlaAttention");
  check.Rank(args.q, 4, "q");
  check.Compute(args.q, "q");
  const DType type = args.q.dtype();
  const std::int64_t batch = args.q.dim(0), length = args.q.dim(1), heads = args.q.dim(2),
                     size = args.q.dim(3);
  check.Is(args.k, args.q.shape(), type, "k");
  check.Is(args.v, args.q.shape(), type, "v");
  check.Is(args.out, args.q.shape(), type, "out");
  check.That(args.map != nullptr, "map", "is missing");
  const BlockMap& map = *args.map;
  const std::int64_t nq = (length + map.block_q - 1) / map.block_q;
  const std::int64_t nk = (length + map.block_k - 1) / map.block_k;
  check.Is(map.classes, Shape{batch, heads, nq, nk}, DType::kU8, "map");
  if (args.proj_weight.defined()) {
    check.Is(args.proj_weight, Shape{size, size}, DType::kF32, "proj_weight");
    check.Is(args.proj_bias, Shape{size}, DType::kF32, "proj_bias");
  }
  const std::int64_t stride = heads * size;
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  VisitCompute(type, [&](auto tag) {
    using T = decltype(tag);
    parallel_.Tasks(batch * heads * nq, [&](std::int64_t r, int /*thread*/) {
      const std::int64_t i = r % nq, h = r / nq % heads, b = r / nq / heads;
      const std::uint8_t* classes = map.classes.data<std::uint8_t>() + r * nk;
      const auto at = [&](const Tensor& t, std::int64_t j) {
        return t.data<T>() + (b * length + j) * stride + h * size;
      };
      std::vector<float> state(size * size), total(size);
      if (args.proj_weight.defined()) {
        for (std::int64_t j = 0; j < length; ++j) {
          if (!InScope(args.scope, classes[j / map.block_k])) continue;
          const auto phi = Feature(args.feature_map, Load(at(args.k, j), size));
          for (std::int64_t c = 0; c < size; ++c) {
            total[c] += phi[c];
            for (std::int64_t e = 0; e < size; ++e) {
              state[c * size + e] += phi[c] * ToFloat(at(args.v, j)[e]);
            }
          }
        }
      }
      const std::int64_t end = std::min<std::int64_t>(length, (i + 1) * map.block_q);
      for (std::int64_t t = i * map.block_q; t < end; ++t) {
        AttentionRow<T> row(at(args.q, t), size, scale);
        std::vector<std::int64_t> keys;
        for (std::int64_t j = 0; j < length; ++j) {
          if (classes[j / map.block_k] != 1) continue;
          row.Score(at(args.k, j), 0);
          keys.push_back(j);
        }
        if (!keys.empty()) row.Softmax();
        for (std::size_t n = 0; n < keys.size(); ++n) row.Add(n, at(args.v, keys[n]));
        std::vector<float> linear(size);
        if (args.proj_weight.defined()) {
          const auto phi = Feature(args.feature_map, Load(at(args.q, t), size));
          float den = 1e-5f;
          for (std::int64_t c = 0; c < size; ++c) {
            den += phi[c] * total[c];
            for (std::int64_t e = 0; e < size; ++e) linear[e] += phi[c] * state[c * size + e];
          }
          for (float& x : linear) x /= den;
        }
        for (std::int64_t e = 0; e < size; ++e) {
          float y = row.Out(e);
          if (args.proj_weight.defined()) {
            y += args.proj_bias.data<float>()[e];
            for (std::int64_t c = 0; c < size; ++c) {
              y += args.proj_weight.data<float>()[e * size + c] * linear[c];
            }
          }
          at(args.out, t)[e] = FromFloat<T>(y);
        }
      }
    });
  });
}

void CpuBackend::AttentionMassKept(const Tensor& q, const Tensor& k, float scale,
                                   const BlockMap& map, int rows, const Tensor& out) {
  const Check check("AttentionMassKept");
  check.Rank(q, 4, "q");
  check.Compute(q, "q");
  check.Is(k, q.shape(), q.dtype(), "k");
  check.Is(out, Shape{1}, DType::kF32, "out");
  const std::int64_t batch = q.dim(0), length = q.dim(1), heads = q.dim(2), size = q.dim(3);
  const std::int64_t samples = std::min<std::int64_t>(rows, length);
  std::vector<double> kept(batch * heads * samples);
  const std::int64_t nq = map.classes.dim(2), nk = map.classes.dim(3);
  VisitCompute(q.dtype(), [&](auto tag) {
    using T = decltype(tag);
    parallel_.Tasks(batch * heads * samples, [&](std::int64_t r, int /*thread*/) {
      const std::int64_t s = r % samples, h = r / samples % heads, b = r / samples / heads;
      const std::int64_t p = (2 * s + 1) * length / (2 * samples);
      const bool moved = map.grid.size() > 0 && h >= heads / 2;
      const auto token = [&](std::int64_t n) {
        if (!moved) return n;
        const std::int64_t f = n % map.grid.frames, x = n / map.grid.frames % map.grid.width,
                           y = n / map.grid.frames / map.grid.width;
        return (f * map.grid.height + y) * map.grid.width + x;
      };
      const auto at = [&](const Tensor& t, std::int64_t j) {
        return t.data<T>() + ((b * length + token(j)) * heads + h) * size;
      };
      AttentionRow<T> row(at(q, p), size, scale);
      for (std::int64_t j = 0; j < length; ++j) row.Score(at(k, j), 0);
      row.Softmax();
      const std::uint8_t* classes =
          map.classes.data<std::uint8_t>() + ((b * heads + h) * nq + p / map.block_q) * nk;
      for (std::int64_t j = 0; j < length; ++j) {
        if (classes[j / map.block_k] == 1) kept[r] += row.Share(j);
      }
    });
  });
  double sum = 0;
  for (const double x : kept) sum += x;
  out.data<float>()[0] = static_cast<float>(sum / static_cast<double>(kept.size()));
}

}  // namespace slalom
