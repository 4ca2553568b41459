// The gradients of SALAD. The linear branch and its projection are computed again; then the
// gradients go backwards through the gate, the projection and, one head per task, both branches.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/attention_backward.h"
#include "kernels/cpu/block_map.h"
#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_backend.h"

namespace slalom {
namespace {

struct SaladShape {
  std::int64_t batch, length, heads, head_size;
  std::int64_t width() const { return heads * head_size; }
  std::int64_t rows() const { return batch * length; }
};

SaladShape CheckSalad(const SaladBackwardArgs& args) {
  const Check check("SaladAttentionBackward");
  check.Rank(args.q, 4, "q");
  check.Compute(args.q, "q");
  const DType type = args.q.dtype();
  const SaladShape s{args.q.dim(0), args.q.dim(1), args.q.dim(2), args.q.dim(3)};
  const auto like_q = [&](const Tensor& x, const char* name) {
    check.Holds(x, args.q.NumElements(), type, name);
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
  if (args.map_kind == BlockMapKind::kWindow) {
    check.That(args.grid.size() == s.length, "grid", "does not hold q's tokens");
  }
  if (!args.proj_weight.defined()) return s;
  const std::int64_t d = s.width();
  check.That(s.head_size % 2 == 0, "q", "has an odd head size");
  like_q(args.q_normed, "q_normed");
  like_q(args.k_normed, "k_normed");
  like_q(args.x, "x");
  like_q(args.d_q_normed, "d_q_normed");
  like_q(args.d_k_normed, "d_k_normed");
  like_q(args.d_x, "d_x");
  check.Is(args.cos, Shape{s.length, s.head_size / 2}, DType::kF32, "cos");
  check.Is(args.sin, Shape{s.length, s.head_size / 2}, DType::kF32, "sin");
  check.Is(args.proj_weight, Shape{d, d}, type, "proj_weight");
  check.Is(args.proj_bias, Shape{d}, DType::kF32, "proj_bias");
  check.Is(args.gate_weight, Shape{1, d}, DType::kF32, "gate_weight");
  check.Is(args.gate_bias, Shape{1}, DType::kF32, "gate_bias");
  check.Is(args.d_proj_weight, Shape{d, d}, DType::kF32, "d_proj_weight");
  check.Is(args.d_proj_bias, Shape{d}, DType::kF32, "d_proj_bias");
  check.Is(args.d_gate_weight, Shape{1, d}, DType::kF32, "d_gate_weight");
  check.Is(args.d_gate_bias, Shape{1}, DType::kF32, "d_gate_bias");
  return s;
}

// c [m, n] = a [m, k] b [k, n] over all cores; a has any strides, n is a multiple of 16.
void Product(const simd::Kernels& kernels, const Parallel& parallel, simd::GemmTile tile) {
  constexpr std::int64_t kRows = 32;
  parallel.Ranges(tile.m, kRows, [&](std::int64_t begin, std::int64_t end) {
    simd::GemmTile part = tile;
    part.m = end - begin;
    part.a += begin * tile.a_row;
    part.c += begin * tile.ldc;
    kernels.gemm(part);
  });
}

// The linear branch of one head, with the features that its gradients need again.
template <typename T>
class LinearHead {
 public:
  LinearHead(const simd::Kernels& kernels, const SaladBackwardArgs& args, const SaladShape& s,
             std::int64_t head_index)
      : kernels_(kernels),
        args_(args),
        s_(s),
        head_index_(head_index),
        width_(RoundUp(s.head_size, 16)),
        v_(Load(args.v)) {
    Features(args.q_normed, q_divisors_, q_features_);
    Features(args.k_normed, k_divisors_, k_features_);
    problem_ = {.length = s.length,
                .head_size = s.head_size,
                .block_q = s.length,
                .block_k = s.length,
                .in_scope = [](std::int64_t, std::int64_t) { return true; },
                .q_feature = &q_features_,
                .q_divisor = &q_divisors_,
                .k_feature = &k_features_,
                .k_divisor = &k_divisors_,
                .v = &v_};
  }

  // To this head's columns of `linear` [B * L, ld].
  void Forward(float* linear, std::int64_t ld) {
    LinearBranchGradient branch(kernels_, problem_);
    HeadMatrix out;
    branch.Forward(out);
    for (std::int64_t r = 0; r < s_.length; ++r) {
      std::copy_n(out.data() + r * width_, s_.head_size, linear + Offset(r, ld));
    }
  }

  // From the gradient of the branch's output, [B * L, ld]. d_v is added to.
  void Backward(const float* d_linear, std::int64_t ld, HeadMatrix& d_v) {
    LinearBranchGradient branch(kernels_, problem_);
    const auto zero = [&] { return HeadMatrix(v_.size(), 0.0f); };
    HeadMatrix out, d_out = zero();
    branch.Forward(out);
    for (std::int64_t r = 0; r < s_.length; ++r) {
      std::copy_n(d_linear + Offset(r, ld), s_.head_size, d_out.data() + r * width_);
    }
    HeadMatrix d_q_feature = zero(), d_q_divisor = zero();
    HeadMatrix d_k_feature = zero(), d_k_divisor = zero();
    std::vector<float> delta;
    branch.Backward(out, d_out, d_q_feature, d_q_divisor, d_k_feature, d_k_divisor, d_v, delta);
    Store(q_divisors_, d_q_feature, d_q_divisor, args_.d_q_normed);
    Store(k_divisors_, d_k_feature, d_k_divisor, args_.d_k_normed);
  }

 private:
  std::int64_t Offset(std::int64_t row, std::int64_t ld) const {
    return (head_index_ / s_.heads * s_.length + row) * ld + head_index_ % s_.heads * s_.head_size;
  }
  HeadMatrix Load(const Tensor& x) const {
    return LoadHead(kernels_,
                    RowsOfHead<const T>(x, head_index_ / s_.heads, head_index_ % s_.heads),
                    s_.length, s_.head_size);
  }
  // relu(x), as it is and rotated.
  void Features(const Tensor& x, HeadMatrix& divisors, HeadMatrix& rotated) const {
    divisors = Load(x);
    rotated.assign(divisors.size(), 0.0f);
    for (std::int64_t r = 0; r < s_.length; ++r) {
      const std::int64_t angle = r * (s_.head_size / 2);
      float* row = divisors.data() + r * width_;
      kernels_.f32.qk_norm_rope(row, nullptr, 0.0f, args_.cos.template data<float>() + angle,
                                args_.sin.template data<float>() + angle, true, 1, s_.head_size,
                                rotated.data() + r * width_);
      kernels_.feature_map(FeatureMap::kRelu, row, s_.head_size, row);
    }
  }
  // Turns the rotated features' gradients back, adds the divisors' and passes them through relu.
  void Store(const HeadMatrix& divisors, const HeadMatrix& d_feature, const HeadMatrix& d_divisor,
             const Tensor& to) const {
    const auto rows = RowsOfHead<T>(to, head_index_ / s_.heads, head_index_ % s_.heads);
    std::vector<float> d_x(static_cast<std::size_t>(s_.head_size));
    for (std::int64_t r = 0; r < s_.length; ++r) {
      const float* cos = args_.cos.template data<float>() + r * (s_.head_size / 2);
      const float* sin = args_.sin.template data<float>() + r * (s_.head_size / 2);
      for (std::int64_t c = 0; c < s_.head_size; c += 2) {
        const std::int64_t at = r * width_ + c;
        const float even = d_feature[at], odd = d_feature[at + 1];
        const float turned[2] = {even * cos[c / 2] + odd * sin[c / 2],
                                 odd * cos[c / 2] - even * sin[c / 2]};
        for (int i = 0; i < 2; ++i) {
          const float d = turned[i] + d_divisor[at + i];
          d_x[static_cast<std::size_t>(c + i)] = divisors[at + i] > 0.0f ? d : 0.0f;
        }
      }
      simd::Rows<T>(kernels_).narrow(d_x.data(), s_.head_size, rows.row(r));
    }
  }

  const simd::Kernels& kernels_;
  const SaladBackwardArgs& args_;
  const SaladShape& s_;
  const std::int64_t head_index_, width_;
  HeadMatrix v_, q_divisors_, q_features_, k_divisors_, k_features_;
  LinearBranchGradient::Problem problem_;
};

// One call: what the gate and the projection need lies here as f32 rows of RoundUp(d, 16) floats.
template <typename T>
class SaladGradient {
 public:
  SaladGradient(const simd::Kernels& kernels, const Parallel& parallel,
                const SaladBackwardArgs& args, const SaladShape& s)
      : kernels_(kernels),
        parallel_(parallel),
        args_(args),
        s_(s),
        ld_(RoundUp(s.width(), 16)),
        d_out_(Rows(args.d_out)) {
    if (args.map_kind == BlockMapKind::kWindow) order_ = WindowOrder(args.grid);
  }

  void Run() {
    HeadMatrix mixed(d_out_.size(), 0.0f);  // gate * projected, what the sparse branch did not give
    HeadMatrix d_linear;
    const bool linear = args_.proj_weight.defined();
    if (linear) Projection(mixed, d_linear);
    parallel_.Tasks(s_.batch * s_.heads, [&](std::int64_t head, int /*thread*/) {
      HeadMatrix d_v(static_cast<std::size_t>(s_.length * RoundUp(s_.head_size, 16)), 0.0f);
      if (linear) LinearHead<T>(kernels_, args_, s_, head).Backward(d_linear.data(), ld_, d_v);
      Sparse(head, mixed, d_v);
    });
  }

 private:
  HeadMatrix Rows(const Tensor& x) const {
    HeadMatrix rows(static_cast<std::size_t>(s_.rows() * ld_), 0.0f);
    parallel_.Rows(s_.rows(), ld_, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        simd::Rows<T>(kernels_).widen(x.data<T>() + r * s_.width(), 1.0f, s_.width(),
                                      rows.data() + r * ld_);
      }
    });
    return rows;
  }

