// Operand descriptors of wgmma: a tile as TMA writes it, read by the rules of the PTX ISA, must
// give the product that the kernels mean.
#include "kernels/cuda/hopper/descriptor.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "tests/unit/kernels/cuda/tma_layout.h"

namespace slalom::cuda {
namespace {

using hopper::SwizzledRows;
using hopper::SwizzledTile;

// Shared memory that holds, in every 2 bytes, the number of the element that was put there.
class SharedMemory {
 public:
  static constexpr std::uint32_t kBytes = 128 << 10;

  // A box of rows of `row_bytes`, whose element (row, column) is first + row * row_step + column.
  void CopyBox(std::uint32_t address, int rows, int row_bytes, int first, int row_step) {
    ASSERT_EQ(address % 1024, 0u);
    for (int row = 0; row < rows; ++row) {
      for (int column = 0; column < row_bytes / 2; ++column) {
        const auto offset = static_cast<std::uint32_t>(row * row_bytes + column * 2);
        cells_[(address + SwizzledByte(offset, row_bytes)) / 2] = first + row * row_step + column;
      }
    }
  }
  int At(std::uint32_t address) const { return cells_[address / 2]; }

 private:
  std::vector<int> cells_ = std::vector<int>(kBytes / 2, -1);
};

// How the hardware finds element (row, k) of an operand: canonical layouts in units of 16 bytes,
// then the swizzle on address bits.
class Operand {
 public:
  explicit Operand(std::uint64_t descriptor)
      : start_(Field(descriptor, 0)),
        leading_(Field(descriptor, 16)),
        stride_(Field(descriptor, 32)),
        row_bytes_(descriptor >> 62 == 1 ? 128 : 64) {
    EXPECT_EQ(descriptor >> 49 & 7, 0u) << "base offset";
  }
  // Rows run along k, in groups of 8.
  std::uint32_t KMajor(int row, int k) const {
    return Swizzle(start_ + row / 8 * stride_ + row % 8 * row_bytes_ + k * 2);
  }
  // Rows run along m or n, `row_bytes` of them at a time; k in groups of 8.
  std::uint32_t MnMajor(int n, int k) const {
    const int width = static_cast<int>(row_bytes_) / 2;
    return Swizzle(start_ + n / width * leading_ + n % width * 2 + k / 8 * stride_ +
                   k % 8 * row_bytes_);
  }

 private:
  static std::uint32_t Field(std::uint64_t descriptor, int bit) {
    return static_cast<std::uint32_t>(descriptor >> bit & 0x3fff) * 16;
  }
  std::uint32_t Swizzle(std::uint32_t address) const {
    return SwizzledByte(address, static_cast<int>(row_bytes_));
  }

