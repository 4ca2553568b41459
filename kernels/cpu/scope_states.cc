#include "kernels/cpu/scope_states.h"

#include <algorithm>
#include <numeric>

#include "kernels/cpu/block_map.h"

namespace slalom {
namespace {

// Half a MiB for the pieces of all key blocks: half a second-level cache, or less.
std::int64_t PieceFloats(std::int64_t key_blocks, std::int64_t state_floats) {
  constexpr std::int64_t kFloatsOfAll = std::int64_t{1} << 17;
  constexpr std::int64_t kLeast = 64, kMost = 1024;
  const std::int64_t fit = kFloatsOfAll / std::max<std::int64_t>(key_blocks, 1) / kLeast * kLeast;
  return std::min(std::clamp(fit, kLeast, kMost), state_floats);
}

std::vector<std::int32_t> Counted(std::int64_t n) {
  std::vector<std::int32_t> numbers(static_cast<std::size_t>(n));
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
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

ScopeStates::Plan ScopeStates::MakePlan(LinearScope scope, const std::uint8_t* classes,
                                        const std::uint8_t* before, std::int32_t* list) const {
  const auto inside = [&](const std::uint8_t* row, std::int64_t j) {
    return InScope(scope, static_cast<BlockClass>(row[j]));
  };
  std::int64_t in_scope = 0, changed = 0;
  for (std::int64_t j = 0; j < key_blocks_; ++j) {
    in_scope += inside(classes, j);
    if (before != nullptr) changed += inside(classes, j) != inside(before, j);
  }
  const std::int64_t outside = key_blocks_ - in_scope;
  Plan plan{.start = in_scope <= outside ? Plan::kNothing : Plan::kAll,
            .in_scope = static_cast<std::int32_t>(in_scope)};
  if (before != nullptr && changed < std::min(in_scope, outside)) plan.start = Plan::kBefore;
  const auto started_with = [&](std::int64_t j) {
    return plan.start == Plan::kBefore ? inside(before, j) : plan.start == Plan::kAll;
  };
  std::int32_t* end = list;
  for (std::int64_t j = 0; j < key_blocks_; ++j) {
    if (inside(classes, j) && !started_with(j)) *end++ = static_cast<std::int32_t>(j);
  }
  plan.added = static_cast<std::int32_t>(end - list);
  for (std::int64_t j = 0; j < key_blocks_; ++j) {
    if (!inside(classes, j) && started_with(j)) *end++ = static_cast<std::int32_t>(j);
  }
  plan.removed = static_cast<std::int32_t>(end - list) - plan.added;
  return plan;
}

void ScopeStates::Sum(std::int64_t piece, const float* sums, const Plan* plans,
                      const std::int32_t* lists, float* scratch, float* states) const {
  const std::int64_t begin = piece * piece_;
  auto* all = reinterpret_cast<double*>(scratch);
  auto* sum = all + piece_;
  simd::StateSum step{.states = sums + begin,
                      .stride = state_floats_,
                      .count = std::min(piece_, state_floats_ - begin),
                      .added = every_.data(),
                      .added_count = key_blocks_,
                      .sum = all};
  kernels_.sum_states(step);
  step.sum = sum;
  for (std::int64_t i = 0; i < query_blocks_; ++i) {
    const Plan& plan = plans[i];
    step.added = lists + i * key_blocks_;
    step.added_count = plan.added;
    step.removed = step.added + plan.added;
    step.removed_count = plan.removed;
    step.from = plan.start == Plan::kBefore ? sum : plan.start == Plan::kAll ? all : nullptr;
    step.rounded = states + i * state_floats_ + begin;
    kernels_.sum_states(step);
  }
}

}  // namespace slalom
