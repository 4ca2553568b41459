// Device memory for tensors: blocks are cut from a few large segments and given back to them.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

namespace slalom::cuda {

// A best-fit allocator that merges neighbours. Every block is used on one stream, so a block may be
// handed out again as soon as it came back: work that still reads it was queued before. Allocate is
// for the stream's thread; Free may come from any thread (a clip dropped elsewhere). The segments
// are kept until Trim or the end.
class Arena {
 public:
  // Where segments come from. `allocate` returns null when there is no memory left.
  struct Source {
    std::function<void*(std::size_t)> allocate;
    std::function<void(void*)> release;
  };
  struct Stats {
    std::size_t in_use = 0;    // bytes in blocks that are handed out, rounded up to kGranularity
    std::size_t reserved = 0;  // bytes in segments
    std::size_t peak = 0;      // the largest in_use since ResetPeak
  };

  static constexpr std::size_t kGranularity = 512;
  static constexpr std::size_t kSegment = std::size_t{64} << 20;

  explicit Arena(Source source);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // At least `bytes` bytes, aligned to kGranularity; null when the source has no more, even after
  // unused segments went back to it.
  void* Allocate(std::size_t bytes);
  void Free(void* pointer);
  // Gives segments without a used block back to the source.
  void Trim();
  Stats stats() const;
  void ResetPeak();

 private:
  struct Block {
    std::size_t size = 0;
    bool used = false;
    bool starts_segment = false;
  };
  using Blocks = std::map<std::byte*, Block>;

  Blocks::iterator TakeFree(std::size_t size);
  bool AddSegment(std::size_t size);
  void MergeWithNeighbours(Blocks::iterator block);
  void TrimLocked();

  mutable std::mutex mutex_;
  Source source_;
  Blocks blocks_;                                      // by address; neighbours are adjacent
  std::set<std::pair<std::size_t, std::byte*>> free_;  // by size: best fit is lower_bound
  Stats stats_;
};

}  // namespace slalom::cuda
