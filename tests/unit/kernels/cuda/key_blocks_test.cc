// The walk along key blocks covers the listed keys, each once.
#include "kernels/cuda/attention/key_blocks.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace slalom::cuda {
namespace {

template <int kUnit>
std::vector<int> KeysOf(const KeyBlocksOf<kUnit>& blocks) {
  std::vector<int> keys;
  for (int i = 0; i < blocks.count; ++i) {
    EXPECT_GT(blocks.Keys(i), 0);
    EXPECT_TRUE(blocks.Keys(i) == kUnit || i == blocks.count - 1)
        << "only the last unit may be ragged";
    for (int j = 0; j < blocks.Keys(i); ++j) keys.push_back(blocks.Start(i) + j);
  }
  EXPECT_EQ(blocks.Keys(blocks.count), 0);
  return keys;
}

TEST(KeyBlocks, DenseIsEveryKey) {
  for (const int length : {1, 63, 64, 65, 1000}) {
    const std::vector<int> keys = KeysOf(KeyBlocks::Dense(length));
    ASSERT_EQ(static_cast<int>(keys.size()), length);
    for (int i = 0; i < length; ++i) EXPECT_EQ(keys[static_cast<std::size_t>(i)], i);
  }
}

template <int kUnit>
void CompareLists() {
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {
    BlockList list;
    list.block_q = kUnit;
    list.block_k = kUnit << (random() % 3);
    const int length = 1 + static_cast<int>(random() % 2000);
    const int blocks = (length + list.block_k - 1) / list.block_k;
    std::vector<std::int32_t> chosen;
    for (int j = 0; j < blocks; ++j) {
      if (random() % 3 == 0) chosen.push_back(j);
    }
    const auto count = static_cast<std::int32_t>(chosen.size());
    chosen.push_back(-1);  // beyond the count: must not be looked at
    list.indices = chosen.data();
    list.counts = &count;
    list.query_blocks = 1;
    list.capacity = static_cast<std::int64_t>(chosen.size());
    std::vector<int> expected;
    for (int i = 0; i < count; ++i) {
      const int first = chosen[static_cast<std::size_t>(i)] * list.block_k;
      for (int key = first; key < std::min(first + list.block_k, length); ++key) {
        expected.push_back(key);
      }
    }
    EXPECT_EQ(KeysOf(KeyBlocksOf<kUnit>::Listed(list, 0, 0, length)), expected);
  }
}

TEST(KeyBlocks, ListsAreTheirBlocksKeys) {
  CompareLists<kKeyBlock>();
  CompareLists<kSmallKeyBlock>();
}

}  // namespace
}  // namespace slalom::cuda
