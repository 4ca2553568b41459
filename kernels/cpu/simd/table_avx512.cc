// Compiled with AVX-512 F, BW, DQ and VL.
#include "kernels/cpu/simd/table.h"
#include "kernels/cpu/simd/vec_avx512.h"

namespace slalom::simd {

const Kernels& Avx512Kernels() {
  static constexpr Kernels kKernels = MakeKernels<VecAvx512, 8, 2>();
  return kKernels;
}

}  // namespace slalom::simd
