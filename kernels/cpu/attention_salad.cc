// SALAD: sparse branch plus gated linear branch with the layer's own projections.
#include <cmath>
#include <vector>

#include "kernels/cpu/attention_rows.h"
#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_backend.h"

namespace slalom {

void CpuBackend::SaladAttention(const SaladArgs& args) {
  const Check check("SaladAttention");
  check.Rank(args.q, 4, "q");
  check.Compute(args.q, "q");
  check.That(args.map != nullptr, "map", "is missing");
  const DType type = args.q.dtype();
  const std::int64_t batch = args.q.dim(0), length = args.q.dim(1), heads = args.q.dim(2),
                     size = args.q.dim(3), width = heads * size;
  const BlockMap& map = *args.map;
  const std::int64_t nq = (length + map.block_q - 1) / map.block_q;
  const std::int64_t nk = (length + map.block_k - 1) / map.block_k;
  check.Is(map.classes, Shape{batch, heads, nq, nk}, DType::kU8, "map");
  const Tensor sparse = Allocate(Shape{batch, length, width}, DType::kF32);
  const Tensor linear = Allocate(Shape{batch, length, width}, type);
  const Tensor projected = Allocate(Shape{batch, length, width}, DType::kF32);
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  const bool window = args.map_kind == BlockMapKind::kWindow;
  VisitCompute(type, [&](auto tag) {
    using T = decltype(tag);
    parallel_.Tasks(batch * heads, [&](std::int64_t bh, int /*thread*/) {
      const std::int64_t b = bh / heads, h = bh % heads;
      const auto token = [&](std::int64_t n) {
        if (!window || h < heads / 2) return n;
        const std::int64_t f = n % args.grid.frames, x = n / args.grid.frames % args.grid.width,
                           y = n / args.grid.frames / args.grid.width;
        return (f * args.grid.height + y) * args.grid.width + x;
      };
      const auto row_of = [&](std::int64_t j) { return (b * length + j) * width + h * size; };
      for (std::int64_t p = 0; p < length; ++p) {
        const std::uint8_t* classes =
            map.classes.data<std::uint8_t>() + (bh * nq + p / map.block_q) * nk;
        AttentionRow<T> row(args.q.data<T>() + row_of(token(p)), size, scale);
        std::vector<std::int64_t> keys;
        for (std::int64_t j = 0; j < length; ++j) {
          if (classes[j / map.block_k] != 1) continue;
          row.Score(args.k.data<T>() + row_of(token(j)), 0);
          keys.push_back(token(j));
        }
        if (!keys.empty()) row.Softmax();
        for (std::size_t n = 0; n < keys.size(); ++n)
          row.Add(n, args.v.data<T>() + row_of(keys[n]));
        for (std::int64_t e = 0; e < size; ++e)
          sparse.data<float>()[row_of(token(p)) + e] = row.Out(e);
      }
      if (!args.proj_weight.defined()) return;
      std::vector<float> state(size * size), total(size);
      const auto rotate = [&](const T* x, std::int64_t t, std::vector<float>& relu,
                              std::vector<float>& turned) {
        for (std::int64_t c = 0; c < size; ++c) relu[c] = std::max(ToFloat(x[c]), 0.0f);
        for (std::int64_t p = 0; p < size / 2; ++p) {
          const float cos = args.cos.data<float>()[t * size / 2 + p];
          const float sin = args.sin.data<float>()[t * size / 2 + p];
          turned[2 * p] = relu[2 * p] * cos - relu[2 * p + 1] * sin;
          turned[2 * p + 1] = relu[2 * p] * sin + relu[2 * p + 1] * cos;
        }
      };
      std::vector<float> relu(size), turned(size);
      for (std::int64_t j = 0; j < length; ++j) {
        rotate(args.k_normed.data<T>() + row_of(j), j, relu, turned);
        for (std::int64_t c = 0; c < size; ++c) {
          total[c] += relu[c];
          for (std::int64_t e = 0; e < size; ++e) {
            state[c * size + e] += turned[c] * ToFloat(args.v.data<T>()[row_of(j) + e]);
          }
        }
      }
      for (std::int64_t t = 0; t < length; ++t) {
        rotate(args.q_normed.data<T>() + row_of(t), t, relu, turned);
        float den = 1e-5f;
        std::vector<float> y(size);
        for (std::int64_t c = 0; c < size; ++c) {
          den += relu[c] * total[c];
          for (std::int64_t e = 0; e < size; ++e) y[e] += turned[c] * state[c * size + e];
        }
        for (std::int64_t e = 0; e < size; ++e)
          linear.data<T>()[row_of(t) + e] = FromFloat<T>(y[e] / den);
      }
    });
    const bool mixed = args.proj_weight.defined();
    std::vector<float> gates(batch * length, 0.0f);
    if (mixed) {
      Linear({.x = linear, .weight = args.proj_weight, .bias = args.proj_bias, .out = projected});
      for (std::int64_t r = 0; r < batch * length; ++r) {
        float sum = args.gate_bias.data<float>()[0];
        for (std::int64_t c = 0; c < width; ++c) {
          sum += ToFloat(args.x.data<T>()[r * width + c]) * args.gate_weight.data<float>()[c];
        }
        gates[r] = 1.0f / (1.0f + std::exp(-sum));
      }
      if (args.gate == SaladGate::kSample) {
        for (std::int64_t b = 0; b < batch; ++b) {
          double sum = 0;
          for (std::int64_t t = 0; t < length; ++t) sum += gates[b * length + t];
          for (std::int64_t t = 0; t < length; ++t) gates[b * length + t] = sum / length;
        }
      }
    }
    for (std::int64_t r = 0; r < batch * length; ++r) {
      for (std::int64_t c = 0; c < width; ++c) {
        const float extra = mixed ? gates[r] * projected.data<float>()[r * width + c] : 0.0f;
        args.out.data<T>()[r * width + c] =
            FromFloat<T>(sparse.data<float>()[r * width + c] + extra);
      }
      if (args.gate_out.defined()) args.gate_out.data<float>()[r] = gates[r];
    }
  });
}

}  // namespace slalom
