// Attention of one query row, step by step.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/convert.h"

namespace slalom {

template <typename T>
class AttentionRow {
 public:
  AttentionRow(const T* q, std::int64_t size, float scale) : q_(size), out_(size, 0.0f) {
    for (std::int64_t c = 0; c < size; ++c) q_[c] = ToFloat(q[c]) * scale;
  }
  void Score(const T* k, float bias) {
    float sum = 0;
    const float* q = q_.data();
    const auto size = static_cast<std::int64_t>(q_.size());
#pragma omp simd reduction(+ : sum)
    for (std::int64_t c = 0; c < size; ++c) sum += q[c] * ToFloat(k[c]);
    scores_.push_back(sum + bias);
  }
  void Softmax() {
    max_ = *std::max_element(scores_.begin(), scores_.end());
    for (float& s : scores_) sum_ += s = std::exp(s - max_);
  }
  void Add(std::int64_t index, const T* v) {
    const float p = scores_[index] / sum_;
    for (std::size_t c = 0; c < out_.size(); ++c) out_[c] += p * ToFloat(v[c]);
  }
  float Out(std::int64_t c) const { return out_[c]; }
  float Lse() const { return max_ + std::log(sum_); }
  float Share(std::int64_t index) const { return scores_[index] / sum_; }

 private:
  std::vector<float> q_, out_, scores_;
  float max_ = 0, sum_ = 0;
};

}  // namespace slalom
