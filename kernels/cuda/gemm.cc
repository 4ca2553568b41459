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

constexpr std::int64_t kTypicalRows = 16384;   // m that kernels are chosen for
constexpr std::uintptr_t kBestAlignment = 16;  // bytes; no kernel asks for more

// What the library may rely on for every row of a matrix with this stride.
std::int64_t Alignment(const void* pointer, std::int64_t stride, DType type) {
  const auto bits = reinterpret_cast<std::uintptr_t>(pointer) |
                    static_cast<std::uintptr_t>(stride) * ByteSize(type) | kBestAlignment;
  return static_cast<std::int64_t>(bits & ~(bits - 1));
}

// A column-major matrix as the library counts.
struct Layout {
  cublasLtMatrixLayoutOpaque_t value{};

  Layout(DType type, std::int64_t rows, std::int64_t columns, std::int64_t leading,
         std::int64_t batch, std::int64_t stride) {
    Check(cublasLtMatrixLayoutInit(&value, LibraryType(type), static_cast<std::uint64_t>(rows),
                                   static_cast<std::uint64_t>(columns), leading),
          "cublasLtMatrixLayoutInit");
    const auto count = static_cast<std::int32_t>(batch);
    Check(cublasLtMatrixLayoutSetAttribute(&value, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                           sizeof(count)),
          "batch count");
    Check(cublasLtMatrixLayoutSetAttribute(&value, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                           &stride, sizeof(stride)),
          "batch stride");
  }
};

// The library computes column-major; a row-major matrix is its transpose there. So out^T = b^T a^T:
// the library's first factor is our b, its second our a.
struct Layouts {
  Layout first, second, result;

  Layouts(const GemmArgs& args, std::int64_t m)
      : first(args.in_type, args.b_is_kn ? args.n : args.k, args.b_is_kn ? args.k : args.n,
              args.ldb, args.batch, args.b_stride),
        second(args.in_type, args.k, m, args.lda, args.batch, args.a_stride),
        result(args.out_type, args.n, m, args.ldo, args.batch, args.out_stride) {}
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

struct Gemm::Plan {
  cublasLtMatmulDesc_t operation = nullptr;
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
  Preference preference;
  const void* residual = args.beta != 0.0f ? args.residual : args.out;
  const auto alignment = [](const void* pointer, std::int64_t stride, DType type) {
    return static_cast<std::uint32_t>(Alignment(pointer, stride, type));
  };
  preference.Set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                 static_cast<std::uint64_t>(workspace_.NumBytes()));
  preference.Set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                 static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_NONE));
  preference.Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                 alignment(args.b, args.ldb, args.in_type));
  preference.Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                 alignment(args.a, args.lda, args.in_type));
  preference.Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                 alignment(residual, args.ldo, args.out_type));
  preference.Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                 alignment(args.out, args.ldo, args.out_type));

  Layouts layouts(args, kTypicalRows);
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle_, plan->operation, &layouts.first.value, &layouts.second.value, &layouts.result.value,
      &layouts.result.value, preference.handle, 1, &found, &count);
  plan->supported =
      status == CUBLAS_STATUS_SUCCESS && count > 0 && found.state == CUBLAS_STATUS_SUCCESS;
  plan->algorithm = found.algo;
  plan->workspace_bytes = found.workspaceSize;
  return plan;
}

bool Gemm::TryRun(const GemmArgs& args) {
  if (args.m == 0 || args.n == 0 || args.batch == 0) return true;
  const void* residual = args.beta != 0.0f ? args.residual : args.out;
  const Key key{args.n,
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
                Alignment(args.a, args.lda, args.in_type),
                Alignment(args.b, args.ldb, args.in_type),
                Alignment(args.out, args.ldo, args.out_type),
                Alignment(residual, args.ldo, args.out_type),
                HasBias(args.epilogue) ? Alignment(args.bias, 0, args.out_type) : 0};
  std::unique_ptr<Plan>& plan = plans_[key];
  if (plan == nullptr) plan = MakePlan(args);
  if (!plan->supported) return false;
  if (HasBias(args.epilogue)) plan->Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, args.bias);
  Layouts layouts(args, args.m);
  const cublasStatus_t status = cublasLtMatmul(
      handle_, plan->operation, &args.alpha, args.b, &layouts.first.value, args.a,
      &layouts.second.value, &args.beta, residual, &layouts.result.value, args.out,
      &layouts.result.value, &plan->algorithm, workspace_.raw(), plan->workspace_bytes, stream_);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) {
    plan->supported = false;
    return false;
  }
  Check(status, "cublasLtMatmul");
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
