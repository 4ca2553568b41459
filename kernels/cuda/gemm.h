// Matrix products by cuBLASLt, with plans that are found once per kind of product.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>

#include "kernels/core/tensor.h"

namespace slalom::cuda {

// out = act(alpha * a b + beta * residual + bias), all row-major, f32 accumulation. Inputs are f32
// (multiplied as such, not as tf32) or bf16. Batch entries lie *_stride elements apart.
struct GemmArgs {
  enum class Epilogue { kNone, kBias, kGelu, kGeluBias };

  std::int64_t m = 0, n = 0, k = 0;
  DType in_type = DType::kBF16;
  DType out_type = DType::kBF16;
  const void* a = nullptr;  // [m, k], rows lda apart
  std::int64_t lda = 0;
  const void* b = nullptr;  // [n, k], rows ldb apart; or [k, n] with b_is_kn
  std::int64_t ldb = 0;
  bool b_is_kn = false;
  const void* residual = nullptr;  // [m, n] of out_type, laid out as out; used when beta is not 0
  void* out = nullptr;             // [m, n], rows ldo apart
  std::int64_t ldo = 0;
  std::int64_t batch = 1;
  std::int64_t a_stride = 0, b_stride = 0, out_stride = 0;
  float alpha = 1.0f;
  float beta = 0.0f;
  Epilogue epilogue = Epilogue::kNone;
  const void* bias = nullptr;  // [n] of out_type, with kBias and kGeluBias
};

// Owns the library handle, the workspace and the plans. For the backend's one thread.
//
// A row of out has the same bits whatever m is: the library's kernel, which decides in what order
// the sum over k runs, is chosen for (n, k), types and strides alone, as if m were large, and never
// splits k. Alignment is taken from the strides, so that slices of a tensor count as the whole.
//
// The library orders its kernels by a guess. The first product of a plan that is large enough to
// tell them apart, and can be repeated because it reads nothing that it writes, times them: from
// then on the plan has the fastest of those that gave the same bits as the library's first. That
// one call waits for the device.
class Gemm {
 public:
  // `workspace` stays alive as long as this; its size bounds what the library may choose.
  Gemm(cudaStream_t stream, Tensor workspace);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  // Queues the product; false when the library has no kernel for this combination, which happens
  // for fused epilogues only.
  bool TryRun(const GemmArgs& args);
  // The same; throws Error(kInternal) where TryRun says false.
  void Run(const GemmArgs& args);

 private:
  struct Plan;
  using Key = std::array<std::int64_t, 17>;

  std::unique_ptr<Plan> MakePlan(const GemmArgs& args) const;
  // Queues the product by the plan's candidate; the library's verdict.
  cublasStatus_t Queue(const GemmArgs& args, Plan& plan, std::size_t candidate) const;
  void ChooseByTime(const GemmArgs& args, Plan& plan) const;

  cudaStream_t stream_;
  Tensor workspace_;
  std::size_t library_bytes_;  // of the workspace; the rest is for comparing results
  cublasLtHandle_t handle_ = nullptr;
  std::map<Key, std::unique_ptr<Plan>> plans_;
};

}  // namespace slalom::cuda
