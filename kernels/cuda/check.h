// Turns what CUDA, cuBLAS and a caller's arguments say into slalom::Error.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <string>

#include "kernels/core/tensor.h"

namespace slalom::cuda {

// Throws kResourceExhausted when the device is out of memory and kUnavailable for anything else: a
// failed launch or a fault is sticky, and the context is of no use any more.
void Check(cudaError_t status, const char* what);
void Check(cublasStatus_t status, const char* what);
// After a kernel launch: reports a launch that could not be made, without waiting for the device.
void CheckLaunch(const char* kernel);

// Throws kInternal with `message` unless `condition` holds. For arguments of operations.
void Require(bool condition, const char* message);
// Requires that `tensor` is on a CUDA device with this shape and type; `name` is "Op: argument".
void RequireTensor(const Tensor& tensor, const Shape& shape, DType dtype, const char* name);
// True for the compute types that operations accept: f32 and bf16.
bool IsComputeType(DType dtype);

}  // namespace slalom::cuda
