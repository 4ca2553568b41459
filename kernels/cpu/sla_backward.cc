// The gradients of SLA: one head per task, both branches, then the heads' shares of the
// projection's gradient in order.
#include <algorithm>
#include <vector>

#include "kernels/cpu/attention_backward.h"
#include "kernels/cpu/block_map.h"
#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_backend.h"

namespace slalom {
namespace {

struct SlaShape {
  std::int64_t batch, length, heads, head_size;
};

SlaShape CheckSla(const SlaBackwardArgs& args) {
  const Check check("SlaAttentionBackward");
  check.Rank(args.q, 4, "q");
  check.Compute(args.q, "q");
  const SlaShape s{args.q.dim(0), args.q.dim(1), args.q.dim(2), args.q.dim(3)};
  const auto like_q = [&](const Tensor& x, const char* name) {
    check.Is(x, args.q.shape(), args.q.dtype(), name);
  };
  like_q(args.k, "k");
  like_q(args.v, "v");
  like_q(args.out, "out");
  like_q(args.d_out, "d_out");
  like_q(args.d_q, "d_q");
  like_q(args.d_k, "d_k");
  like_q(args.d_v, "d_v");
  check.Is(args.lse, Shape{s.batch, s.heads, s.length}, DType::kF32, "lse");
  CheckMap(check, args.map, s.batch, s.heads, s.length);
  if (args.proj_weight.defined()) {
    const Shape square{s.head_size, s.head_size}, row{s.head_size};
    check.Is(args.proj_weight, square, DType::kF32, "proj_weight");
    check.Is(args.proj_bias, row, DType::kF32, "proj_bias");
    check.Is(args.d_proj_weight, square, DType::kF32, "d_proj_weight");
    check.Is(args.d_proj_bias, row, DType::kF32, "d_proj_bias");
  }
  return s;
}

// One head at work.
template <typename T>
class SlaHead {
 public:
  SlaHead(const simd::Kernels& kernels, const SlaBackwardArgs& args, const SlaShape& s,
          std::int64_t head_index)
      : kernels_(kernels),
        args_(args),
        s_(s),
        head_index_(head_index),
        width_(RoundUp(s.head_size, 16)),
        floats_(static_cast<std::size_t>(s.length * width_)),
        own_(HeadTensors::Of(args, [this](const Tensor& x) { return Load(x); })),
        delta_(static_cast<std::size_t>(s.length)) {}

  // d_weight [D, width] and d_bias [width]: this head's share; unused without a projection.
  void Run(float* d_weight, float* d_bias) {
    const HeadMatrix out = Load(args_.out);
    for (std::int64_t r = 0; r < s_.length; ++r) {
      delta_[static_cast<std::size_t>(r)] =
          kernels_.dot(out.data() + r * width_, own_.d_out.data() + r * width_, s_.head_size);
    }
    if (args_.proj_weight.defined()) Linear(d_weight, d_bias);
    AddSparseBranch(kernels_, args_, head_index_, delta_, own_);
    own_.StoreGradients(args_, [&](const HeadMatrix& rows, const Tensor& x) {
      StoreHead(kernels_, rows, Own<T>(x), s_.length, s_.head_size);
    });
  }

 private:
  HeadMatrix Load(const Tensor& x) const {
    return LoadHead(kernels_, Own<const T>(x), s_.length, s_.head_size);
  }
  template <typename U>
  HeadRows<U> Own(const Tensor& x) const {
    return RowsOfHead<U>(x, head_index_ / s_.heads, head_index_ % s_.heads);
  }
  HeadMatrix Features(const HeadMatrix& x) const {
    HeadMatrix rows(floats_, 0.0f);
    for (std::int64_t r = 0; r < s_.length; ++r) {
      kernels_.feature_map(args_.feature_map, x.data() + r * width_, s_.head_size,
                           rows.data() + r * width_);
    }
    return rows;
  }

  bool InScope(std::int64_t i, std::int64_t j) const {
    const std::int64_t nq = args_.map->classes.dim(2), nk = args_.map->classes.dim(3);
    const auto* classes = args_.map->classes.template data<std::uint8_t>();
    return slalom::InScope(args_.scope,
                           static_cast<BlockClass>(classes[(head_index_ * nq + i) * nk + j]));
  }

