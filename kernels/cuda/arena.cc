#include "kernels/cuda/arena.h"

#include <algorithm>
#include <iterator>

namespace slalom::cuda {
namespace {

std::size_t RoundUp(std::size_t value, std::size_t unit) {
  return (value + unit - 1) / unit * unit;
}

}  // namespace

Arena::Arena(Source source) : source_(std::move(source)) {}

Arena::~Arena() {
  for (const auto& [address, block] : blocks_) {
    if (block.starts_segment) source_.release(address);
  }
}

void* Arena::Allocate(std::size_t bytes) {
  const std::size_t size = RoundUp(std::max<std::size_t>(bytes, 1), kGranularity);
  const std::lock_guard lock(mutex_);
  auto block = TakeFree(size);
  if (block == blocks_.end()) {
    if (!AddSegment(size)) {
      TrimLocked();
      if (!AddSegment(size)) return nullptr;
    }
    block = TakeFree(size);
  }
  stats_.in_use += block->second.size;
  stats_.peak = std::max(stats_.peak, stats_.in_use);
  return block->first;
}

void Arena::Free(void* pointer) {
  const std::lock_guard lock(mutex_);
  const auto block = blocks_.find(static_cast<std::byte*>(pointer));
  if (block == blocks_.end() || !block->second.used) return;
  stats_.in_use -= block->second.size;
  block->second.used = false;
  MergeWithNeighbours(block);
}

void Arena::Trim() {
  const std::lock_guard lock(mutex_);
  TrimLocked();
}

Arena::Stats Arena::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void Arena::ResetPeak() {
  const std::lock_guard lock(mutex_);
  stats_.peak = stats_.in_use;
}

Arena::Blocks::iterator Arena::TakeFree(std::size_t size) {
  const auto fit = free_.lower_bound({size, nullptr});
  if (fit == free_.end()) return blocks_.end();
  const auto block = blocks_.find(fit->second);
  free_.erase(fit);
  if (const std::size_t rest = block->second.size - size; rest > 0) {
    std::byte* const tail = block->first + size;
    blocks_.emplace(tail, Block{.size = rest});
    free_.emplace(rest, tail);
    block->second.size = size;
  }
  block->second.used = true;
  return block;
}

bool Arena::AddSegment(std::size_t size) {
  // A segment of its own size for something large: cutting weights out of round segments would
  // leave holes that nothing fits.
  for (const std::size_t wanted : {std::max(size, kSegment), size}) {
    auto* memory = static_cast<std::byte*>(source_.allocate(wanted));
    if (memory == nullptr) continue;
    blocks_.emplace(memory, Block{.size = wanted, .starts_segment = true});
    free_.emplace(wanted, memory);
    stats_.reserved += wanted;
    return true;
  }
  return false;
}

void Arena::MergeWithNeighbours(Blocks::iterator block) {
  const auto next = std::next(block);
  if (next != blocks_.end() && !next->second.used && !next->second.starts_segment) {
    free_.erase({next->second.size, next->first});
    block->second.size += next->second.size;
    blocks_.erase(next);
  }
  if (block != blocks_.begin() && !block->second.starts_segment) {
    const auto previous = std::prev(block);
    if (!previous->second.used) {
      free_.erase({previous->second.size, previous->first});
      previous->second.size += block->second.size;
      blocks_.erase(block);
      block = previous;
    }
  }
  free_.emplace(block->second.size, block->first);
}

void Arena::TrimLocked() {
  for (auto block = blocks_.begin(); block != blocks_.end();) {
    const auto next = std::next(block);
    const bool whole =
        block->second.starts_segment && (next == blocks_.end() || next->second.starts_segment);
    if (whole && !block->second.used) {
      free_.erase({block->second.size, block->first});
      stats_.reserved -= block->second.size;
      source_.release(block->first);
      blocks_.erase(block);
    }
    block = next;
  }
}

}  // namespace slalom::cuda
