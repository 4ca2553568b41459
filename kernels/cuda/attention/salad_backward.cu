// The gradients of SALAD: the linear branch and its projection are computed again; then backwards
// through the gate, the projection and both branches.
#include <algorithm>

#include "kernels/cuda/attention/backward.h"
#include "kernels/cuda/attention/sparse_parts.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kProductTile = 128;  // of the library's kernels, about

// slopes = gate * d_out, and d_gates[row] = d_out . projected. One block of threads per row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    GateGradientKernel(const T* d_out, const T* projected, const float* gates, int width, T* slopes,
                       float* d_gates) {
  __shared__ float shared[32];
  const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * width;
  const float gate = gates[blockIdx.x];
  float sum = 0.0f;
  for (int c = threadIdx.x; c < width; c += kThreads) {
    const float slope = ToFloat(d_out[start + c]);
    sum += slope * ToFloat(projected[start + c]);
    slopes[start + c] = FromFloat<T>(gate * slope);
  }
  sum = BlockSum(sum, shared);
  if (threadIdx.x == 0) d_gates[blockIdx.x] = sum;
}

// d_gates becomes the gradient of the logits, and d_x that times the gate's weight. `gates` are
// those of the tokens, not averaged. One block of threads per row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    LogitGradientKernel(const float* gates, const float* weight, int width, float* d_gates,
                        T* d_x) {
  const float gate = gates[blockIdx.x];
  const float d_logit = d_gates[blockIdx.x] * gate * (1.0f - gate);
  __syncthreads();  // all have read what the first writes
  if (threadIdx.x == 0) d_gates[blockIdx.x] = d_logit;
  for (int c = threadIdx.x; c < width; c += kThreads) {
    d_x[static_cast<std::int64_t>(blockIdx.x) * width + c] = FromFloat<T>(d_logit * weight[c]);
  }
}

// to [columns, stride] = from [rows, columns] transposed. Grid (rows / 32, columns / 32).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    TransposeKernel(const T* from, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                    T* to) {
  __shared__ T tile[32][33];
  const int x = threadIdx.x % 32;
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * 32;
  const std::int64_t first_column = static_cast<std::int64_t>(blockIdx.y) * 32;
  for (int y = threadIdx.x / 32; y < 32; y += kThreads / 32) {
    if (first_row + y < rows && first_column + x < columns) {
      tile[y][x] = from[(first_row + y) * columns + first_column + x];
    }
  }
  __syncthreads();
  for (int y = threadIdx.x / 32; y < 32; y += kThreads / 32) {
    if (first_column + y < columns && first_row + x < rows) {
      to[(first_column + y) * stride + first_row + x] = tile[x][y];
    }
  }
}

void CheckSalad(const SaladBackwardArgs& args) {
  CheckSparseInputs(args.q, args.k, args.v, args.map);
  const DType type = args.q.dtype();
  const Shape by_head = args.q.shape();
  const std::int64_t batch = by_head[0], length = by_head[1], d = by_head[2] * by_head[3];
  const Shape rows{batch, length, d};
  RequireTensor(args.out, rows, type, "SaladAttentionBackward: out");
  RequireTensor(args.lse, {batch, by_head[2], length}, DType::kF32, "SaladAttentionBackward: lse");
  RequireTensor(args.d_out, rows, type, "SaladAttentionBackward: d_out");
  RequireTensor(args.d_q, by_head, type, "SaladAttentionBackward: d_q");
  RequireTensor(args.d_k, by_head, type, "SaladAttentionBackward: d_k");
  RequireTensor(args.d_v, by_head, type, "SaladAttentionBackward: d_v");
  Require(args.map_kind != BlockMapKind::kWindow || args.grid.size() == length,
          "SaladAttentionBackward: grid does not hold q's tokens");
  if (!args.proj_weight.defined()) return;
  const Shape angles{length, by_head[3] / 2};
  RequireTensor(args.q_normed, by_head, type, "SaladAttentionBackward: q_normed");
  RequireTensor(args.k_normed, by_head, type, "SaladAttentionBackward: k_normed");
  RequireTensor(args.cos, angles, DType::kF32, "SaladAttentionBackward: cos");
  RequireTensor(args.sin, angles, DType::kF32, "SaladAttentionBackward: sin");
  RequireTensor(args.x, rows, type, "SaladAttentionBackward: x");
  RequireTensor(args.proj_weight, {d, d}, type, "SaladAttentionBackward: proj_weight");
  RequireTensor(args.proj_bias, {d}, DType::kF32, "SaladAttentionBackward: proj_bias");
  RequireTensor(args.gate_weight, {1, d}, DType::kF32, "SaladAttentionBackward: gate_weight");
  RequireTensor(args.gate_bias, {1}, DType::kF32, "SaladAttentionBackward: gate_bias");
  RequireTensor(args.d_q_normed, by_head, type, "SaladAttentionBackward: d_q_normed");
  RequireTensor(args.d_k_normed, by_head, type, "SaladAttentionBackward: d_k_normed");
  RequireTensor(args.d_x, rows, type, "SaladAttentionBackward: d_x");
  RequireTensor(args.d_proj_weight, {d, d}, DType::kF32, "SaladAttentionBackward: d_proj_weight");
  RequireTensor(args.d_proj_bias, {d}, DType::kF32, "SaladAttentionBackward: d_proj_bias");
  RequireTensor(args.d_gate_weight, {1, d}, DType::kF32, "SaladAttentionBackward: d_gate_weight");
  RequireTensor(args.d_gate_bias, {1}, DType::kF32, "SaladAttentionBackward: d_gate_bias");
}

