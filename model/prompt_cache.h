// PromptCache: text embeddings of prompts seen before, so that the text encoder runs once for each.
#pragma once

#include <cstddef>
#include <list>
#include <mutex>
#include <string>
#include <unordered_map>

#include "kernels/core/tensor.h"
#include "model/pipeline.h"

namespace slalom {

// Least recently used goes first when the bytes run out. It holds the encoder's output, on the
// host: a few KB a token, where the keys and values that the transformer derives from it take its
// width times two times its blocks (hundreds of MB of device memory for one long prompt of a large
// model). One cache per pipeline, so that the cleaned prompt alone is the key. Thread-safe.
class PromptCache {
 public:
  // 0 keeps nothing, and counts misses.
  explicit PromptCache(std::size_t max_bytes) : max_bytes_(max_bytes) {}

  // The embeddings [n, text_dim] on the host; undefined when they are not there. Counts either.
  Tensor Find(const std::string& cleaned_prompt);
  // What would not fit by itself is not kept.
  void Insert(const std::string& cleaned_prompt, const Tensor& embeddings);

  CacheStats stats() const;

 private:
  struct Entry {
    std::string prompt;
    Tensor embeddings;
    std::size_t bytes() const { return prompt.size() + embeddings.NumBytes(); }
  };

  const std::size_t max_bytes_;
  mutable std::mutex mutex_;
  std::list<Entry> entries_;  // the latest used first
  std::unordered_map<std::string, std::list<Entry>::iterator> index_;
  CacheStats stats_;
};

}  // namespace slalom
