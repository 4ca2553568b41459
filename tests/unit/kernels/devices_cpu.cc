// The CPU back end with every set of loops that this processor can run.
#include "kernels/cpu/cpu_backend.h"
#include "tests/unit/kernels/device_test.h"

namespace slalom {
namespace {

DeviceCase Case(const std::string& name, bool available, const CpuFeatures& features) {
  if (!available) return {name, nullptr};
  return {name, [features] { return std::make_unique<CpuBackend>(BackendOptions{}, features); }};
}

}  // namespace

std::vector<DeviceCase> DeviceCases() {
  const CpuFeatures own = DetectCpuFeatures();
  CpuFeatures avx2;
  avx2.avx2 = true;
  CpuFeatures avx512 = avx2;
  avx512.avx512 = true;
  CpuFeatures pairs = avx512;
  pairs.avx512_bf16 = true;
  pairs.fast_bf16_dot = true;
  return {Case("cpu", true, own), Case("avx2", own.avx2, avx2), Case("avx512", own.avx512, avx512),
          Case("bf16pairs", own.avx512_bf16, pairs)};
}

}  // namespace slalom
