// Lets racecheck and initcheck run beside cuBLASLt: a library to preload (LD_PRELOAD) that makes
// every product by a plain kernel.
//
// With --kernel-name, racecheck breaks ("failed to handle a hardware exception") as soon as a
// product of cuBLASLt runs uninstrumented; without, its kernels take minutes and are not ours to
// judge; and initcheck does not see what they write. This kernel has "slalom" in its name, so that
// a filter by that name takes it along.
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace {

// `batch` matrices, stored by columns, of f32 or bf16.
struct Matrices {
  void* data = nullptr;
  bool f32 = false;
  std::int64_t rows = 0, columns = 0, pitch = 0, stride = 0;
  int batch = 1;
};

__device__ float Load(const Matrices& m, std::int64_t at) {
  return m.f32 ? static_cast<const float*>(m.data)[at]
               : __bfloat162float(static_cast<const __nv_bfloat16*>(m.data)[at]);
}

struct Product {
  Matrices a, b, c, d;
  bool a_transposed = false, gelu = false;
  float alpha = 1.0f, beta = 0.0f;
  Matrices bias;  // one number a row, if there is data
};

// d = gelu(alpha a b + beta c + bias), one element a thread.
__global__ void slalom_plain_product(const Product p) {
  const std::int64_t row = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const std::int64_t column = std::int64_t{blockIdx.y} * blockDim.y + threadIdx.y;
  const std::int64_t sample = blockIdx.z;
  if (row >= p.d.rows || column >= p.d.columns) return;
  const std::int64_t a_row = p.a_transposed ? p.a.pitch : 1,
                     a_step = p.a_transposed ? 1 : p.a.pitch;
  float sum = 0.0f;
  for (std::int64_t k = 0; k < p.b.rows; ++k) {
    sum += Load(p.a, sample * p.a.stride + row * a_row + k * a_step) *
           Load(p.b, sample * p.b.stride + column * p.b.pitch + k);
  }
  sum *= p.alpha;
  if (p.beta != 0.0f) {
    sum += p.beta * Load(p.c, sample * p.c.stride + column * p.c.pitch + row);
  }
  if (p.bias.data != nullptr) sum += Load(p.bias, row);
  if (p.gelu) {
    sum *= 0.5f * (1.0f + tanhf(0.7978845608f * (sum + 0.044715f * sum * sum * sum)));
  }
  const std::int64_t at = sample * p.d.stride + column * p.d.pitch + row;
  if (p.d.f32) {
    static_cast<float*>(p.d.data)[at] = sum;
  } else {
    static_cast<__nv_bfloat16*>(p.d.data)[at] = __float2bfloat16(sum);
  }
}

template <typename T>
T Attribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attribute) {
  T value{};
  cublasLtMatrixLayoutGetAttribute(layout, attribute, &value, sizeof(value), nullptr);
  return value;
}

template <typename T>
T Attribute(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute) {
  T value{};
  cublasLtMatmulDescGetAttribute(operation, attribute, &value, sizeof(value), nullptr);
  return value;
}

Matrices Describe(const void* data, cublasLtMatrixLayout_t layout) {
  Matrices m;
  m.data = const_cast<void*>(data);
  m.f32 = Attribute<std::uint32_t>(layout, CUBLASLT_MATRIX_LAYOUT_TYPE) == CUDA_R_32F;
  m.rows = Attribute<std::int64_t>(layout, CUBLASLT_MATRIX_LAYOUT_ROWS);
  m.columns = Attribute<std::int64_t>(layout, CUBLASLT_MATRIX_LAYOUT_COLS);
  m.pitch = Attribute<std::int64_t>(layout, CUBLASLT_MATRIX_LAYOUT_LD);
  m.stride = Attribute<std::int64_t>(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET);
  m.batch = Attribute<std::int32_t>(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT);
  return m;
}

}  // namespace

extern "C" cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t operation,
                                         const void* alpha, const void* a,
                                         cublasLtMatrixLayout_t a_layout, const void* b,
                                         cublasLtMatrixLayout_t b_layout, const void* beta,
                                         const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                                         cublasLtMatrixLayout_t d_layout,
                                         const cublasLtMatmulAlgo_t*, void*, std::size_t,
                                         cudaStream_t stream) {
  Product product{Describe(a, a_layout), Describe(b, b_layout), Describe(c, c_layout),
                  Describe(d, d_layout)};
  product.a_transposed =
      Attribute<std::int32_t>(operation, CUBLASLT_MATMUL_DESC_TRANSA) == CUBLAS_OP_T;
  product.alpha = *static_cast<const float*>(alpha);
  product.beta = *static_cast<const float*>(beta);
  const auto epilogue = Attribute<std::uint32_t>(operation, CUBLASLT_MATMUL_DESC_EPILOGUE);
  product.gelu = epilogue == CUBLASLT_EPILOGUE_GELU || epilogue == CUBLASLT_EPILOGUE_GELU_BIAS;
  if (epilogue == CUBLASLT_EPILOGUE_BIAS || epilogue == CUBLASLT_EPILOGUE_GELU_BIAS) {
    product.bias.data = Attribute<void*>(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER);
    product.bias.f32 =
        Attribute<std::int32_t>(operation, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE) == CUDA_R_32F;
  }
  const dim3 threads(32, 8);
  const dim3 blocks(static_cast<unsigned>((product.d.rows + 31) / 32),
                    static_cast<unsigned>((product.d.columns + 7) / 8),
                    static_cast<unsigned>(product.d.batch));
  slalom_plain_product<<<blocks, threads, 0, stream>>>(product);
  return cudaPeekAtLastError() == cudaSuccess ? CUBLAS_STATUS_SUCCESS
                                              : CUBLAS_STATUS_EXECUTION_FAILED;
}
