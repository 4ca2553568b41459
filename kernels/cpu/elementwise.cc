// Elementwise operations and table look-ups.
#include <array>
#include <cmath>

#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_backend.h"

namespace slalom {
namespace {

constexpr std::int64_t kGrain = 1 << 14;

}  // namespace

void CpuBackend::Modulation(const ModulationArgs& args) {
  const Check check("Modulation");
  check.Rank(args.table, 2, "table");
  const std::int64_t n = args.table.dim(0);
  const std::int64_t d = args.table.dim(1);
  check.Is(args.table, Shape{n, d}, DType::kF32, "table");
  check.Present(args.t, "t");
  check.That(args.t.shape().rank() == 2 || args.t.shape().rank() == 3, "t",
             "has neither rank 2 nor 3");
  const std::int64_t batch = args.t.dim(0);
  const bool shared_row = args.t.shape().rank() == 2;
  check.Is(args.t, shared_row ? Shape{batch, d} : Shape{batch, n, d}, DType::kF32, "t");
  check.Is(args.out, Shape{n, batch, d}, DType::kF32, "out");
  const float* table = args.table.data<float>();
  parallel_.Rows(n * batch, d, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t i = r / batch;
      const std::int64_t b = r % batch;
      const float* t = args.t.data<float>() + (shared_row ? b : b * n + i) * d;
      float* out = args.out.data<float>() + r * d;
      for (std::int64_t c = 0; c < d; ++c) out[c] = table[i * d + c] + t[c];
    }
  });
}

void CpuBackend::Activate(Activation activation, const Tensor& x, const Tensor& out) {
  const Check check("Activate");
  check.Compute(x, "x");
  check.Holds(out, x.NumElements(), x.dtype(), "out");
  VisitCompute(x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    parallel_.Ranges(x.NumElements(), kGrain, [&](std::int64_t begin, std::int64_t end) {
      simd::Rows<T>(kernels_).activate(activation, x.data<T>() + begin, end - begin,
                                       out.data<T>() + begin);
    });
  });
}

void CpuBackend::GatedGelu(const Tensor& x, const Tensor& out) {
  const Check check("GatedGelu");
  check.Compute(x, "x");
  check.That(x.shape().rank() >= 1 && x.dim(-1) % 2 == 0, "x", "has no even last dimension");
  check.Holds(out, x.NumElements() / 2, x.dtype(), "out");
  const std::int64_t f = x.dim(-1) / 2;
  const std::int64_t rows = f == 0 ? 0 : x.NumElements() / (2 * f);
  VisitCompute(x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    parallel_.Rows(rows, 2 * f, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        const T* row = x.data<T>() + r * 2 * f;
        simd::Rows<T>(kernels_).gated_gelu(row, row + f, f, out.data<T>() + r * f);
      }
    });
  });
}

void CpuBackend::Embedding(const Tensor& ids, const Tensor& table, const Tensor& out) {
  const Check check("Embedding");
  check.Present(ids, "ids");
  check.That(ids.dtype() == DType::kI32, "ids", "is not I32");
  check.Rank(table, 2, "table");
  check.Compute(table, "table");
  const std::int64_t rows = table.dim(0);
  const std::int64_t d = table.dim(1);
  check.That(rows > 0, "table", "has no rows");
  check.Holds(out, ids.NumElements() * d, table.dtype(), "out");
  VisitCompute(table.dtype(), [&](auto tag) {
    using T = decltype(tag);
    parallel_.Rows(ids.NumElements(), d, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t id = ids.data<std::int32_t>()[i];
        const T* row = table.data<T>() + (id >= 0 && id < rows ? id : 0) * d;
        std::copy(row, row + d, out.data<T>() + i * d);
      }
    });
  });
}

void CpuBackend::TimestepEmbedding(const Tensor& timesteps, const Tensor& out) {
  const Check check("TimestepEmbedding");
  check.Rank(timesteps, 1, "timesteps");
  check.Rank(out, 2, "out");
  const std::int64_t batch = timesteps.dim(0);
  const std::int64_t n = out.dim(1);
  check.That(timesteps.dtype() == DType::kF32, "timesteps", "is not F32");
  check.Is(out, Shape{batch, n}, DType::kF32, "out");
  check.That(n % 2 == 0, "out", "has an odd number of columns");
  const std::int64_t half = n / 2;
  for (std::int64_t b = 0; b < batch; ++b) {
    const double t = timesteps.data<float>()[b];
    float* row = out.data<float>() + b * n;
    for (std::int64_t j = 0; j < half; ++j) {
      const double angle =
          t * std::pow(10000.0, -static_cast<double>(j) / static_cast<double>(half));
      row[j] = static_cast<float>(std::cos(angle));
      row[half + j] = static_cast<float>(std::sin(angle));
    }
  }
}

void CpuBackend::Combine(const CombineArgs& args) {
  constexpr std::size_t kMaxInputs = 8;
  const Check check("Combine");
  check.Present(args.out, "out");
  check.That(!args.inputs.empty() && args.inputs.size() <= kMaxInputs, "inputs",
             "are not 1 to 8 tensors");
  check.That(args.inputs.size() == args.coefficients.size(), "coefficients",
             "are not as many as inputs");
  check.That(args.out.dtype() == DType::kF32, "out", "is not F32");
  const std::size_t count = args.inputs.size();
  std::array<const float*, kMaxInputs> inputs{};
  for (std::size_t i = 0; i < count; ++i) {
    check.Is(args.inputs[i], args.out.shape(), DType::kF32, "inputs");
    inputs[i] = args.inputs[i].data<float>();
  }
  float* out = args.out.data<float>();
  parallel_.Ranges(args.out.NumElements(), kGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t e = begin; e < end; ++e) {
      float sum = args.coefficients[0] * inputs[0][e];
      for (std::size_t i = 1; i < count; ++i) sum += args.coefficients[i] * inputs[i][e];
      out[e] = sum;
    }
  });
}

}  // namespace slalom
