// Which attention kernel does what, and the one that is made of matrix products.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/attention/problem.h"
#include "kernels/cuda/attention/row_softmax.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/ops.h"

namespace slalom::cuda {
namespace {

constexpr std::int64_t kScoreBytes = std::int64_t{256}
                                     << 20;  // what ProductAttention takes at once

bool Aligned(const AttentionProblem& problem) {
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
  };
  return aligned(problem.q) && aligned(problem.k) && aligned(problem.v) && aligned(problem.out);
}

const std::byte* At(const void* base, std::int64_t elements, DType type) {
  return static_cast<const std::byte*>(base) + elements * static_cast<std::int64_t>(ByteSize(type));
}

std::byte* At(void* base, std::int64_t elements, DType type) {
  return static_cast<std::byte*>(base) + elements * static_cast<std::int64_t>(ByteSize(type));
}

}  // namespace

AttentionProblem AttentionProblem::Of(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const Tensor& out) {
  AttentionProblem problem;
  problem.dtype = q.dtype();
  problem.q = q.raw();
  problem.k = k.raw();
  problem.v = v.raw();
  problem.out = out.raw();
  problem.batch = q.dim(0);
  problem.heads = q.dim(2);
  problem.q_length = q.dim(1);
  problem.k_length = k.dim(1);
  problem.head_size = static_cast<int>(q.dim(3));
  problem.scale = 1.0f / std::sqrt(static_cast<float>(problem.head_size));
  return problem;
}

AttentionKernel ChooseAttentionKernel(const AttentionProblem& problem, bool aligned,
                                      int compute_major) {
  const bool dense = problem.list.indices == nullptr;
  const auto blocks_fit = [&](int unit) { return dense || problem.list.MadeOf(unit); };
  const bool biased = problem.relative_bias != nullptr;
  const bool tensor_cores = problem.dtype == DType::kBF16 && aligned &&
                            blocks_fit(biased ? kHopperBlock : kTensorCoreBlock) &&
                            problem.scale > 0 &&
                            (problem.head_size == 64 || problem.head_size == 128);
  if (tensor_cores) {
    const bool hopper = compute_major == kHopperMajor && !biased && blocks_fit(kHopperBlock);
    return hopper ? AttentionKernel::kHopper : AttentionKernel::kTensorCore;
  }
  // The library wants rows that are multiples of 16 bytes.
  return dense && problem.head_size % 8 == 0 ? AttentionKernel::kProduct : AttentionKernel::kRow;
}

AttentionKernel ChooseAttentionKernel(const Context& context, const AttentionProblem& problem) {
  return ChooseAttentionKernel(problem, Aligned(problem), context.compute_major);
}

void RunAttention(const Context& context, const AttentionProblem& problem) {
  RunAttention(context, problem, ChooseAttentionKernel(context, problem));
}

void RunAttention(const Context& context, const AttentionProblem& problem, AttentionKernel kernel) {
  if (problem.batch == 0 || problem.heads == 0 || problem.q_length == 0) return;
  switch (kernel) {
    case AttentionKernel::kHopper:
      return HopperAttention(context, problem);
    case AttentionKernel::kTensorCore:
      return TensorCoreAttention(context, problem);
    case AttentionKernel::kProduct:
      return ProductAttention(context, problem);
    case AttentionKernel::kRow:
      return RowAttention(context, problem);
  }
}