  void Linear(float* d_weight, float* d_bias) {
    const std::int64_t d = s_.head_size;
    const HeadMatrix q_features = Features(own_.q), k_features = Features(own_.k);
    // With every key in scope one state serves all: then blocks are the whole sequence.
    const bool whole = args_.scope == LinearScope::kAll;
    const LinearBranchGradient::Problem problem{
        .length = s_.length,
        .head_size = d,
        .block_q = whole ? s_.length : args_.map->block_q,
        .block_k = whole ? s_.length : args_.map->block_k,
        .in_scope = [this](std::int64_t i, std::int64_t j) { return InScope(i, j); },
        .q_feature = &q_features,
        .q_divisor = &q_features,
        .k_feature = &k_features,
        .k_divisor = &k_features,
        .v = &own_.v};
    LinearBranchGradient branch(kernels_, problem);
    HeadMatrix linear;
    branch.Forward(linear);

    HeadMatrix weight(static_cast<std::size_t>(d * width_), 0.0f), d_linear(floats_);
    for (std::int64_t e = 0; e < d; ++e) {
      std::copy_n(args_.proj_weight.template data<float>() + e * d, d, weight.data() + e * width_);
    }
    kernels_.gemm({.m = s_.length,
                   .n = width_,
                   .k = d,
                   .a = own_.d_out.data(),
                   .a_row = width_,
                   .b = weight.data(),
                   .ldb = width_,
                   .c = d_linear.data(),
                   .ldc = width_});
    kernels_.gemm({.m = d,
                   .n = width_,
                   .k = s_.length,
                   .a = own_.d_out.data(),
                   .a_row = 1,
                   .a_column = width_,
                   .b = linear.data(),
                   .ldb = width_,
                   .c = d_weight,
                   .ldc = width_});
    HeadMatrix d_q_feature(floats_, 0.0f), d_q_divisor(floats_, 0.0f);
    HeadMatrix d_k_feature(floats_, 0.0f), d_k_divisor(floats_, 0.0f);
    std::vector<float> delta;
    branch.Backward(linear, d_linear, d_q_feature, d_q_divisor, d_k_feature, d_k_divisor, own_.d_v,
                    delta);
    std::fill_n(d_bias, width_, 0.0f);
    for (std::int64_t r = 0; r < s_.length; ++r) {
      const std::int64_t at = r * width_;
      kernels_.f32.add(own_.d_out.data() + at, d, d_bias);
      // The output less the linear branch is what the sparse branch gave.
      delta_[static_cast<std::size_t>(r)] -=
          delta[static_cast<std::size_t>(r)] +
          kernels_.dot(own_.d_out.data() + at, args_.proj_bias.template data<float>(), d);
      kernels_.f32.add(d_q_divisor.data() + at, d, d_q_feature.data() + at);
      kernels_.f32.add(d_k_divisor.data() + at, d, d_k_feature.data() + at);
      AddFeatureGradient(args_.feature_map, own_.q.data() + at, q_features.data() + at,
                         d_q_feature.data() + at, d, own_.d_q.data() + at);
      AddFeatureGradient(args_.feature_map, own_.k.data() + at, k_features.data() + at,
                         d_k_feature.data() + at, d, own_.d_k.data() + at);
    }
  }

  const simd::Kernels& kernels_;
  const SlaBackwardArgs& args_;
  const SlaShape& s_;
  const std::int64_t head_index_, width_;
  const std::size_t floats_;
  HeadTensors own_;
  std::vector<float> delta_;
};

}  // namespace

void CpuBackend::SlaAttentionBackward(const SlaBackwardArgs& args) {
  const SlaShape s = CheckSla(args);
  const bool linear = args.proj_weight.defined();
  const std::int64_t heads = s.batch * s.heads, d = s.head_size, width = RoundUp(d, 16);
  const std::int64_t share = (d + 1) * width;  // of the projection's gradient
  std::vector<float> shares(static_cast<std::size_t>(linear ? heads * share : 0));
  VisitCompute(args.q.dtype(), [&](auto tag) {
    using T = decltype(tag);
    parallel_.Tasks(s.length > 0 ? heads : 0, [&](std::int64_t head, int /*thread*/) {
      float* own = shares.data() + (linear ? head * share : 0);
      SlaHead<T>(kernels_, args, s, head).Run(own, own + d * width);
    });
  });
  if (!linear) return;
  Zero(args.d_proj_weight);
  Zero(args.d_proj_bias);
  for (std::int64_t head = 0; head < (s.length > 0 ? heads : 0); ++head) {
    const float* own = shares.data() + head * share;
    for (std::int64_t e = 0; e < d; ++e) {
      kernels_.f32.add(own + e * width, d, args.d_proj_weight.data<float>() + e * d);
    }
    kernels_.f32.add(own + d * width, d, args.d_proj_bias.data<float>());
  }
}

}  // namespace slalom
