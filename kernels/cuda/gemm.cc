#include "kernels/cuda/gemm.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <vector>

#include "kernels/core/error.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/fastest_same.h"

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
constexpr int kCandidates = 16;                // of which the first that suits is taken, or timed
constexpr std::size_t kSumBytes = 512;         // of the workspace, for comparing results
constexpr std::uintptr_t kBestAlignment = 16;  // bytes; no kernel asks for more

// What the library may rely on for every row of every matrix with these strides.
std::int64_t Alignment(const void* pointer, std::int64_t stride, std::int64_t batch_stride,
                       DType type) {
  const auto bits = reinterpret_cast<std::uintptr_t>(pointer) |
                    static_cast<std::uintptr_t>(stride | batch_stride) * ByteSize(type) |
                    kBestAlignment;
  return static_cast<std::int64_t>(bits & ~(bits - 1));
}

struct Alignments {
  std::int64_t a, b, residual, out;

  explicit Alignments(const GemmArgs& args) {
    const bool many = args.batch > 1;
    const auto out_stride = many ? args.out_stride : 0;
    a = Alignment(args.a, args.lda, many ? args.a_stride : 0, args.in_type);
    b = Alignment(args.b, args.ldb, many ? args.b_stride : 0, args.in_type);
    out = Alignment(args.out, args.ldo, out_stride, args.out_type);
    residual =
        args.beta != 0.0f ? Alignment(args.residual, args.ldo, out_stride, args.out_type) : out;
  }
};

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
  std::vector<cublasLtMatmulAlgo_t> candidates;  // none: the library has no kernel
  std::size_t chosen = 0;
  bool timed = false;

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
    : stream_(stream),
      workspace_(std::move(workspace)),
      library_bytes_(workspace_.NumBytes() - kSumBytes) {
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
  const Alignments alignments(args);
  preference.Set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                 static_cast<std::uint64_t>(library_bytes_));
  preference.Set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                 static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_NONE));
  preference.Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                 static_cast<std::uint32_t>(alignments.b));
  preference.Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                 static_cast<std::uint32_t>(alignments.a));
  preference.Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                 static_cast<std::uint32_t>(alignments.residual));
  preference.Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                 static_cast<std::uint32_t>(alignments.out));

  // The library promises its answers for the shape that it was asked about alone: take those that
  // it also accepts for a single row, or else the best.
  Layouts many(args, kTypicalRows), one(args, 1);
  std::array<cublasLtMatmulHeuristicResult_t, kCandidates> found{};
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle_, plan->operation, &many.first.value, &many.second.value, &many.result.value,
      &many.result.value, preference.handle, kCandidates, found.data(), &count);
  if (status != CUBLAS_STATUS_SUCCESS) return plan;
  const auto suits_one_row = [&](const cublasLtMatmulHeuristicResult_t& candidate) {
    cublasLtMatmulHeuristicResult_t checked{};
    return cublasLtMatmulAlgoCheck(handle_, plan->operation, &one.first.value, &one.second.value,
                                   &one.result.value, &one.result.value, &candidate.algo,
                                   &checked) == CUBLAS_STATUS_SUCCESS &&
           checked.workspaceSize <= library_bytes_;
  };
  std::optional<cublasLtMatmulAlgo_t> best;
  for (int i = 0; i < count; ++i) {
    const cublasLtMatmulHeuristicResult_t& candidate = found[static_cast<std::size_t>(i)];
    if (candidate.state != CUBLAS_STATUS_SUCCESS) continue;
    if (!best) best = candidate.algo;
    if (suits_one_row(candidate)) plan->candidates.push_back(candidate.algo);
  }
  if (plan->candidates.empty() && best) plan->candidates.push_back(*best);
  return plan;
}

cublasStatus_t Gemm::Queue(const GemmArgs& args, Plan& plan, std::size_t candidate) const {
  const void* residual = args.beta != 0.0f ? args.residual : args.out;
  if (HasBias(args.epilogue)) plan.Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, args.bias);
  Layouts layouts(args, args.m);
  return cublasLtMatmul(handle_, plan.operation, &args.alpha, args.b, &layouts.first.value, args.a,
                        &layouts.second.value, &args.beta, residual, &layouts.result.value,
                        args.out, &layouts.result.value, &plan.candidates[candidate],
                        workspace_.raw(), library_bytes_, stream_);
}

void Gemm::ChooseByTime(const GemmArgs& args, Plan& plan) const {
  plan.timed = true;
  const auto bytes = static_cast<std::size_t>(args.m * args.n) * ByteSize(args.out_type);
  plan.chosen = static_cast<std::size_t>(FastestOfSame(
      stream_, static_cast<int>(plan.candidates.size()),
      [&](int i) {
        return Queue(args, plan, static_cast<std::size_t>(i)) == CUBLAS_STATUS_SUCCESS;
      },
      args.out, bytes, workspace_.data<std::byte>() + library_bytes_));
}

bool Gemm::TryRun(const GemmArgs& args) {
  if (args.m == 0 || args.n == 0 || args.batch == 0) return true;
  const Alignments alignments(args);
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
                alignments.a,
                alignments.b,
                alignments.out,
                alignments.residual,
                HasBias(args.epilogue) ? Alignment(args.bias, 0, 0, args.out_type) : 0};
  std::unique_ptr<Plan>& plan = plans_[key];
  if (plan == nullptr) plan = MakePlan(args);
  if (plan->candidates.empty()) return false;
  const bool repeatable = args.beta == 0.0f && args.batch == 1 && args.ldo == args.n;
  const bool tells = args.m >= kTypicalRows && args.in_type == DType::kBF16 && args.n % 2 == 0;
  if (!plan->timed && repeatable && tells && plan->candidates.size() > 1) {
    ChooseByTime(args, *plan);
  }
  const cublasStatus_t status = Queue(args, *plan, plan->chosen);
  // Neither leaves anything behind on the device: the caller may take another way.
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) return false;
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
