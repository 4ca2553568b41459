#include "kernels/cuda/check.h"

#include "kernels/core/error.h"

namespace slalom::cuda {

void Check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  const std::string message =
      std::string(what) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // not sticky: later calls must not see it
    throw Error(ErrorCode::kResourceExhausted, message);
  }
  throw Error(ErrorCode::kUnavailable, message);
}

void Check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  const std::string message = std::string(what) + ": " + cublasLtGetStatusName(status);
  if (status == CUBLAS_STATUS_ALLOC_FAILED) throw Error(ErrorCode::kResourceExhausted, message);
  // On a lost device cuBLASLt names its own trouble; the runtime says what it is.
  Check(cudaDeviceSynchronize(), message.c_str());
  const bool lost = status == CUBLAS_STATUS_EXECUTION_FAILED;
  throw Error(lost ? ErrorCode::kUnavailable : ErrorCode::kInternal, message);
}

void CheckLaunch(const char* kernel) { Check(cudaGetLastError(), kernel); }

void Require(bool condition, const char* message) {
  if (!condition) throw Error(ErrorCode::kInternal, message);
}

void RequireTensor(const Tensor& tensor, const Shape& shape, DType dtype, const char* name) {
  if (!tensor.defined()) throw Error(ErrorCode::kInternal, std::string(name) + " is missing");
  if (tensor.device().is_cpu()) {
    throw Error(ErrorCode::kInternal, std::string(name) + " is not on a CUDA device");
  }
  if (tensor.dtype() != dtype || !(tensor.shape() == shape)) {
    throw Error(ErrorCode::kInternal, std::string(name) + " is " + DTypeName(tensor.dtype()) +
                                          ToString(tensor.shape()) + ", not " + DTypeName(dtype) +
                                          ToString(shape));
  }
}

bool IsComputeType(DType dtype) { return dtype == DType::kF32 || dtype == DType::kBF16; }

}  // namespace slalom::cuda