void ProductAttention(const Context& context, const AttentionProblem& problem) {
  const std::int64_t stride = problem.heads * problem.head_size;
  const std::int64_t padded = (problem.k_length + 7) / 8 * 8;  // rows of scores stay aligned
  const std::int64_t chunk =
      std::clamp<std::int64_t>(kScoreBytes / (problem.heads * padded * 4), 1, problem.q_length);
  const Tensor scores = context.Allocate({problem.heads, chunk, padded}, DType::kF32);
  const Tensor probabilities =
      problem.dtype == DType::kF32
          ? scores
          : context.Allocate({problem.heads, chunk, padded}, problem.dtype);
  for (std::int64_t sample = 0; sample < problem.batch; ++sample) {
    const std::int64_t kv = sample * problem.k_length * stride;
    for (std::int64_t first = 0; first < problem.q_length; first += chunk) {
      const std::int64_t rows = std::min(chunk, problem.q_length - first);
      const std::int64_t q = (sample * problem.q_length + first) * stride;
      GemmArgs product;
      product.m = rows;
      product.n = problem.k_length;
      product.k = problem.head_size;
      product.in_type = problem.dtype;
      product.out_type = DType::kF32;
      product.a = At(problem.q, q, problem.dtype);
      product.lda = stride;
      product.a_stride = problem.head_size;
      product.b = At(problem.k, kv, problem.dtype);
      product.ldb = stride;
      product.b_stride = problem.head_size;
      product.out = scores.raw();
      product.ldo = padded;
      product.out_stride = chunk * padded;
      product.batch = problem.heads;
      product.alpha = problem.scale;
      context.gemm->Run(product);

      RowSoftmaxArgs softmax;
      softmax.scores = scores.data<float>();
      softmax.probabilities = probabilities.raw();
      softmax.type = problem.dtype;
      softmax.relative_bias = problem.relative_bias;
      softmax.lse = problem.lse == nullptr
                        ? nullptr
                        : problem.lse + sample * problem.heads * problem.q_length;
      softmax.heads = problem.heads;
      softmax.rows = rows;
      softmax.first_row = first;
      softmax.head_stride = chunk * padded;
      softmax.row_stride = padded;
      softmax.q_length = problem.q_length;
      softmax.k_length = problem.k_length;
      RowSoftmax(context, softmax);

      product = GemmArgs{};
      product.m = rows;
      product.n = problem.head_size;
      product.k = problem.k_length;
      product.in_type = problem.dtype;
      product.out_type = problem.dtype;
      product.a = probabilities.raw();
      product.lda = padded;
      product.a_stride = chunk * padded;
      product.b = At(problem.v, kv, problem.dtype);
      product.ldb = stride;
      product.b_stride = problem.head_size;
      product.b_is_kn = true;
      product.out = At(problem.out, q, problem.dtype);
      product.ldo = stride;
      product.out_stride = problem.head_size;
      product.batch = problem.heads;
      context.gemm->Run(product);
    }
  }
}

void Attention(const Context& context, const AttentionArgs& args) {
  Require(args.q.defined() && args.q.shape().rank() == 4 && IsComputeType(args.q.dtype()),
          "Attention: q is not [B, Lq, H, D] of f32 or bf16");
  Require(args.k.defined() && args.k.shape().rank() == 4 && args.k.dim(1) > 0,
          "Attention: k is not [B, Lk, H, D] with Lk > 0");
  const DType type = args.q.dtype();
  const Shape keys{args.q.dim(0), args.k.dim(1), args.q.dim(2), args.q.dim(3)};
  RequireTensor(args.k, keys, type, "Attention: k");
  RequireTensor(args.v, keys, type, "Attention: v");
  RequireTensor(args.out, args.q.shape(), type, "Attention: out");
  AttentionProblem problem = AttentionProblem::Of(args.q, args.k, args.v, args.out);
  problem.scale = args.scale;
  if (args.lse.defined()) {
    RequireTensor(args.lse, {problem.batch, problem.heads, problem.q_length}, DType::kF32,
                  "Attention: lse");
    problem.lse = args.lse.data<float>();
  }
  if (args.relative_bias.defined()) {
    RequireTensor(args.relative_bias, {problem.heads, problem.q_length + problem.k_length - 1},
                  DType::kF32, "Attention: relative_bias");
    problem.relative_bias = args.relative_bias.data<float>();
  }
  RunAttention(context, problem);
}

}  // namespace slalom::cuda
