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

// What the gradients of one head read, and what they are added to.
struct HeadTensors {
  HeadMatrix q, k, v, d_out;
  HeadMatrix d_q, d_k, d_v;

  // `load(x)` is the head's part of a tensor. Args is the struct of either attention.
  template <class Args, class Load>
  static HeadTensors Of(const Args& args, const Load& load) {
    HeadTensors head{load(args.q), load(args.k), load(args.v), load(args.d_out), {}, {}, {}};
    head.d_q = head.d_k = head.d_v = HeadMatrix(head.q.size(), 0.0f);
    return head;
  }
  // `store(rows, x)` writes the head's part of a tensor.
  template <class Args, class Store>
  void StoreGradients(const Args& args, const Store& store) const {
    store(d_q, args.d_q);
    store(d_k, args.d_k);
    store(d_v, args.d_v);
  }
};

// The sparse branch of one head.
class SparseBranchGradient {
 public:
  struct Problem {
    std::int64_t length = 0, head_size = 0;
    const BlockMap* map = nullptr;
    std::int64_t head_index = 0;   // of all samples' heads
    const float* lse = nullptr;    // [length]
    const float* delta = nullptr;  // [length]: the sum over channels of d_out times the output
    HeadTensors* head = nullptr;
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

// Adds the sparse branch's gradients to those of one head, of all samples' heads. `delta` [length]
// is as in the problem; Args is the struct of either attention.
template <class Args>
void AddSparseBranch(const simd::Kernels& kernels, const Args& args, std::int64_t head_index,
                     const std::vector<float>& delta, HeadTensors& head) {
  const std::int64_t length = args.q.dim(1);
  const SparseBranchGradient::Problem problem{
      .length = length,
      .head_size = args.q.dim(3),
      .map = args.map,
      .head_index = head_index,
      .lse = args.lse.template data<float>() + head_index * length,
      .delta = delta.data(),
      .head = &head};
  SparseBranchGradient(kernels, problem).Run();
}

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
