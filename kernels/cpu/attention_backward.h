// What the gradients of SLA and SALAD are made of on the CPU: one head at a time, in f32, with rows
// of RoundUp(D, 16) floats.
#pragma once

#include <cstdint>
#include <functional>
#include <type_traits>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/simd/kernels.h"

namespace slalom {

// A head's tokens, in its own order: [length, width], columns from the head size on are zero.
using HeadMatrix = std::vector<float>;

// A head's rows of `size` channels, in the order of their positions.
template <typename T>
HeadMatrix LoadHead(const simd::Kernels& kernels, const HeadRows<T>& from, std::int64_t length,
                    std::int64_t size) {
  const std::int64_t width = RoundUp(size, 16);
  HeadMatrix rows(static_cast<std::size_t>(length * width), 0.0f);
  for (std::int64_t r = 0; r < length; ++r) {
    simd::Rows<std::remove_const_t<T>>(kernels).widen(from.row(r), 1.0f, size,
                                                      rows.data() + r * width);
  }
  return rows;
}
template <typename T>
void StoreHead(const simd::Kernels& kernels, const HeadMatrix& rows, const HeadRows<T>& to,
               std::int64_t length, std::int64_t size) {
  const std::int64_t width = RoundUp(size, 16);
  for (std::int64_t r = 0; r < length; ++r) {
    simd::Rows<T>(kernels).narrow(rows.data() + r * width, size, to.row(r));
  }
}

// The sparse branch of one head.
class SparseBranchGradient {
 public:
  struct Problem {
    std::int64_t length = 0, head_size = 0;
    const BlockMap* map = nullptr;
    std::int64_t head_index = 0;   // of all samples' heads
    const float* lse = nullptr;    // [length]
    const float* delta = nullptr;  // [length]: the sum over channels of d_out times the output
    const HeadMatrix *q = nullptr, *k = nullptr, *v = nullptr, *d_out = nullptr;
    HeadMatrix *d_q = nullptr, *d_k = nullptr, *d_v = nullptr;  // added to
  };

  SparseBranchGradient(const simd::Kernels& kernels, const Problem& problem);
  void Run();

 private:
  void Transpose(const HeadMatrix& from, HeadMatrix& to) const;
  // The pair of query block i and key block j.
  void AddPair(std::int64_t i, std::int64_t j);

  const simd::Kernels& kernels_;
  const Problem& p_;
  const std::int64_t width_, block_q_, block_k_, padded_k_;
  HeadMatrix keys_, values_;                    // transposed by blocks: [blocks, D, padded_k]
  HeadMatrix probabilities_, slopes_, maxima_;  // of one pair; [block_q, padded_k] each
};

// The linear branch of one head: rows = feature(q) H / (divisor(q) z + 1e-5), where H and z sum
// feature(k)^T v and divisor(k) over the key blocks in scope.
class LinearBranchGradient {
 public:
  struct Problem {
    std::int64_t length = 0, head_size = 0;
    std::int64_t block_q = 0, block_k = 0;
    // Whether key block j is in the scope of query block i.
    std::function<bool(std::int64_t i, std::int64_t j)> in_scope;
    const HeadMatrix *q_feature = nullptr, *q_divisor = nullptr;  // may be one
    const HeadMatrix *k_feature = nullptr, *k_divisor = nullptr;
    const HeadMatrix* v = nullptr;
  };

  LinearBranchGradient(const simd::Kernels& kernels, const Problem& problem);

  // The branch's output, [length, width].
  void Forward(HeadMatrix& out);
  // After Forward, with what it gave. d_v is added to; the others are [length, width] of zeros.
  // `delta` [length] becomes the sum over channels of d_out times out.
  void Backward(const HeadMatrix& out, const HeadMatrix& d_out, HeadMatrix& d_q_feature,
                HeadMatrix& d_q_divisor, HeadMatrix& d_k_feature, HeadMatrix& d_k_divisor,
                HeadMatrix& d_v, std::vector<float>& delta);

 private:
  std::int64_t QueryBlocks() const { return (p_.length + p_.block_q - 1) / p_.block_q; }
  std::int64_t KeyBlocks() const { return (p_.length + p_.block_k - 1) / p_.block_k; }
  // state_ = the sums over query block i's scope; false when that is empty.
  bool SumScope(std::int64_t i);
  // What QueryBackward adds to the state's gradient goes to every key block in scope.
  void QueryBackward(std::int64_t i, const HeadMatrix& out, const HeadMatrix& d_out,
                     HeadMatrix& d_q_feature, HeadMatrix& d_q_divisor, std::vector<float>& delta);

  const simd::Kernels& kernels_;
  const Problem& p_;
  const std::int64_t width_, state_floats_;
  HeadMatrix block_states_, d_block_states_;  // [key blocks, D + 1, width]; row D: the divisors
  HeadMatrix state_, d_state_, transposed_;   // [D + 1, width]
  std::vector<float> divisors_;               // [length], without those whose scope is empty
  HeadMatrix scaled_;                         // [block_q, width]
};

// d x of phi(x), given phi(x) and d phi(x), one row of n channels; added to d_x.
void AddFeatureGradient(FeatureMap map, const float* x, const float* feature,
                        const float* d_feature, std::int64_t n, float* d_x);

}  // namespace slalom
