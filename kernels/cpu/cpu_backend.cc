#include "kernels/cpu/cpu_backend.h"

#include "kernels/core/error.h"
#include "kernels/device_factories.h"

namespace slalom {

namespace {

const CpuFeatures& RequireAvx2(const CpuFeatures& features) {
  if (!features.avx2) {
    throw Error(ErrorCode::kFailedPrecondition,
                "device: the CPU back end needs AVX2 and FMA; this processor is " + features.name);
  }
  return features;
}

}  // namespace

CpuBackend::CpuBackend(const BackendOptions& options) : CpuBackend(options, DetectCpuFeatures()) {}

CpuBackend::CpuBackend(const BackendOptions& options, const CpuFeatures& features)
    : features_(RequireAvx2(features)),
      kernels_(simd::ChooseKernels(features_)),
      force_f32_(options.force_f32),
      parallel_(options.cpu_threads > 0 ? options.cpu_threads : UsableCores()),
      arena_(Arena::Create()),
      onednn_(parallel_.threads()) {}

DType CpuBackend::preferred_dtype() const {
  const bool fast_bf16 = features_.fast_bf16_dot || features_.amx_bf16;
  return fast_bf16 && !force_f32_ ? DType::kBF16 : DType::kF32;
}

std::string CpuBackend::Describe() const {
  const char* level = features_.amx_bf16      ? "AMX"
                      : features_.avx512_bf16 ? "AVX-512 BF16"
                      : features_.avx512      ? "AVX-512"
                                              : "AVX2";
  return features_.name + " (" + level + "), " + std::to_string(parallel_.threads()) +
         (parallel_.threads() == 1 ? " thread" : " threads");
}

std::unique_ptr<Backend> MakeCpuBackend(const BackendOptions& options) {
  return std::make_unique<CpuBackend>(options);
}

}  // namespace slalom