  // The gate's values before they are averaged, and as they are used.
  void Gates(std::vector<float>& own, std::vector<float>& used) const {
    own.resize(static_cast<std::size_t>(s_.rows()));
    const float bias = args_.gate_bias.template data<float>()[0];
    for (std::int64_t r = 0; r < s_.rows(); ++r) {
      const float logit =
          simd::Rows<T>(kernels_).dot(args_.x.template data<T>() + r * s_.width(),
                                      args_.gate_weight.template data<float>(), s_.width());
      own[static_cast<std::size_t>(r)] = 1.0f / (1.0f + std::exp(-(logit + bias)));
    }
    used = own;
    if (args_.gate == SaladGate::kSample) Average(used);
  }
  void Average(std::vector<float>& values) const {
    for (std::int64_t b = 0; b < s_.batch; ++b) {
      const auto begin = values.begin() + b * s_.length;
      double mean = 0;
      for (auto x = begin; x != begin + s_.length; ++x) mean += *x;
      std::fill_n(begin, s_.length, static_cast<float>(mean / static_cast<double>(s_.length)));
    }
  }

  // Forwards to the projected linear branch, and back to d_linear; all of the layer's own
  // gradients.
  void Projection(HeadMatrix& mixed, HeadMatrix& d_linear) const {
    const std::int64_t d = s_.width();
    HeadMatrix linear(d_out_.size(), 0.0f);
    parallel_.Tasks(s_.batch * s_.heads, [&](std::int64_t head, int /*thread*/) {
      LinearHead<T>(kernels_, args_, s_, head).Forward(linear.data(), ld_);
    });
    HeadMatrix weight(static_cast<std::size_t>(d * ld_), 0.0f), transposed = weight;
    for (std::int64_t e = 0; e < d; ++e) {
      simd::Rows<T>(kernels_).widen(args_.proj_weight.template data<T>() + e * d, 1.0f, d,
                                    weight.data() + e * ld_);
    }
    kernels_.transpose(weight.data(), d, d, ld_, transposed.data(), ld_);
    simd::GemmTile product{.m = s_.rows(), .n = ld_, .k = d};
    product.a = linear.data();
    product.a_row = product.ldb = product.ldc = ld_;
    product.b = transposed.data();
    product.c = mixed.data();
    Product(kernels_, parallel_, product);

    HeadMatrix slopes = d_out_;
    GateBackward(mixed, slopes);
    d_linear.assign(d_out_.size(), 0.0f);
    product.a = slopes.data();
    product.b = weight.data();
    product.c = d_linear.data();
    Product(kernels_, parallel_, product);
    product = {.m = d, .n = ld_, .k = s_.rows()};
    product.a = slopes.data();
    product.a_row = 1;
    product.a_column = product.ldb = product.ldc = ld_;
    product.b = linear.data();
    product.c = transposed.data();
    Product(kernels_, parallel_, product);
    for (std::int64_t e = 0; e < d; ++e) {
      std::copy_n(transposed.data() + e * ld_, d,
                  args_.d_proj_weight.template data<float>() + e * d);
    }
    float* d_bias = args_.d_proj_bias.template data<float>();
    std::fill_n(d_bias, d, 0.0f);
    for (std::int64_t r = 0; r < s_.rows(); ++r) {
      kernels_.f32.add(slopes.data() + r * ld_, d, d_bias);
    }
  }

