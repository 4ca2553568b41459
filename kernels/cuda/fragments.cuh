// Operands of mma.sync, read from swizzled tiles in shared memory.
#pragma once

#include <cstdint>

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/shared_address.cuh"
#include "kernels/cuda/vector.cuh"

namespace slalom::cuda {

// What a tile is in a product of 16 x 16 by 16 x 16: an operand, or the transpose of one.
enum class Operand { kLeft, kLeftTransposed, kRight, kRightTransposed };

// Reads fragments of a tile whose rows have kColumns elements, swizzled by SwizzledOffset. Each
// lane keeps the address of its row of the first fragment; those of the others are one operation
// away. The tile lies at a multiple of its rows' bytes.
template <Operand kOperand, int kColumns>
class FragmentReader {
 public:
  // (row, column): the first fragment's place in the tile.
  template <int kRows>
  __device__ explicit FragmentReader(const bf16 (&tile)[kRows][kColumns], int row = 0,
                                     int column = 0) {
    const int lane = threadIdx.x % 32;
    // A fragment is four matrices of 8 x 8. In the order that the registers want they lie below one
    // another in the tile of an operand, beside one another in that of a transpose.
    constexpr bool kDownFirst = kOperand == Operand::kLeft || kOperand == Operand::kRight;
    const int down = kDownFirst ? lane % 16 : lane / 16 * 8 + lane % 8;
    const int along = kDownFirst ? lane / 16 : lane / 8 % 2;
    address_ = SharedAddress(&tile) + SwizzledOffset<kColumns / 8>(row + down, column / 8 + along);
  }

  // The fragment `rows` below and `columns` right of the first one, multiples of 16. `columns` has
  // no bit that the first one's column has.
  __device__ void Load(std::uint32_t (&to)[4], int rows, int columns) const {
    constexpr bool kTransposes =
        kOperand == Operand::kLeftTransposed || kOperand == Operand::kRight;
    const std::uint32_t address =
        (address_ ^ static_cast<std::uint32_t>(columns * 2)) + rows * kColumns * 2;
    kTransposes ? LoadMatricesTransposed(to, address) : LoadMatrices(to, address);
  }

 private:
  std::uint32_t address_;
};

// Two neighbouring fragments 16 x 8 of a sum += a b for a right operand as FragmentReader reads it.
__device__ inline void Mma16x16x16(float (&left)[4], float (&right)[4], const std::uint32_t (&a)[4],
                                   const std::uint32_t (&b)[4]) {
  Mma16x8x16(left, a, b[0], b[1]);
  Mma16x8x16(right, a, b[2], b[3]);
}

}  // namespace slalom::cuda
