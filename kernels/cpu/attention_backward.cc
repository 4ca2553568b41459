#include "kernels/cpu/attention_backward.h"

#include <algorithm>
#include <cmath>

namespace slalom {

namespace {

constexpr float kEpsilon = 1e-5f;

}  // namespace

SparseBranchGradient::SparseBranchGradient(const simd::Kernels& kernels, const Problem& problem)
    : kernels_(kernels),
      p_(problem),
      width_(RoundUp(problem.head_size, 16)),
      block_q_(problem.map->block_q),
      block_k_(problem.map->block_k),
      padded_k_(RoundUp(problem.map->block_k, 16)) {
  const auto tile = static_cast<std::size_t>(block_q_ * padded_k_);
  probabilities_.resize(tile);
  slopes_.resize(tile);
  maxima_.resize(static_cast<std::size_t>(2 * block_q_));
}

void SparseBranchGradient::Transpose(const HeadMatrix& from, HeadMatrix& to) const {
  const std::int64_t blocks = (p_.length + block_k_ - 1) / block_k_;
  to.assign(static_cast<std::size_t>(blocks * p_.head_size * padded_k_), 0.0f);
  for (std::int64_t j = 0; j < blocks; ++j) {
    const std::int64_t rows = std::min(block_k_, p_.length - j * block_k_);
    kernels_.transpose(from.data() + j * block_k_ * width_, rows, p_.head_size, width_,
                       to.data() + j * p_.head_size * padded_k_, padded_k_);
  }
}

void SparseBranchGradient::AddPair(std::int64_t i, std::int64_t j) {
  const std::int64_t first = i * block_q_, first_key = j * block_k_;
  const std::int64_t rows = std::min(block_q_, p_.length - first);
  const std::int64_t keys = std::min(block_k_, p_.length - first_key);
  const std::int64_t d = p_.head_size;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  const float* q = p_.head->q.data() + first * width_;
  const float* d_out = p_.head->d_out.data() + first * width_;
  const auto product = [&](const float* a, const HeadMatrix& b, float* c) {
    kernels_.gemm({.m = rows,
                   .n = padded_k_,
                   .k = d,
                   .a = a,
                   .a_row = width_,
                   .b = b.data() + j * d * padded_k_,
                   .ldb = padded_k_,
                   .c = c,
                   .ldc = padded_k_});
  };
  product(q, keys_, probabilities_.data());
  product(d_out, values_, slopes_.data());
  // The log of the whole row's sum is at least every score, so that it stays the "maximum".
  std::copy_n(p_.lse + first, rows, maxima_.data());
  kernels_.softmax({.rows = rows,
                    .columns = keys,
                    .padded = padded_k_,
                    .scores = probabilities_.data(),
                    .stride = padded_k_,
                    .scale = scale,
                    .maximum = maxima_.data(),
                    .sum = maxima_.data() + block_q_});
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* p = probabilities_.data() + r * padded_k_;
    float* slope = slopes_.data() + r * padded_k_;
    const float delta = p_.delta[first + r];
    for (std::int64_t c = 0; c < padded_k_; ++c) slope[c] = scale * p[c] * (slope[c] - delta);
  }
  const auto add_to_keys = [&](const HeadMatrix& weights, const float* b, HeadMatrix& to) {
    kernels_.gemm({.m = keys,
                   .n = width_,
                   .k = rows,
                   .a = weights.data(),
                   .a_row = 1,
                   .a_column = padded_k_,
                   .b = b,
                   .ldb = width_,
                   .c = to.data() + first_key * width_,
                   .ldc = width_,
                   .accumulate = true});
  };
  add_to_keys(probabilities_, d_out, p_.head->d_v);
  add_to_keys(slopes_, q, p_.head->d_k);
  kernels_.gemm({.m = rows,
                 .n = width_,
                 .k = keys,
                 .a = slopes_.data(),
                 .a_row = padded_k_,
                 .b = p_.head->k.data() + first_key * width_,
                 .ldb = width_,
                 .c = p_.head->d_q.data() + first * width_,
                 .ldc = width_,
                 .accumulate = true});
}