// One call.
template <typename T>
class Run {
 public:
  Run(const Context& context, const SaladBackwardArgs& args)
      : context_(context),
        args_(args),
        rows_(args.q.dim(0) * args.q.dim(1)),
        width_(args.q.dim(2) * args.q.dim(3)),
        by_head_(args.q.shape()),
        type_(args.q.dtype()) {}

  void All() {
    const bool linear = args_.proj_weight.defined();
    if (linear) Linear();
    Sparse(linear);
  }

 private:
  void Linear() {
    const SaladBranch branch = ProjectedSaladBranch(context_, args_);
    projected_ = branch.projected;

    const Tensor slopes = Gate();
    SumColumns(context_, slopes, Tensor(), args_.d_proj_bias);
    WeightGradient(slopes, branch.own);
    const Tensor d_branch = context_.Allocate(by_head_, type_);
    GemmArgs product;
    product.m = rows_;
    product.n = product.k = product.lda = product.ldb = product.ldo = width_;
    product.in_type = product.out_type = type_;
    product.a = slopes.raw();
    product.b = args_.proj_weight.raw();
    product.b_is_kn = true;
    product.out = d_branch.raw();
    context_.gemm->Run(product);

    LinearGradientArgs gradient{SaladLinear(args_)};
    gradient.d_out = d_branch;
    gradient.d_q = args_.d_q_normed;
    gradient.d_k = args_.d_k_normed;
    gradient.d_v = args_.d_v;
    gradient.delta = context_.Allocate(args_.lse.shape(), DType::kF32);
    LinearGradient(context_, gradient);
  }

  // Backwards through the gate: all that it gives, and the gradient behind the projection.
  Tensor Gate() {
    const Shape per_token{args_.q.dim(0), args_.q.dim(1)};
    const auto blocks = static_cast<unsigned>(rows_);
    const int width = static_cast<int>(width_);
    const Tensor own = context_.Allocate(per_token, DType::kF32);
    SaladGates(context_, args_.x, args_.gate_weight, args_.gate_bias, SaladGate::kToken, own);
    gates_ = own;
    if (args_.gate == SaladGate::kSample) {
      gates_ = context_.Allocate(per_token, DType::kF32);
      SaladGates(context_, args_.x, args_.gate_weight, args_.gate_bias, args_.gate, gates_);
    }
    const Tensor slopes = context_.Allocate(args_.out.shape(), type_);
    const Tensor d_gates = context_.Allocate(per_token, DType::kF32);
    GateGradientKernel<T><<<blocks, kThreads, 0, context_.stream>>>(
        args_.d_out.template data<T>(), projected_.template data<T>(),
        gates_.template data<float>(), width, slopes.template data<T>(),
        d_gates.template data<float>());
    CheckLaunch("SaladAttentionBackward: gate");
    if (args_.gate == SaladGate::kSample) AverageSamples(context_, d_gates);
    LogitGradientKernel<T><<<blocks, kThreads, 0, context_.stream>>>(
        own.template data<float>(), args_.gate_weight.template data<float>(), width,
        d_gates.template data<float>(), args_.d_x.template data<T>());
    CheckLaunch("SaladAttentionBackward: logits");
    SumColumns(context_, args_.x, d_gates, args_.d_gate_weight);
    SumColumns(context_, d_gates, Tensor(), args_.d_gate_bias);
    return slopes;
  }

