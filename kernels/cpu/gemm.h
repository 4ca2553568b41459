// Our own matrix product, for what oneDNN does not do well or not at all: bf16 without AVX-512
// BF16, and rows whose bits do not depend on M on processors without AVX-512.
#pragma once

#include "kernels/backend.h"
#include "kernels/cpu/arena.h"
#include "kernels/cpu/onednn.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd/kernels.h"

namespace slalom {

// As OneDnn::Matmul, for both types on every processor; sums run in f32.
void OwnMatmul(const simd::Kernels& kernels, const Parallel& parallel, Arena& arena,
               const MatmulCall& call);

}  // namespace slalom
