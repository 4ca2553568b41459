#include "kernels/cuda/arena.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <random>
#include <vector>

namespace slalom::cuda {
namespace {

// Host memory with a limit, which also checks that everything comes back once.
class FakeDevice {
 public:
  explicit FakeDevice(std::size_t capacity) : capacity_(capacity) {}
  ~FakeDevice() { EXPECT_TRUE(segments_.empty()) << "segments were not released"; }

  Arena::Source Source() {
    return {[this](std::size_t bytes) -> void* {
              if (used_ + bytes > capacity_) return nullptr;
              void* memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
              segments_[memory] = bytes;
              used_ += bytes;
              return memory;
            },
            [this](void* memory) {
              const auto segment = segments_.find(memory);
              ASSERT_NE(segment, segments_.end());
              used_ -= segment->second;
              segments_.erase(segment);
              std::free(memory);
            }};
  }
  std::size_t used() const { return used_; }

 private:
  std::size_t capacity_;
  std::size_t used_ = 0;
  std::map<void*, std::size_t> segments_;
};

TEST(Arena, ReusesWhatCameBack) {
  FakeDevice device(Arena::kSegment);
  Arena arena(device.Source());
  void* first = arena.Allocate(1000);
  arena.Free(first);
  EXPECT_EQ(arena.Allocate(1000), first);
  EXPECT_EQ(arena.stats().reserved, Arena::kSegment);
  EXPECT_EQ(arena.stats().in_use, 1024u);
}

TEST(Arena, CountsThePeak) {
  FakeDevice device(Arena::kSegment);
  Arena arena(device.Source());
  void* a = arena.Allocate(512);
  void* b = arena.Allocate(2048);
  arena.Free(a);
  EXPECT_EQ(arena.stats().peak, 2560u);
  arena.ResetPeak();
  EXPECT_EQ(arena.stats().peak, 2048u);
  arena.Free(b);
  EXPECT_EQ(arena.stats().in_use, 0u);
}

TEST(Arena, MergesNeighboursInAnyOrder) {
  FakeDevice device(Arena::kSegment);
  Arena arena(device.Source());
  void* a = arena.Allocate(Arena::kSegment / 4);
  void* b = arena.Allocate(Arena::kSegment / 4);
  void* c = arena.Allocate(Arena::kSegment / 2);
  arena.Free(b);
  arena.Free(c);
  arena.Free(a);
  EXPECT_EQ(arena.Allocate(Arena::kSegment), a) << "the free pieces are not one block";
}

TEST(Arena, GivesUnusedSegmentsBackBeforeItFails) {
  FakeDevice device(4 * Arena::kSegment);
  Arena arena(device.Source());
  void* small[3];
  for (void*& p : small) p = arena.Allocate(Arena::kSegment);
  for (void* p : small) arena.Free(p);
  void* large = arena.Allocate(4 * Arena::kSegment);
  EXPECT_NE(large, nullptr) << "three free segments were in the way";
  EXPECT_EQ(arena.Allocate(1), nullptr);
  arena.Free(large);
  arena.Trim();
  EXPECT_EQ(device.used(), 0u);
}

TEST(Arena, BlocksNeverOverlap) {
  FakeDevice device(64 * Arena::kSegment);
  Arena arena(device.Source());
  std::mt19937 random(7);
  std::map<std::byte*, std::size_t> live;
  for (int i = 0; i < 5000; ++i) {
    if (live.size() > 60 || (!live.empty() && random() % 3 == 0)) {
      auto block = live.begin();
      std::advance(block, random() % live.size());
      arena.Free(block->first);
      live.erase(block);
      continue;
    }
    const std::size_t bytes = random() % 4 == 0 ? random() % (8u << 20) : random() % 5000;
    auto* memory = static_cast<std::byte*>(arena.Allocate(bytes));
    ASSERT_NE(memory, nullptr);
    ASSERT_EQ(reinterpret_cast<std::uintptr_t>(memory) % Arena::kGranularity, 0u);
    const auto next = live.upper_bound(memory);
    if (next != live.end()) {
      ASSERT_LE(memory + bytes, next->first);
    }
    if (next != live.begin()) {
      const auto previous = std::prev(next);
      ASSERT_LE(previous->first + previous->second, memory);
    }
    live[memory] = std::max<std::size_t>(bytes, 1);
  }
  for (const auto& [memory, bytes] : live) arena.Free(memory);
  EXPECT_EQ(arena.stats().in_use, 0u);
}

}  // namespace
}  // namespace slalom::cuda
