// The swizzle of shared memory rows: a permutation, and free of bank conflicts for ldmatrix.
#include "kernels/cuda/swizzle.cuh"

#include <gtest/gtest.h>

#include <set>

namespace slalom::cuda {
namespace {

template <int kChunks>
void CheckSwizzle() {
  constexpr int kRows = 64;
  std::set<int> offsets;
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int offset = SwizzledOffset<kChunks>(row, chunk);
      EXPECT_EQ(offset / (kChunks * 16), row) << "a row keeps its place";
      offsets.insert(offset);
    }
  }
  EXPECT_EQ(offsets.size(), static_cast<std::size_t>(kRows * kChunks));
  // ldmatrix reads the same chunk of 8 neighbouring rows: 8 different groups of 4 banks.
  for (int first = 0; first < kRows; first += 8) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      std::set<int> banks;
      for (int row = first; row < first + 8; ++row) {
        banks.insert(SwizzledOffset<kChunks>(row, chunk) % 128 / 16);
      }
      EXPECT_EQ(banks.size(), 8u) << kChunks << " chunks, rows from " << first;
    }
  }
}

TEST(Swizzle, RowsOf64Bytes) { CheckSwizzle<4>(); }
TEST(Swizzle, RowsOf128Bytes) { CheckSwizzle<8>(); }
TEST(Swizzle, RowsOf256Bytes) { CheckSwizzle<16>(); }

}  // namespace
}  // namespace slalom::cuda