  // `mixed` comes as the linear branch before its bias, and becomes what it added to the output;
  // `slopes` comes as d_out and becomes the gradient of the branch behind its projection.
  void GateBackward(HeadMatrix& mixed, HeadMatrix& slopes) const {
    const std::int64_t d = s_.width();
    std::vector<float> own, used, d_gate(static_cast<std::size_t>(s_.rows()));
    Gates(own, used);
    for (std::int64_t r = 0; r < s_.rows(); ++r) {
      const float gate = used[static_cast<std::size_t>(r)];
      float* row = mixed.data() + r * ld_;
      float* slope = slopes.data() + r * ld_;
      kernels_.f32.add(args_.proj_bias.template data<float>(), d, row);
      d_gate[static_cast<std::size_t>(r)] = kernels_.dot(slope, row, d);
      kernels_.f32.widen(row, gate, d, row);
      kernels_.f32.widen(slope, gate, d, slope);
    }
    if (args_.gate == SaladGate::kSample) Average(d_gate);
    const float* weight = args_.gate_weight.template data<float>();
    std::vector<float> d_x(static_cast<std::size_t>(d)), d_weight(static_cast<std::size_t>(d));
    float d_bias = 0.0f;
    for (std::int64_t r = 0; r < s_.rows(); ++r) {
      const float gate = own[static_cast<std::size_t>(r)];
      const float d_logit = d_gate[static_cast<std::size_t>(r)] * gate * (1.0f - gate);
      const T* x = args_.x.template data<T>() + r * d;
      d_bias += d_logit;
      kernels_.f32.widen(weight, d_logit, d, d_x.data());
      simd::Rows<T>(kernels_).narrow(d_x.data(), d, args_.d_x.template data<T>() + r * d);
      for (std::int64_t c = 0; c < d; ++c)
        d_weight[static_cast<std::size_t>(c)] += d_logit * ToFloat(x[c]);
    }
    std::copy(d_weight.begin(), d_weight.end(), args_.d_gate_weight.template data<float>());
    *args_.d_gate_bias.template data<float>() = d_bias;
  }

