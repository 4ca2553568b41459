// Compiled with AVX2, FMA and F16C.
#include "kernels/cpu/simd/table.h"
#include "kernels/cpu/simd/vec_avx2.h"

namespace slalom::simd {

const Kernels& Avx2Kernels() {
  static constexpr Kernels kKernels = MakeKernels<VecAvx2, 6, 2>();
  return kKernels;
}

}  // namespace slalom::simd
