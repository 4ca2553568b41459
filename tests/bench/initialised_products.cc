// Lets initcheck follow cuBLASLt's products: a library that model_on_gpu.sh's part `sanitize`
// preloads.
//
// initcheck does not see what cuBLASLt's kernels for Hopper write (bulk stores), and calls reads of
// a product reads of memory that nobody wrote. Here each product's place is set by cudaMemset,
// which initcheck does see, before the library fills it; what still is reported is ours.
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>

namespace {

template <typename T>
T Attribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attribute) {
  T value{};
  cublasLtMatrixLayoutGetAttribute(layout, attribute, &value, sizeof(value), nullptr);
  return value;
}

std::size_t ElementBytes(cublasLtMatrixLayout_t layout) {
  const auto type =
      static_cast<cudaDataType_t>(Attribute<std::uint32_t>(layout, CUBLASLT_MATRIX_LAYOUT_TYPE));
  return type == CUDA_R_32F ? 4 : 2;  // the only other one that we ask for is bf16
}

// Matrices are stored by columns.
void SetBytes(void* matrices, cublasLtMatrixLayout_t layout, cudaStream_t stream) {
  const std::size_t bytes = ElementBytes(layout);
  const auto rows = Attribute<std::uint64_t>(layout, CUBLASLT_MATRIX_LAYOUT_ROWS);
  const auto columns = Attribute<std::uint64_t>(layout, CUBLASLT_MATRIX_LAYOUT_COLS);
  const auto pitch = Attribute<std::int64_t>(layout, CUBLASLT_MATRIX_LAYOUT_LD);
  const auto count = Attribute<std::int32_t>(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT);
  const auto stride = Attribute<std::int64_t>(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET);
  for (std::int32_t i = 0; i < count; ++i) {
    auto* matrix =
        static_cast<std::byte*>(matrices) + i * stride * static_cast<std::int64_t>(bytes);
    const std::size_t height = rows * bytes, distance = static_cast<std::size_t>(pitch) * bytes;
    // A matrix without gaps at once: initcheck takes the columns of a 2D set one by one.
    if (distance == height) {
      cudaMemsetAsync(matrix, 0, height * columns, stream);
    } else {
      cudaMemset2DAsync(matrix, distance, 0, height, columns, stream);
    }
  }
}

}  // namespace

extern "C" cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation,
                                         const void* alpha, const void* a,
                                         cublasLtMatrixLayout_t a_layout, const void* b,
                                         cublasLtMatrixLayout_t b_layout, const void* beta,
                                         const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                                         cublasLtMatrixLayout_t d_layout,
                                         const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                                         std::size_t workspace_bytes, cudaStream_t stream) {
  static const auto real =
      reinterpret_cast<decltype(&cublasLtMatmul)>(dlsym(RTLD_NEXT, "cublasLtMatmul"));
  // What is added to in place must stay; whoever wrote it was seen.
  const bool adds = *static_cast<const float*>(beta) != 0.0f;
  if (!adds || c != d) SetBytes(d, d_layout, stream);
  return real(handle, operation, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout,
              algorithm, workspace, workspace_bytes, stream);
}
