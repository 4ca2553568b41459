// The linear states of one head's query blocks: sums, over the key blocks in scope, of what each
// of those gives.
//
// Most blocks are in scope of most query blocks, and neighbours have much of it in common: a sum
// starts from whichever is nearest, nothing, all blocks or the sum before. It runs in double, so
// that a block with huge values leaves nothing behind when it is taken away. The states are cut
// into pieces of a size at which a piece of every block's lies in cache; each piece goes over all
// query blocks, in order.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/simd/kernels.h"

namespace slalom {

class ScopeStates {
 public:
  // A state has state_floats floats, a multiple of 16.
  ScopeStates(const simd::Kernels& kernels, std::int64_t key_blocks, std::int64_t query_blocks,
              std::int64_t state_floats);

  std::int64_t pieces() const { return (state_floats_ + piece_ - 1) / piece_; }
  // Working memory of one Sum.
  std::int64_t scratch_floats() const { return 4 * piece_; }

  // What one query block's state is made of.
  struct Plan {
    enum Start : std::int32_t { kNothing, kAll, kBefore } start;
    std::int32_t in_scope;  // blocks
    std::int32_t added;     // blocks of the list, then `removed` more
    std::int32_t removed;
  };
  // `list` has room for all key blocks. classes [key blocks] are this query block's, `before` those
  // of the one before it, null for the first.
  Plan MakePlan(LinearScope scope, const std::uint8_t* classes, const std::uint8_t* before,
                std::int32_t* list) const;

  // One piece of the states [query blocks, state_floats] out of sums [key blocks, state_floats].
  // plans [query blocks], lists [query blocks, key blocks].
  void Sum(std::int64_t piece, const float* sums, const Plan* plans, const std::int32_t* lists,
           float* scratch, float* states) const;

 private:
  const simd::Kernels& kernels_;
  const std::int64_t key_blocks_;
  const std::int64_t query_blocks_;
  const std::int64_t state_floats_;
  const std::int64_t piece_;
  const std::vector<std::int32_t> every_;  // key block
};

}  // namespace slalom