  std::uint32_t start_, leading_, stride_, row_bytes_;
};

constexpr std::uint32_t kBase = 3 << 10;  // any multiple of 1024

// Q, K: panels of 64 channels, steps of 16 channels within them.
TEST(Descriptor, AttentionScores) {
  for (const int rows : {64, 128}) {
    SharedMemory shared;
    const std::uint32_t panel_bytes = static_cast<std::uint32_t>(rows) * 128;
    for (int panel = 0; panel < 2; ++panel) {
      shared.CopyBox(kBase + panel * panel_bytes, rows, 128, panel * 64, 128);
    }
    for (int step = 0; step < 8; ++step) {
      const Operand operand(SwizzledTile(kBase + step / 4 * panel_bytes + step % 4 * 32, 0));
      for (int row = 0; row < rows; ++row) {
        for (int k = 0; k < 16; ++k) {
          ASSERT_EQ(shared.At(operand.KMajor(row, k)), row * 128 + step * 16 + k);
        }
      }
    }
  }
}

// V: rows are keys, which are the product's k.
TEST(Descriptor, AttentionValues) {
  for (const int keys : {64, 128}) {
    SharedMemory shared;
    const std::uint32_t panel_bytes = static_cast<std::uint32_t>(keys) * 128;
    for (int panel = 0; panel < 2; ++panel) {
      for (int unit = 0; unit < keys / 64; ++unit) {
        shared.CopyBox(kBase + panel * panel_bytes + unit * 64 * 128, 64, 128,
                       panel * 64 + unit * 64 * 128, 128);
      }
    }
    for (int step = 0; step < keys / 16; ++step) {
      const Operand operand(SwizzledTile(kBase + step * 16 * 128, panel_bytes));
      for (int n = 0; n < 128; ++n) {
        for (int k = 0; k < 16; ++k) {
          ASSERT_EQ(shared.At(operand.MnMajor(n, k)), (step * 16 + k) * 128 + n);
        }
      }
    }
  }
}

// Sums of feature(K)^T V: rows are keys, which are the product's k, for both operands; a warpgroup
// has one panel of features.
TEST(Descriptor, LinearBranchFeatures) {
  constexpr int kKeys = 64;
  constexpr std::uint32_t kPanelBytes = kKeys * 128;
  SharedMemory shared;
  for (int panel = 0; panel < 2; ++panel) {
    shared.CopyBox(kBase + panel * kPanelBytes, kKeys, 128, panel * 64, 128);
  }
  for (int panel = 0; panel < 2; ++panel) {
    for (int step = 0; step < kKeys / 16; ++step) {
      const Operand operand(
          SwizzledTile(kBase + panel * kPanelBytes + step * 16 * 128, kPanelBytes));
      for (int m = 0; m < 64; ++m) {
        for (int k = 0; k < 16; ++k) {
          ASSERT_EQ(shared.At(operand.MnMajor(m, k)), (step * 16 + k) * 128 + panel * 64 + m);
        }
      }
    }
  }
}

// The linear branch's [128, 128] matrices in stages of V: whole, or as two parts of 64 rows.
TEST(Descriptor, LinearBranchMatrices) {
  for (const int part_rows : {64, 128}) {
    const std::uint32_t panel_bytes = static_cast<std::uint32_t>(part_rows) * 128;
    const std::uint32_t stage_bytes = 2 * panel_bytes;
    SharedMemory shared;
    for (int part = 0; part < 128 / part_rows; ++part) {
      for (int row = 0; row < part_rows; row += 64) {
        for (int panel = 0; panel < 2; ++panel) {
          shared.CopyBox(kBase + part * stage_bytes + panel * panel_bytes + row * 128, 64, 128,
                         (part * part_rows + row) * 128 + panel * 64, 128);
        }
      }
    }
    for (int step = 0; step < 8; ++step) {
      const int part = step / (part_rows / 16), own = step % (part_rows / 16);
      const Operand operand(SwizzledTile(kBase + part * stage_bytes + own * 16 * 128, panel_bytes));
      for (int n = 0; n < 128; ++n) {
        for (int k = 0; k < 16; ++k) {
          ASSERT_EQ(shared.At(operand.MnMajor(n, k)), (step * 16 + k) * 128 + n);
        }
      }
    }
  }
}

// Convolution: weights in panels of 32 or 64 channels, 8 to 192 output channels.
template <std::uint32_t kRowBytes>
void CheckWeights(int rows) {
  constexpr int kPanel = kRowBytes / 2;
  SharedMemory shared;
  shared.CopyBox(kBase, rows, kRowBytes, 0, kPanel);
  for (int step = 0; step < kPanel / 16; ++step) {
    const Operand operand(SwizzledRows<kRowBytes>(kBase + step * 32, 8));
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < 16; ++k) {
        ASSERT_EQ(shared.At(operand.KMajor(row, k)), row * kPanel + step * 16 + k);
      }
    }
  }
}

// Pixels: fragments of 8 lines of 8 out of a patch of wider lines, from any row on.
template <std::uint32_t kRowBytes>
void CheckPatch(int halo) {
  constexpr int kPanel = kRowBytes / 2;
  const int line_rows = 8 + halo;
  SharedMemory shared;
  shared.CopyBox(kBase, line_rows * (32 + halo), kRowBytes, 0, kPanel);
  for (int first = 0; first <= halo * line_rows + halo; ++first) {
    for (int line = 0; line < 32; line += 8) {
      for (int step = 0; step < kPanel / 16; ++step) {
        const int start = first + line * line_rows;
        const Operand operand(SwizzledRows<kRowBytes>(
            kBase + static_cast<std::uint32_t>(start) * kRowBytes + step * 32, line_rows));
        for (int pixel = 0; pixel < 64; ++pixel) {
          const int row = start + pixel / 8 * line_rows + pixel % 8;
          for (int k = 0; k < 16; ++k) {
            ASSERT_EQ(shared.At(operand.KMajor(pixel, k)), row * kPanel + step * 16 + k);
          }
        }
      }
    }
  }
}

TEST(Descriptor, Convolution) {
  for (const int rows : {8, 96, 192}) {
    CheckWeights<64>(rows);
    CheckWeights<128>(rows);
  }
  for (const int halo : {0, 2}) {
    CheckPatch<64>(halo);
    CheckPatch<128>(halo);
  }
}

}  // namespace
}  // namespace slalom::cuda
