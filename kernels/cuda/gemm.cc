#include "kernels/cuda/gemm.h"

#include <algorithm>

#include "kernels/core/error.h"
#include "kernels/cuda/check.h"

namespace slalom::cuda {
namespace {

cudaDataType_t LibraryType(DType type) { return type == DType::kBF16 ? CUDA_R_16BF : CUDA_R_32F; }

cublasLtEpilogue_t LibraryEpilogue(GemmArgs::Epilogue epilogue) {
  switch (epilogue) {
    case GemmArgs::Epilogue::kBias:
      return CUBLASLT_EPILOGUE_BIAS;
    case GemmArgs::Epilogue::kGelu:
      return CUBLASLT_EPILOGUE_GELU;
    case GemmArgs::Epilogue::kGeluBias:
      return CUBLASLT_EPILOGUE_GELU_BIAS;
    case GemmArgs::Epilogue::kNone:
      break;
  }
  return CUBLASLT_EPILOGUE_DEFAULT;
}

bool HasBias(GemmArgs::Epilogue epilogue) {
  return epilogue == GemmArgs::Epilogue::kBias || epilogue == GemmArgs::Epilogue::kGeluBias;
}

// The largest power of two up to 256 that divides the address: what the library may rely on.
std::int64_t Alignment(const void* pointer) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  std::int64_t alignment = 256;
  while (address % static_cast<std::uintptr_t>(alignment) != 0) alignment /= 2;
  return alignment;
}

struct Layout {
  cublasLtMatrixLayout_t handle = nullptr;

  Layout() = default;
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
  ~Layout() {
    if (handle != nullptr) cublasLtMatrixLayoutDestroy(handle);
  }
  // Column-major, as the library counts.
  void Create(DType type, std::int64_t rows, std::int64_t columns, std::int64_t leading,
              std::int64_t batch, std::int64_t stride) {
    Check(cublasLtMatrixLayoutCreate(&handle, LibraryType(type), static_cast<std::uint64_t>(rows),
                                     static_cast<std::uint64_t>(columns), leading),
          "cublasLtMatrixLayoutCreate");
    const auto count = static_cast<std::int32_t>(batch);
    Check(cublasLtMatrixLayoutSetAttribute(handle, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                           sizeof(count)),
          "batch count");
    Check(cublasLtMatrixLayoutSetAttribute(handle, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                           &stride, sizeof(stride)),
          "batch stride");
  }
};

struct Preference {
  cublasLtMatmulPreference_t handle = nullptr;

  Preference() { Check(cublasLtMatmulPreferenceCreate(&handle), "cublasLtMatmulPreferenceCreate"); }
  Preference(const Preference&) = delete;
  Preference& operator=(const Preference&) = delete;
  ~Preference() { cublasLtMatmulPreferenceDestroy(handle); }
  template <typename T>
  void Set(cublasLtMatmulPreferenceAttributes_t attribute, T value) {
    Check(cublasLtMatmulPreferenceSetAttribute(handle, attribute, &value, sizeof(value)),
          "cublasLtMatmulPreferenceSetAttribute");
  }
};

}  // namespace

// The library computes column-major; a row-major matrix is its transpose there. So out^T = b^T a^T:
// the library's first factor is our b, its second our a.
struct Gemm::Plan {
  cublasLtMatmulDesc_t operation = nullptr;
  Layout first, second, result;
  cublasLtMatmulAlgo_t algorithm{};
  std::size_t workspace_bytes = 0;
  bool supported = false;

  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    if (operation != nullptr) cublasLtMatmulDescDestroy(operation);
  }
  template <typename T>
  void Set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    Check(cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof(value)),
          "cublasLtMatmulDescSetAttribute");
  }
};

Gemm::Gemm(cudaStream_t stream, Tensor workspace)
    : stream_(stream), workspace_(std::move(workspace)) {
  Check(cublasLtCreate(&handle_), "cublasLtCreate");
}

