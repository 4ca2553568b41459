#include "kernels/cpu/simd/kernels.h"

namespace slalom::simd {

const Kernels& ChooseKernels(const CpuFeatures& features) {
  if (features.avx512_bf16) return Avx512Bf16Kernels();
  if (features.avx512) return Avx512Kernels();
  return Avx2Kernels();
}

}  // namespace slalom::simd
