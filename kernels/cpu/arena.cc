#include "kernels/cpu/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>

#include "kernels/core/error.h"

namespace slalom {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kCacheFloor = std::size_t{256} << 20;

// Sizes are rounded so that similar requests share blocks: an eighth of the size is lost at most.
std::size_t RoundUp(std::size_t bytes) {
  std::size_t step = kAlignment;
  while (step * 8 < bytes) step *= 2;
  return std::max((bytes + step - 1) / step * step, kAlignment);
}

// The machine's memory, or what the container may use of it (control groups v2).
std::size_t UsableMemory() {
  const auto physical = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) *
                        static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  std::size_t limit = physical;
  std::ifstream file("/sys/fs/cgroup/memory.max");  // a number, or "max", which is not read
  if (std::size_t bytes = 0; file >> bytes) limit = bytes;
  return std::min(physical, limit);
}

std::byte* SystemAllocate(std::size_t size, std::size_t most) {
  if (size > most) return nullptr;
  const bool huge = size >= 2 * kHugePage;
  const std::size_t alignment = huge ? kHugePage : kAlignment;
  const std::size_t padded = (size + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, padded);
  if (memory != nullptr && huge) madvise(memory, padded, MADV_HUGEPAGE);  // advice: may fail
  return static_cast<std::byte*>(memory);
}

}  // namespace

Arena::Arena() : total_(UsableMemory()) {}

std::shared_ptr<Arena> Arena::Create() { return std::shared_ptr<Arena>(new Arena()); }

Arena::~Arena() { ReleaseCache(); }

std::shared_ptr<std::byte> Arena::Allocate(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  std::size_t size = RoundUp(bytes);
  std::byte* block = nullptr;
  const auto found = free_.lower_bound(size);
  if (found != free_.end() && found->first <= size + size / 4) {
    size = found->first;
    block = found->second;
    cached_ -= size;
    free_.erase(found);
  } else {
    // Nothing fits. Shapes have changed, perhaps for good: don't sit on much that may never be
    // used.
    if (cached_ > std::max(kCacheFloor, in_use_ / 2)) ReleaseCache();
    block = SystemAllocate(size, total_);
    if (block == nullptr) {
      ReleaseCache();
      block = SystemAllocate(size, total_);
    }
    if (block == nullptr) {
      throw Error(ErrorCode::kResourceExhausted, "out of host memory: " + std::to_string(bytes) +
                                                     " bytes wanted, " + std::to_string(in_use_) +
                                                     " in use");
    }
  }
  // Counted as asked for, up to the alignment: what a shape needs, whichever block happens to
  // serve.
  const std::size_t counted =
      std::max((bytes + kAlignment - 1) / kAlignment * kAlignment, kAlignment);
  in_use_ += counted;
  slack_ += size - counted;
  peak_ = std::max(peak_, in_use_);
  return {block, [self = shared_from_this(), size, counted](std::byte* p) {
            self->Return(p, size, counted);
          }};
}

void Arena::Return(std::byte* block, std::size_t size, std::size_t counted) {
  const std::lock_guard lock(mutex_);
  in_use_ -= counted;
  slack_ -= size - counted;
  cached_ += size;
  free_.emplace(size, block);
}

void Arena::ReleaseCache() {
  for (const auto& [size, block] : free_) std::free(block);
  free_.clear();
  cached_ = 0;
}

MemoryStats Arena::Stats() const {
  const std::lock_guard lock(mutex_);
  return {.bytes_in_use = in_use_,
          .bytes_reserved = in_use_ + slack_ + cached_,
          .bytes_peak = peak_,
          .bytes_total = total_};
}

void Arena::ResetPeak() {
  const std::lock_guard lock(mutex_);
  peak_ = in_use_;
}

}  // namespace slalom