Gemm::~Gemm() {
  plans_.clear();
  cublasLtDestroy(handle_);
}

std::unique_ptr<Gemm::Plan> Gemm::MakePlan(const GemmArgs& args) const {
  auto plan = std::make_unique<Plan>();
  Check(cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
        "cublasLtMatmulDescCreate");
  plan->Set(CUBLASLT_MATMUL_DESC_TRANSA, args.b_is_kn ? CUBLAS_OP_N : CUBLAS_OP_T);
  plan->Set(CUBLASLT_MATMUL_DESC_EPILOGUE, LibraryEpilogue(args.epilogue));
  if (HasBias(args.epilogue)) {
    plan->Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, args.bias);
    plan->Set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, LibraryType(args.out_type));
  }
  plan->first.Create(args.in_type, args.b_is_kn ? args.n : args.k, args.b_is_kn ? args.k : args.n,
                     args.ldb, args.batch, args.b_stride);
  plan->second.Create(args.in_type, args.k, args.m, args.lda, args.batch, args.a_stride);
  plan->result.Create(args.out_type, args.n, args.m, args.ldo, args.batch, args.out_stride);

  Preference preference;
  const void* residual = args.beta != 0.0f ? args.residual : args.out;
  preference.Set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                 static_cast<std::uint64_t>(workspace_.NumBytes()));
  preference.Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                 static_cast<std::uint32_t>(Alignment(args.b)));
  preference.Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                 static_cast<std::uint32_t>(Alignment(args.a)));
  preference.Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                 static_cast<std::uint32_t>(Alignment(residual)));
  preference.Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                 static_cast<std::uint32_t>(Alignment(args.out)));

  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle_, plan->operation, plan->first.handle, plan->second.handle, plan->result.handle,
      plan->result.handle, preference.handle, 1, &found, &count);
  plan->supported =
      status == CUBLAS_STATUS_SUCCESS && count > 0 && found.state == CUBLAS_STATUS_SUCCESS;
  plan->algorithm = found.algo;
  plan->workspace_bytes = found.workspaceSize;
  return plan;
}

bool Gemm::TryRun(const GemmArgs& args) {
  if (args.m == 0 || args.n == 0 || args.batch == 0) return true;
  const void* residual = args.beta != 0.0f ? args.residual : args.out;
  const Key key{args.m,
                args.n,
                args.k,
                args.lda,
                args.ldb,
                args.ldo,
                args.batch,
                args.a_stride,
                args.b_stride,
                args.out_stride,
                static_cast<std::int64_t>(args.in_type),
                static_cast<std::int64_t>(args.out_type),
                static_cast<std::int64_t>(args.epilogue) * 4 + (args.b_is_kn ? 2 : 0) +
                    (args.beta != 0.0f ? 1 : 0),
                Alignment(args.a),
                Alignment(args.b),
                Alignment(args.out),
                Alignment(residual),
                HasBias(args.epilogue) ? Alignment(args.bias) : 0};
  std::unique_ptr<Plan>& plan = plans_[key];
  if (plan == nullptr) plan = MakePlan(args);
  if (!plan->supported) return false;
  if (HasBias(args.epilogue)) plan->Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, args.bias);
  Check(cublasLtMatmul(handle_, plan->operation, &args.alpha, args.b, plan->first.handle, args.a,
                       plan->second.handle, &args.beta, residual, plan->result.handle, args.out,
                       plan->result.handle, &plan->algorithm, workspace_.raw(),
                       plan->workspace_bytes, stream_),
        "cublasLtMatmul");
  return true;
}

void Gemm::Run(const GemmArgs& args) {
  if (!TryRun(args)) {
    throw Error(ErrorCode::kInternal, "cuBLASLt has no kernel for a product of " +
                                          std::to_string(args.m) + " x " + std::to_string(args.k) +
                                          " and " + std::to_string(args.k) + " x " +
                                          std::to_string(args.n));
  }
}

}  // namespace slalom::cuda