  // slopes^T branch, over all tokens.
  void WeightGradient(const Tensor& slopes, const Tensor& branch) const {
    const std::int64_t stride = (rows_ + 7) / 8 * 8;
    const Tensor transposed = context_.Allocate({width_, stride}, type_);
    const dim3 grid(static_cast<unsigned>((rows_ + 31) / 32),
                    static_cast<unsigned>((width_ + 31) / 32));
    TransposeKernel<T><<<grid, kThreads, 0, context_.stream>>>(
        slopes.template data<T>(), rows_, width_, stride, transposed.template data<T>());
    CheckLaunch("SaladAttentionBackward: transpose");
    // A small projection would leave most of the device idle: the sum is cut into equal parts.
    const std::int64_t tiles = (width_ + kProductTile - 1) / kProductTile;
    std::int64_t parts = std::max<std::int64_t>(context_.sm_count / (tiles * tiles), 1);
    while (parts > 1 && rows_ % (8 * parts) != 0) --parts;
    const Tensor products =
        parts == 1 ? args_.d_proj_weight : context_.Allocate({parts, width_, width_}, DType::kF32);
    GemmArgs product;
    product.m = product.n = product.ldb = product.ldo = width_;
    product.k = rows_ / parts;
    product.in_type = type_;
    product.out_type = DType::kF32;
    product.a = transposed.raw();
    product.lda = stride;
    product.b = branch.raw();
    product.b_is_kn = true;
    product.out = products.raw();
    product.batch = parts;
    if (parts > 1) {
      product.a_stride = product.k;
      product.b_stride = product.k * width_;
      product.out_stride = width_ * width_;
    }
    context_.gemm->Run(product);
    if (parts > 1) SumColumns(context_, products, Tensor(), args_.d_proj_weight);
  }

  void Sparse(bool linear) {
    const bool window = args_.map_kind == BlockMapKind::kWindow;
    const Tensor delta = context_.Allocate(args_.lse.shape(), DType::kF32);
    DeltaArgs rows;
    rows.out = args_.out.Reshape(by_head_);
    rows.d_out = args_.d_out.Reshape(by_head_);
    if (linear) {
      rows.projected = projected_.Reshape(by_head_);
      rows.gates = gates_;
    }
    if (window) rows.grid = args_.grid;
    rows.delta = delta;
    SparseDelta(context_, rows);
    projected_ = Tensor();

    const auto own = [&](const Tensor& x) {
      if (!window) return x;
      return ReorderTokens(context_, x, args_.grid, false, context_.Allocate(by_head_, type_));
    };
    // Where heads have their own order, gradients are gathered in that order and put back.
    const auto target = [&](const Tensor& x, bool keep) {
      if (!window) return x;
      const Tensor scratch = context_.Allocate(by_head_, type_);
      return keep ? ReorderTokens(context_, x, args_.grid, false, scratch) : scratch;
    };
    const Tensor q = own(args_.q), k = own(args_.k), v = own(args_.v), d_out = own(rows.d_out);
    if (linear) {  // d_v holds the linear branch's; nothing is to be added to the others
      Zero(args_.d_q);
      Zero(args_.d_k);
    }
    const Tensor d_q = target(args_.d_q, linear), d_k = target(args_.d_k, linear);
    const Tensor d_v = target(args_.d_v, linear);
    const QueryLists queries = MakeQueryLists(context_, *args_.map);
    SparseGradientProblem problem = MakeSparseGradient(q, k, v, d_out, *args_.map, queries);
    problem.lse = args_.lse.template data<float>();
    problem.delta = delta.template data<float>();
    problem.d_q = d_q.raw();
    problem.d_k = d_k.raw();
    problem.d_v = d_v.raw();
    problem.accumulate = linear;
    SparseGradient(context_, problem);
    if (!window) return;
    ReorderTokens(context_, d_q, args_.grid, true, args_.d_q);
    ReorderTokens(context_, d_k, args_.grid, true, args_.d_k);
    ReorderTokens(context_, d_v, args_.grid, true, args_.d_v);
  }

  void Zero(const Tensor& x) const {
    Check(cudaMemsetAsync(x.raw(), 0, x.NumBytes(), context_.stream), "SaladAttentionBackward");
  }

  const Context& context_;
  const SaladBackwardArgs& args_;
  const std::int64_t rows_, width_;
  const Shape by_head_;
  const DType type_;
  Tensor projected_, gates_;
};

}  // namespace

void SaladAttentionBackward(const Context& context, const SaladBackwardArgs& args) {
  CheckSalad(args);
  if (args.q.NumElements() == 0) {
    if (!args.proj_weight.defined()) return;
    for (const Tensor& x :
         {args.d_proj_weight, args.d_proj_bias, args.d_gate_weight, args.d_gate_bias}) {
      Check(cudaMemsetAsync(x.raw(), 0, x.NumBytes(), context.stream), "SaladAttentionBackward");
    }
    return;
  }
  args.q.dtype() == DType::kBF16 ? Run<bf16>(context, args).All() : Run<float>(context, args).All();
}

}  // namespace slalom::cuda
