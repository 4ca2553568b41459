#include "model/prompt_cache.h"

#include <utility>

namespace slalom {

Tensor PromptCache::Find(const std::string& cleaned_prompt) {
  const std::lock_guard lock(mutex_);
  const auto found = index_.find(cleaned_prompt);
  if (found == index_.end()) {
    ++stats_.misses;
    return {};
  }
  ++stats_.hits;
  entries_.splice(entries_.begin(), entries_, found->second);
  return entries_.front().embeddings;
}

void PromptCache::Insert(const std::string& cleaned_prompt, const Tensor& embeddings) {
  Entry entry{cleaned_prompt, embeddings};
  const std::size_t bytes = entry.bytes();
  const std::lock_guard lock(mutex_);
  if (bytes > max_bytes_ || index_.contains(cleaned_prompt)) return;
  while (stats_.bytes + bytes > max_bytes_) {
    stats_.bytes -= entries_.back().bytes();
    index_.erase(entries_.back().prompt);
    entries_.pop_back();
  }
  entries_.push_front(std::move(entry));
  index_[cleaned_prompt] = entries_.begin();
  stats_.bytes += bytes;
  stats_.entries = entries_.size();
}

CacheStats PromptCache::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

}  // namespace slalom