  void Sparse(std::int64_t head, const HeadMatrix& mixed, const HeadMatrix& linear_d_v) const {
    const std::int64_t b = head / s_.heads, h = head % s_.heads, size = s_.head_size;
    const std::int64_t width = RoundUp(size, 16);
    const std::int32_t* order = !order_.empty() && h >= s_.heads / 2 ? order_.data() : nullptr;
    const auto by_head = [&](const Tensor& x) {
      return RowsOfHead<T>(x.Reshape(args_.q.shape()), b, h, order);
    };
    const auto load = [&](const Tensor& x) {
      return LoadHead(kernels_, by_head(x), s_.length, size);
    };
    const auto store = [&](const HeadMatrix& rows, const Tensor& x) {
      StoreHead(kernels_, rows, by_head(x), s_.length, size);
    };
    HeadTensors own = HeadTensors::Of(args_, load);
    const HeadMatrix out = load(args_.out);
    std::vector<float> delta(static_cast<std::size_t>(s_.length));
    for (std::int64_t p = 0; p < s_.length; ++p) {
      const std::int64_t token = order != nullptr ? order[p] : p;
      const float* added = mixed.data() + (b * s_.length + token) * ld_ + h * size;
      const float* slope = own.d_out.data() + p * width;
      delta[static_cast<std::size_t>(p)] =
          kernels_.dot(slope, out.data() + p * width, size) - kernels_.dot(slope, added, size);
      std::copy_n(linear_d_v.data() + token * width, width, own.d_v.data() + p * width);
    }
    AddSparseBranch(kernels_, args_, head, delta, own);
    own.StoreGradients(args_, store);
  }

  const simd::Kernels& kernels_;
  const Parallel& parallel_;
  const SaladBackwardArgs& args_;
  const SaladShape& s_;
  const std::int64_t ld_;
  const HeadMatrix d_out_;
  std::vector<std::int32_t> order_;
};

}  // namespace

void CpuBackend::SaladAttentionBackward(const SaladBackwardArgs& args) {
  const SaladShape s = CheckSalad(args);
  VisitCompute(args.q.dtype(), [&](auto tag) {
    using T = decltype(tag);
    SaladGradient<T>(kernels_, parallel_, args, s).Run();
  });
}

}  // namespace slalom
