// Memory: allocation, copies with conversion, zeroes.
#include <cstring>

#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_backend.h"

namespace slalom {
namespace {

bool IsFloat(DType type) {
  return type == DType::kF32 || type == DType::kBF16 || type == DType::kF16 || type == DType::kF64;
}

// IEEE half to float, by exact arithmetic: every half is a float.
float HalfToFloat(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t exponent = (half >> 10) & 0x1Fu;
  const std::uint32_t fraction = half & 0x3FFu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t biased = exponent == 31 ? 0xFFu : exponent + 112;
  return std::bit_cast<float>(sign | (biased << 23) | (fraction << 13));
}

float Load(const void* data, DType type, std::int64_t i) {
  switch (type) {
    case DType::kBF16:
      return static_cast<float>(static_cast<const BFloat16*>(data)[i]);
    case DType::kF16:
      return HalfToFloat(static_cast<const std::uint16_t*>(data)[i]);
    case DType::kF64:
      return static_cast<float>(static_cast<const double*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

}  // namespace

Tensor CpuBackend::Allocate(const Shape& shape, DType dtype) {
  const auto bytes = static_cast<std::size_t>(shape.NumElements()) * ByteSize(dtype);
  return {arena_->Allocate(bytes), shape, dtype, device()};
}

void CpuBackend::Copy(const Tensor& from, const Tensor& to) {
  const Check check("Copy");
  check.Present(from, "from");
  check.Present(to, "to");
  check.That(
      from.NumElements() == to.NumElements(), "to",
      "has shape " + ToString(to.shape()) + ", not as many elements as " + ToString(from.shape()));
  const std::int64_t n = from.NumElements();
  const void* source = from.raw();
  if (from.dtype() == to.dtype()) {
    auto* target = static_cast<std::byte*>(to.raw());
    const auto size = static_cast<std::int64_t>(ByteSize(to.dtype()));
    parallel_.Ranges(n, 1 << 18, [&](std::int64_t begin, std::int64_t end) {
      std::memmove(target + begin * size, static_cast<const std::byte*>(source) + begin * size,
                   static_cast<std::size_t>((end - begin) * size));
    });
    return;
  }
  if (from.dtype() == DType::kF32 && to.dtype() == DType::kBF16) {
    parallel_.Ranges(n, 1 << 16, [&](std::int64_t begin, std::int64_t end) {
      kernels_.bf16.narrow(from.data<float>() + begin, end - begin, to.data<BFloat16>() + begin);
    });
    return;
  }
  if (from.dtype() == DType::kBF16 && to.dtype() == DType::kF32) {
    parallel_.Ranges(n, 1 << 16, [&](std::int64_t begin, std::int64_t end) {
      kernels_.bf16.widen(from.data<BFloat16>() + begin, 1.0f, end - begin,
                          to.data<float>() + begin);
    });
    return;
  }
  check.That(IsFloat(from.dtype()), "from",
             std::string("is ") + DTypeName(from.dtype()) + ", which is not converted");
  check.Compute(to, "to");
  VisitCompute(to.dtype(), [&](auto tag) {
    using T = decltype(tag);
    T* target = to.data<T>();
    parallel_.Ranges(n, 1 << 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        target[i] = FromFloat<T>(Load(source, from.dtype(), i));
      }
    });
  });
}

void CpuBackend::Zero(const Tensor& tensor) {
  Check("Zero").Present(tensor, "tensor");
  std::memset(tensor.raw(), 0, tensor.NumBytes());
}

}  // namespace slalom
