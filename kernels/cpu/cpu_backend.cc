#include "kernels/cpu/cpu_backend.h"

#include "kernels/core/error.h"
#include "kernels/device_factories.h"

namespace slalom {

CpuBackend::CpuBackend(const BackendOptions& options)
    : features_(DetectCpuFeatures()),
      force_f32_(options.force_f32),
      parallel_(options.cpu_threads > 0 ? options.cpu_threads : UsableCores()),
      arena_(Arena::Create()),
      onednn_(parallel_.threads(), features_.avx512) {
  if (!features_.avx2) {
    throw Error(ErrorCode::kFailedPrecondition,
                "device: the CPU back end needs AVX2 and FMA; this processor is " + features_.name);
  }
}

DType CpuBackend::preferred_dtype() const {
  const bool fast_bf16 = features_.avx512_bf16 || features_.amx_bf16;
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
