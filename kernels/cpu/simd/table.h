// Fills in a Kernels from the loop templates, for one register type.
#pragma once

#include "kernels/cpu/simd/gemm_loops.h"
#include "kernels/cpu/simd/kernels.h"
#include "kernels/cpu/simd/row_loops.h"
#include "kernels/cpu/simd/state_loops.h"
#include "kernels/cpu/simd/transpose.h"

namespace slalom::simd {

template <typename V, typename T>
constexpr RowLoops<T> MakeRowLoops() {
  return {.layer_norm_f32 = &LayerNormRow<V, float, T>,
          .layer_norm = &LayerNormRow<V, T, T>,
          .rms_norm_f32 = &RmsNormRow<V, float, T>,
          .rms_norm = &RmsNormRow<V, T, T>,
          .qk_norm_rope = &QkNormRopeRow<V, T>,
          .channel_norm = &ChannelNormRows<V, T>,
          .activate = &Activate<V, T>,
          .gated_gelu = &GatedGelu<V, T>,
          .widen = &Widen<V, T>,
          .narrow = &Narrow<V, T>,
          .add = &Add<V, T>,
          .dot = &Dot<V, T>,
          .finish = &Finish<V, T>};
}

// kRows x kVectors accumulators of the matrix product must fit the register file.
template <typename V, int kRows, int kVectors>
constexpr Kernels MakeKernels() {
  return {.gemm = &Gemm<V, kRows, kVectors>,
          .gemm_bf16 = nullptr,
          .softmax = &Softmax<V>,
          .feature_map = &FeatureMapRow<V>,
          .dot = &Dot<V, float>,
          .transpose = &Transpose,
          .epilogue = &Epilogue<V>,
          .sum_states = &SumStates<typename V::Wide>,
          .count_from = &CountFrom,
          .f32 = MakeRowLoops<V, float>(),
          .bf16 = MakeRowLoops<V, BFloat16>()};
}

}  // namespace slalom::simd
