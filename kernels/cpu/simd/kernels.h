// The inner loops of the CPU back end, once per instruction set.
//
// vec_*.h wrap the registers, *_loops.h are templates over them, table_*.cc instantiate those with
// the compiler flags of one instruction set and fill in a Kernels. Nothing else is compiled with
// those flags, so that the rest runs anywhere.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/cpu_features.h"

namespace slalom::simd {

// c[m, n] = a[m, k] b[k, n], added to c if `accumulate`. b and c are row-major with strides in
// elements; a has any strides; n is a multiple of 16. Every element of c is one chain of fused
// multiply-adds over ascending k, so that it depends on its row and column alone.
struct GemmTile {
  std::int64_t m = 0, n = 0, k = 0;
  const float* a = nullptr;
  std::int64_t a_row = 0;     // from one row of a to the next
  std::int64_t a_column = 1;  // and from one column to the next
  const float* b = nullptr;
  std::int64_t ldb = 0;
  float* c = nullptr;
  std::int64_t ldc = 0;
  bool accumulate = false;
};

// The same with bf16 operands, k even: a [m, k] row-major; b holds pairs of rows side by side,
// [k / 2][n][2], and ldb counts pairs.
struct GemmTileBF16 {
  std::int64_t m = 0, n = 0, k = 0;
  const BFloat16* a = nullptr;
  std::int64_t lda = 0;
  const BFloat16* b = nullptr;
  std::int64_t ldb = 0;
  float* c = nullptr;
  std::int64_t ldc = 0;
  bool accumulate = false;
};

// One step of the online softmax over a tile of products [rows, columns]. A score is scale *
// product
// + bias. Reads and updates each row's running maximum and sum, turns the products into
// exp(score - maximum), in place and, if asked, as bf16, and scales the row's accumulator
// [rows, width] when its maximum moved. Columns from `columns` to `padded`, a multiple of 16,
// become 0.
struct SoftmaxTile {
  std::int64_t rows = 0, columns = 0, padded = 0;
  float* scores = nullptr;
  std::int64_t stride = 0;
  float scale = 1.0f;
  const float* bias = nullptr;  // optional: row r, column c takes bias[c - r]
  BFloat16* rounded = nullptr;  // optional, the same stride
  float* maximum = nullptr;     // [rows]
  float* sum = nullptr;         // [rows]
  float* accumulator = nullptr;
  std::int64_t width = 0;
};

// sum = from + states of the blocks `added` - states of the blocks `removed`, [count], in double.
// Block j's state starts at states + j * stride; count is a multiple of 16.
struct StateSum {
  const float* states = nullptr;
  std::int64_t stride = 0;
  std::int64_t count = 0;
  const std::int32_t* added = nullptr;
  std::int64_t added_count = 0;
  const std::int32_t* removed = nullptr;
  std::int64_t removed_count = 0;
  const double* from = nullptr;  // optional: else zeros; may be sum
  double* sum = nullptr;
  float* rounded = nullptr;  // optional: sum, rounded
};

template <typename T>
struct RowLoops {
  // See the operations of the same names in backend.h; one row each.
  void (*layer_norm_f32)(const float* x, const float* weight, const float* bias, const float* scale,
                         const float* shift, float eps, std::int64_t d, T* out);
  void (*layer_norm)(const T* x, const float* weight, const float* bias, const float* scale,
                     const float* shift, float eps, std::int64_t d, T* out);
  void (*rms_norm_f32)(const float* x, const float* weight, float eps, std::int64_t d, T* out);
  void (*rms_norm)(const T* x, const float* weight, float eps, std::int64_t d, T* out);
  // width = heads * head_size; weight, cos and sin may be null; [head_size / 2] of cos and sin.
  void (*qk_norm_rope)(const T* x, const float* weight, float eps, const float* cos,
                       const float* sin, bool relu, std::int64_t heads, std::int64_t head_size,
                       T* out);
  void (*channel_norm)(const T* x, const float* gamma, bool silu, std::int64_t rows,
                       std::int64_t channels, T* out);
  void (*activate)(Activation activation, const T* x, std::int64_t n, T* out);
  void (*gated_gelu)(const T* x, const T* gate, std::int64_t n, T* out);
  // out[i] = scale * x[i].
  void (*widen)(const T* x, float scale, std::int64_t n, float* out);
  void (*narrow)(const float* x, std::int64_t n, T* out);
  // sum[i] += x[i].
  void (*add)(const T* x, std::int64_t n, float* sum);
  float (*dot)(const T* x, const float* y, std::int64_t n);
  // out = scale * x + extra (extra may be null).
  void (*finish)(const float* x, float scale, const float* extra, std::int64_t n, T* out);
};

struct Kernels {
  void (*gemm)(const GemmTile& tile);
  void (*gemm_bf16)(const GemmTileBF16& tile);  // null where the processor has no such dot product
  void (*softmax)(const SoftmaxTile& tile);
  // out = phi(x) over n channels; x may be out.
  void (*feature_map)(FeatureMap map, const float* x, std::int64_t n, float* out);
  float (*dot)(const float* a, const float* b, std::int64_t n);
  // out[c * out_stride + r] = x[r * stride + c]: 32-bit elements, whatever they are.
  void (*transpose)(const float* x, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                    float* out, std::int64_t out_stride);
  // y = act(y + bias), then residual + gate * y (all but y optional), n columns.
  void (*epilogue)(const float* y, const float* bias, Activation activation, const float* gate,
                   const float* residual, std::int64_t n, float* out);
  void (*sum_states)(const StateSum& sum);
  // How many of n keys are at least `least`.
  std::int64_t (*count_from)(const std::int32_t* keys, std::int64_t n, std::int32_t least);
  RowLoops<float> f32;
  RowLoops<BFloat16> bf16;
};

const Kernels& Avx2Kernels();
const Kernels& Avx512Kernels();
// As Avx512Kernels, with gemm_bf16.
const Kernels& Avx512Bf16Kernels();

// The best table that `features` allow; they must include avx2.
const Kernels& ChooseKernels(const CpuFeatures& features);

template <typename T>
const RowLoops<T>& Rows(const Kernels& kernels);
template <>
inline const RowLoops<float>& Rows<float>(const Kernels& kernels) {
  return kernels.f32;
}
template <>
inline const RowLoops<BFloat16>& Rows<BFloat16>(const Kernels& kernels) {
  return kernels.bf16;
}

}  // namespace slalom::simd
