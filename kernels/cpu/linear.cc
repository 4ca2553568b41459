// Linear: one matrix product with bias, activation, gate and residual fused.
#include <algorithm>
#include <cstddef>
#include <vector>

#include "kernels/cpu/check.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/gemm.h"

namespace slalom {

void CpuBackend::Linear(const LinearArgs& args) {
  const Check check("Linear");
  check.Rank(args.weight, 2, "weight");
  check.Compute(args.weight, "weight");
  const std::int64_t n = args.weight.dim(0);
  const std::int64_t k = args.weight.dim(1);
  const DType type = args.weight.dtype();
  check.Compute(args.x, "x");
  check.That(args.x.shape().rank() >= 1 && args.x.dim(-1) == k && args.x.dtype() == type, "x",
             "does not fit the weight: " + ToString(args.x.shape()) + " against " +
                 ToString(args.weight.shape()));
  const std::int64_t m = k == 0 ? 0 : args.x.NumElements() / k;
  check.Compute(args.out, "out");
  check.That(args.out.dtype() == type || args.out.dtype() == DType::kF32, "out",
             "has neither x's type nor F32");
  check.Holds(args.out, m * n, args.out.dtype(), "out");
  const bool narrow_bias = args.bias.defined() && args.bias.dtype() == DType::kBF16;
  if (args.bias.defined()) {
    const bool fits = narrow_bias && type == DType::kBF16 && args.out.dtype() == type;
    check.Is(args.bias, Shape{n}, fits ? type : DType::kF32, "bias");
  }
  if (args.residual.defined()) {
    check.Holds(args.residual, m * n, args.out.dtype(), "residual");
  }
  std::int64_t groups = 1;
  if (args.gate.defined()) {
    check.That(args.residual.defined(), "gate", "needs a residual");
    check.Rank(args.gate, 2, "gate");
    groups = args.gate.dim(0);
    check.Is(args.gate, Shape{groups, n}, DType::kF32, "gate");
    check.That(groups > 0 && m % groups == 0, "gate",
               "has a first dimension that does not divide M");
  }
  if (m == 0 || n == 0) return;

  // oneDNN's AVX-512 products give a row the same bits for every M (the tests hold it to that); its
  // AVX2 product does not, and bf16 without the instructions for it is slow there.
  const bool use_onednn =
      type == DType::kBF16 ? features_.avx512_bf16 || features_.amx_bf16 : features_.avx512;
  std::vector<float> widened;
  if (narrow_bias) {
    const auto* from = args.bias.data<BFloat16>();
    widened.resize(static_cast<std::size_t>(n));
    std::transform(from, from + n, widened.begin(),
                   [](BFloat16 value) { return static_cast<float>(value); });
  }
  const std::int64_t rows = m / groups;
  const auto row_bytes = [](const Tensor& t, std::int64_t elements) {
    return elements * static_cast<std::int64_t>(ByteSize(t.dtype()));
  };
  for (std::int64_t g = 0; g < groups; ++g) {
    MatmulCall call{.m = rows,
                    .n = n,
                    .k = k,
                    .type = type,
                    .out_type = args.out.dtype(),
                    .activation = args.activation};
    call.x = args.x.data<std::byte>() + row_bytes(args.x, g * rows * k);
    call.weight = args.weight.raw();
    if (args.bias.defined()) call.bias = narrow_bias ? widened.data() : args.bias.data<float>();
    if (args.residual.defined()) {
      call.residual = args.residual.data<std::byte>() + row_bytes(args.residual, g * rows * n);
    }
    if (args.gate.defined()) call.gate = args.gate.data<float>() + g * n;
    call.out = args.out.data<std::byte>() + row_bytes(args.out, g * rows * n);
    if (use_onednn) {
      onednn_.Matmul(call);
    } else {
      OwnMatmul(kernels_, parallel_, *arena_, call);
    }
  }
}

}  // namespace slalom
