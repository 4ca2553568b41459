// Working memory for tiles: a few float arrays per thread, cut from one block.
#pragma once

#include <cstdint>

#include "kernels/core/tensor.h"

namespace slalom {

constexpr std::int64_t RoundUp(std::int64_t n, std::int64_t step) {
  return (n + step - 1) / step * step;
}

// Hands out consecutive pieces of one thread's memory, 64-byte aligned. Without memory it only
// counts what would be taken.
class Cutter {
 public:
  explicit Cutter(float* memory) : memory_(memory) {}
  float* Take(std::int64_t floats) {
    float* piece = memory_ != nullptr ? memory_ + taken_ : nullptr;
    taken_ += RoundUp(floats, 16);
    return piece;
  }
  std::int64_t taken() const { return taken_; }

 private:
  float* memory_;
  std::int64_t taken_ = 0;
};

}  // namespace slalom
