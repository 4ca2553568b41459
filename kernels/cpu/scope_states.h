// The linear states of one head's query blocks: sums, over the key blocks in scope, of what each
// of those gives.
//
// Most blocks are in scope of most query blocks, and what is not is much the same for neighbours in
// space and time: a sum starts from whichever is nearest, nothing, all blocks or one of the sums
// before. It runs in double, so that a block with huge values leaves nothing behind when it is
// taken away. The states are cut into pieces of a size at which a piece of every block's lies in
// cache; each piece goes over all query blocks, in order.
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
  std::int64_t scratch_floats() const { return 2 * (kWindow + 1) * piece_; }

  // Words of 64 bits that a query block's scope takes.
  std::int64_t words() const { return (key_blocks_ + 63) / 64; }
  // Bit j of the scope: key block j is in it. classes [key blocks] are those of one query block.
  void Mark(LinearScope scope, const std::uint8_t* classes, std::uint64_t* bits) const;

  // What one query block's state is made of.
  struct Plan {
    enum : std::int32_t { kNothing = -1, kAll = -2 };
    std::int32_t start;     // one of these, or the query block whose state it starts from
    std::int32_t in_scope;  // blocks
    std::int32_t added;     // blocks of the list, then `removed` more
    std::int32_t removed;
  };
  // Query block i's. bits [query blocks, words]; `list` has room for all key blocks.
  Plan MakePlan(const std::uint64_t* bits, std::int64_t i, std::int32_t* list) const;

  // One piece of the states [query blocks, state_floats] out of sums [key blocks, state_floats].
  // plans [query blocks], lists [query blocks, key blocks].
  void Sum(std::int64_t piece, const float* sums, const Plan* plans, const std::int32_t* lists,
           float* scratch, float* states) const;

 private:
  // So many sums are at hand to start from.
  static constexpr std::int64_t kWindow = 32;

  static std::int64_t PieceFloats(std::int64_t key_blocks, std::int64_t state_floats);

  const simd::Kernels& kernels_;
  const std::int64_t key_blocks_;
  const std::int64_t query_blocks_;
  const std::int64_t state_floats_;
  const std::int64_t piece_;
  const std::vector<std::int32_t> every_;  // key block
};

}  // namespace slalom
