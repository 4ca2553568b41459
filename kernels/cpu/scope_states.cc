#include "kernels/cpu/scope_states.h"

#include <algorithm>
#include <bit>
#include <numeric>

#include "kernels/cpu/block_map.h"

namespace slalom {
namespace {

std::vector<std::int32_t> Counted(std::int64_t n) {
  std::vector<std::int32_t> numbers(static_cast<std::size_t>(n));
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

// The bits that are set, as numbers, at `to`; what follows them.
std::int32_t* Numbers(std::uint64_t bits, std::int64_t first, std::int32_t* to) {
  for (; bits != 0; bits &= bits - 1) {
    *to++ = static_cast<std::int32_t>(first + std::countr_zero(bits));
  }
  return to;
}

}  // namespace

ScopeStates::ScopeStates(const simd::Kernels& kernels, std::int64_t key_blocks,
                         std::int64_t query_blocks, std::int64_t state_floats)
    : kernels_(kernels),
      key_blocks_(key_blocks),
      query_blocks_(query_blocks),
      state_floats_(state_floats),
      piece_(PieceFloats(key_blocks, state_floats)),
      every_(Counted(key_blocks)) {}

// Half a MiB for a piece of all key blocks' and the sums at hand: half a second-level cache or
// less.
std::int64_t ScopeStates::PieceFloats(std::int64_t key_blocks, std::int64_t state_floats) {
  constexpr std::int64_t kBytes = std::int64_t{1} << 19;
  constexpr std::int64_t kLeast = 64, kMost = 1024;
  const std::int64_t bytes_per_float = 4 * key_blocks + 8 * (kWindow + 1);
  const std::int64_t fit = kBytes / bytes_per_float / kLeast * kLeast;
  return std::min(std::clamp(fit, kLeast, kMost), state_floats);
}

void ScopeStates::Mark(LinearScope scope, const std::uint8_t* classes, std::uint64_t* bits) const {
  std::fill_n(bits, words(), 0);
  for (std::int64_t j = 0; j < key_blocks_; ++j) {
    const bool inside = InScope(scope, static_cast<BlockClass>(classes[j]));
    bits[j / 64] |= std::uint64_t{inside} << (j % 64);
  }
}

ScopeStates::Plan ScopeStates::MakePlan(const std::uint64_t* bits, std::int64_t i,
                                        std::int32_t* list) const {
  const std::uint64_t* own = bits + i * words();
  std::int64_t in_scope = 0;
  for (std::int64_t w = 0; w < words(); ++w) in_scope += std::popcount(own[w]);
  const std::int64_t outside = key_blocks_ - in_scope;
  Plan plan{.start = in_scope <= outside ? Plan::kNothing : Plan::kAll,
            .in_scope = static_cast<std::int32_t>(in_scope)};
  std::int64_t nearest = std::min(in_scope, outside);
  for (std::int64_t before = i - 1; before >= std::max<std::int64_t>(i - kWindow, 0); --before) {
    std::int64_t changed = 0;
    for (std::int64_t w = 0; w < words(); ++w) {
      changed += std::popcount(own[w] ^ bits[before * words() + w]);
    }
    if (changed >= nearest) continue;
    nearest = changed;
    plan.start = static_cast<std::int32_t>(before);
  }
  const auto started_with = [&](std::int64_t w) {
    if (plan.start >= 0) return bits[plan.start * words() + w];
    if (plan.start == Plan::kNothing) return std::uint64_t{0};
    const std::int64_t rest = key_blocks_ - w * 64;
    return ~std::uint64_t{0} >> (rest < 64 ? 64 - rest : 0);
  };
  std::int32_t* end = list;
  for (std::int64_t w = 0; w < words(); ++w) end = Numbers(own[w] & ~started_with(w), w * 64, end);
  plan.added = static_cast<std::int32_t>(end - list);
  for (std::int64_t w = 0; w < words(); ++w) end = Numbers(started_with(w) & ~own[w], w * 64, end);
  plan.removed = static_cast<std::int32_t>(end - list) - plan.added;
  return plan;
}

void ScopeStates::Sum(std::int64_t piece, const float* sums, const Plan* plans,
                      const std::int32_t* lists, float* scratch, float* states) const {
  const std::int64_t begin = piece * piece_;
  auto* all = reinterpret_cast<double*>(scratch);
  const auto at_hand = [&](std::int64_t i) { return all + (1 + i % kWindow) * piece_; };
  simd::StateSum step{.states = sums + begin,
                      .stride = state_floats_,
                      .count = std::min(piece_, state_floats_ - begin),
                      .added = every_.data(),
                      .added_count = key_blocks_,
                      .sum = all};
  kernels_.sum_states(step);
  for (std::int64_t i = 0; i < query_blocks_; ++i) {
    const Plan& plan = plans[i];
    step.added = lists + i * key_blocks_;
    step.added_count = plan.added;
    step.removed = step.added + plan.added;
    step.removed_count = plan.removed;
    step.from = plan.start >= 0 ? at_hand(plan.start) : plan.start == Plan::kAll ? all : nullptr;
    step.sum = at_hand(i);
    step.rounded = states + i * state_floats_ + begin;
    kernels_.sum_states(step);
  }
}

}  // namespace slalom
