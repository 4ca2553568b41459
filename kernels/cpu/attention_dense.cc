// Dense attention.
#include <cmath>
#include <vector>

#include "kernels/cpu/attention_rows.h"
#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_backend.h"

namespace slalom {

void CpuBackend::Attention(const AttentionArgs& args) {
  const Check check("Attention");
  check.Rank(args.q, 4, "q");
  check.Compute(args.q, "q");
  const std::int64_t batch = args.q.dim(0), lq = args.q.dim(1), heads = args.q.dim(2),
                     size = args.q.dim(3);
  check.Rank(args.k, 4, "k");
  const std::int64_t lk = args.k.dim(1);
  check.Is(args.k, Shape{batch, lk, heads, size}, args.q.dtype(), "k");
  check.Is(args.v, Shape{batch, lk, heads, size}, args.q.dtype(), "v");
  check.Is(args.out, args.q.shape(), args.q.dtype(), "out");
  check.That(lk > 0, "k", "has no rows");
  if (args.relative_bias.defined()) {
    check.Is(args.relative_bias, Shape{heads, lq + lk - 1}, DType::kF32, "relative_bias");
  }
  if (args.lse.defined()) check.Is(args.lse, Shape{batch, heads, lq}, DType::kF32, "lse");
  const std::int64_t stride = heads * size;
  VisitCompute(args.q.dtype(), [&](auto tag) {
    using T = decltype(tag);
    parallel_.Tasks(batch * heads * lq, [&](std::int64_t r, int /*thread*/) {
      const std::int64_t i = r % lq, h = r / lq % heads, b = r / lq / heads;
      AttentionRow<T> row(args.q.data<T>() + (b * lq + i) * stride + h * size, size, args.scale);
      for (std::int64_t j = 0; j < lk; ++j) {
        const float bias =
            args.relative_bias.defined()
                ? args.relative_bias.data<float>()[h * (lq + lk - 1) + j - i + lq - 1]
                : 0.0f;
        row.Score(args.k.data<T>() + (b * lk + j) * stride + h * size, bias);
      }
      row.Softmax();
      for (std::int64_t j = 0; j < lk; ++j) {
        row.Add(j, args.v.data<T>() + (b * lk + j) * stride + h * size);
      }
      for (std::int64_t c = 0; c < size; ++c) {
        args.out.data<T>()[(b * lq + i) * stride + h * size + c] = FromFloat<T>(row.Out(c));
      }
      if (args.lse.defined()) args.lse.data<float>()[r] = row.Lse();
    });
  });
}

}  // namespace slalom