void SparseBranchGradient::Run() {
  Transpose(p_.head->k, keys_);
  Transpose(p_.head->v, values_);
  const BlockMap& map = *p_.map;
  const std::int64_t query_blocks = map.classes.dim(2);
  for (std::int64_t i = 0; i < query_blocks; ++i) {
    const std::int64_t row = p_.head_index * query_blocks + i;
    const std::int32_t* list = map.critical.data<std::int32_t>() + row * map.critical.dim(3);
    for (std::int32_t c = 0; c < map.counts.data<std::int32_t>()[row]; ++c) AddPair(i, list[c]);
  }
}

LinearBranchGradient::LinearBranchGradient(const simd::Kernels& kernels, const Problem& problem)
    : kernels_(kernels),
      p_(problem),
      width_(RoundUp(problem.head_size, 16)),
      state_floats_((problem.head_size + 1) * width_) {
  const std::int64_t d = p_.head_size;
  const auto all = static_cast<std::size_t>(KeyBlocks() * state_floats_);
  block_states_.assign(all, 0.0f);
  d_block_states_.assign(all, 0.0f);
  state_.resize(static_cast<std::size_t>(state_floats_));
  d_state_.resize(state_.size());
  transposed_.assign(state_.size(), 0.0f);
  divisors_.assign(static_cast<std::size_t>(p_.length), 0.0f);
  scaled_.resize(static_cast<std::size_t>(p_.block_q * width_));
  for (std::int64_t j = 0; j < KeyBlocks(); ++j) {
    const std::int64_t first = j * p_.block_k;
    const std::int64_t rows = std::min(p_.block_k, p_.length - first);
    float* state = block_states_.data() + j * state_floats_;
    kernels_.gemm({.m = d,
                   .n = width_,
                   .k = rows,
                   .a = p_.k_feature->data() + first * width_,
                   .a_row = 1,
                   .a_column = width_,
                   .b = p_.v->data() + first * width_,
                   .ldb = width_,
                   .c = state,
                   .ldc = width_});
    for (std::int64_t r = 0; r < rows; ++r) {
      kernels_.f32.add(p_.k_divisor->data() + (first + r) * width_, d, state + d * width_);
    }
  }
}

bool LinearBranchGradient::SumScope(std::int64_t i) {
  std::fill(state_.begin(), state_.end(), 0.0f);
  bool any = false;
  for (std::int64_t j = 0; j < KeyBlocks(); ++j) {
    if (!p_.in_scope(i, j)) continue;
    any = true;
    kernels_.f32.add(block_states_.data() + j * state_floats_, state_floats_, state_.data());
  }
  return any;
}

void LinearBranchGradient::Forward(HeadMatrix& out) {
  const std::int64_t d = p_.head_size;
  out.assign(static_cast<std::size_t>(p_.length * width_), 0.0f);
  for (std::int64_t i = 0; i < QueryBlocks(); ++i) {
    if (!SumScope(i)) continue;
    const std::int64_t first = i * p_.block_q;
    const std::int64_t rows = std::min(p_.block_q, p_.length - first);
    float* to = out.data() + first * width_;
    kernels_.gemm({.m = rows,
                   .n = width_,
                   .k = d,
                   .a = p_.q_feature->data() + first * width_,
                   .a_row = width_,
                   .b = state_.data(),
                   .ldb = width_,
                   .c = to,
                   .ldc = width_});
    for (std::int64_t r = 0; r < rows; ++r) {
      const float divisor = kEpsilon + kernels_.dot(p_.q_divisor->data() + (first + r) * width_,
                                                    state_.data() + d * width_, d);
      divisors_[static_cast<std::size_t>(first + r)] = divisor;
      kernels_.f32.widen(to + r * width_, 1.0f / divisor, width_, to + r * width_);
    }
  }
}

void LinearBranchGradient::QueryBackward(std::int64_t i, const HeadMatrix& out,
                                         const HeadMatrix& d_out, HeadMatrix& d_q_feature,
                                         HeadMatrix& d_q_divisor, std::vector<float>& delta) {
  const std::int64_t d = p_.head_size, first = i * p_.block_q;
  const std::int64_t rows = std::min(p_.block_q, p_.length - first);
  const float* slopes = d_out.data() + first * width_;
  float* d_divisors = d_state_.data() + d * width_;
  std::fill(d_state_.begin(), d_state_.end(), 0.0f);
  kernels_.transpose(state_.data(), d, d, width_, transposed_.data(), width_);
  kernels_.gemm({.m = rows,
                 .n = width_,
                 .k = d,
                 .a = slopes,
                 .a_row = width_,
                 .b = transposed_.data(),
                 .ldb = width_,
                 .c = d_q_feature.data() + first * width_,
                 .ldc = width_});
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t at = (first + r) * width_;
    const float inverse = 1.0f / divisors_[static_cast<std::size_t>(first + r)];
    const float sum = kernels_.dot(slopes + r * width_, out.data() + at, d);
    delta[static_cast<std::size_t>(first + r)] = sum;
    kernels_.f32.widen(d_q_feature.data() + at, inverse, width_, d_q_feature.data() + at);
    kernels_.f32.widen(state_.data() + d * width_, -sum * inverse, width_, d_q_divisor.data() + at);
    float* scaled = scaled_.data() + r * width_;
    kernels_.f32.widen(p_.q_divisor->data() + at, -sum * inverse, width_, scaled);
    kernels_.f32.add(scaled, width_, d_divisors);
    kernels_.f32.widen(p_.q_feature->data() + at, inverse, width_, scaled);
  }
  kernels_.gemm({.m = d,
                 .n = width_,
                 .k = rows,
                 .a = scaled_.data(),
                 .a_row = 1,
                 .a_column = width_,
                 .b = slopes,
                 .ldb = width_,
                 .c = d_state_.data(),
                 .ldc = width_});
  for (std::int64_t j = 0; j < KeyBlocks(); ++j) {
    if (!p_.in_scope(i, j)) continue;
    kernels_.f32.add(d_state_.data(), state_floats_, d_block_states_.data() + j * state_floats_);
  }
}

void LinearBranchGradient::Backward(const HeadMatrix& out, const HeadMatrix& d_out,
                                    HeadMatrix& d_q_feature, HeadMatrix& d_q_divisor,
                                    HeadMatrix& d_k_feature, HeadMatrix& d_k_divisor,
                                    HeadMatrix& d_v, std::vector<float>& delta) {
  delta.assign(static_cast<std::size_t>(p_.length), 0.0f);
  for (std::int64_t i = 0; i < QueryBlocks(); ++i) {
    if (SumScope(i)) QueryBackward(i, out, d_out, d_q_feature, d_q_divisor, delta);
  }
  const std::int64_t d = p_.head_size;
  for (std::int64_t j = 0; j < KeyBlocks(); ++j) {
    const std::int64_t first = j * p_.block_k;
    const std::int64_t rows = std::min(p_.block_k, p_.length - first);
    const float* state = d_block_states_.data() + j * state_floats_;
    kernels_.transpose(state, d, d, width_, transposed_.data(), width_);
    simd::GemmTile product{.m = rows,
                           .n = width_,
                           .k = d,
                           .a = p_.v->data() + first * width_,
                           .a_row = width_,
                           .b = transposed_.data(),
                           .ldb = width_,
                           .c = d_k_feature.data() + first * width_,
                           .ldc = width_};
    kernels_.gemm(product);
    product.a = p_.k_feature->data() + first * width_;
    product.b = state;
    product.c = d_v.data() + first * width_;
    product.accumulate = true;
    kernels_.gemm(product);
    for (std::int64_t r = 0; r < rows; ++r) {
      std::copy_n(state + d * width_, width_, d_k_divisor.data() + (first + r) * width_);
    }
  }
}

void AddFeatureGradient(FeatureMap map, const float* x, const float* feature,
                        const float* d_feature, std::int64_t n, float* d_x) {
  float mean = 0.0f;
  if (map == FeatureMap::kSoftmax) {
    for (std::int64_t c = 0; c < n; ++c) mean += feature[c] * d_feature[c];
  }
  for (std::int64_t c = 0; c < n; ++c) {
    switch (map) {
      case FeatureMap::kSoftmax:
        d_x[c] += feature[c] * (d_feature[c] - mean);
        break;
      case FeatureMap::kElu:  // exp(x) is the feature itself
        d_x[c] += x[c] > 0.0f ? d_feature[c] : feature[c] * d_feature[c];
        break;
      case FeatureMap::kRelu:
        d_x[c] += x[c] > 0.0f ? d_feature[c] : 0.0f;
        break;
    }
  }
}

}  // namespace slalom
