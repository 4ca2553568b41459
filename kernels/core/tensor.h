// Tensor: a shape over shared memory. It does no arithmetic; Backend does.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>

#include "kernels/core/device.h"
#include "kernels/core/dtype.h"

namespace slalom {

// Up to six dimensions, stored inline.
class Shape {
 public:
  static constexpr int kMaxRank = 6;

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> dims);
  explicit Shape(std::span<const std::int64_t> dims);

  int rank() const { return rank_; }
  // A negative index counts from the end. Throws Error(kInternal) when out of range.
  std::int64_t operator[](int index) const;
  std::int64_t NumElements() const;
  std::span<const std::int64_t> dims() const { return {dims_.data(), static_cast<size_t>(rank_)}; }

  friend bool operator==(const Shape& a, const Shape& b);

 private:
  std::array<std::int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

// "[2, 3, 4]".
std::string ToString(const Shape& shape);

// A dense, row-major block of elements on one device. Copies share the memory; the last one frees
// it (or hands it back to the arena that it came from). Concurrent reads are safe; writers
// synchronise outside.
class Tensor {
 public:
  Tensor() = default;
  // Wraps memory that `data` keeps alive. `data` must hold at least shape.NumElements() elements.
  Tensor(std::shared_ptr<std::byte> data, const Shape& shape, DType dtype, Device device);

  // Host memory, 64-byte aligned, uninitialised.
  static Tensor Host(const Shape& shape, DType dtype);
  // A host copy of the values, as float32.
  static Tensor FromFloats(const Shape& shape, std::span<const float> values);

  bool defined() const { return data_ != nullptr; }
  const Shape& shape() const { return shape_; }
  std::int64_t dim(int index) const { return shape_[index]; }
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }
  std::int64_t NumElements() const { return shape_.NumElements(); }
  std::size_t NumBytes() const {
    return static_cast<std::size_t>(NumElements()) * ByteSize(dtype_);
  }

  void* raw() const { return data_.get(); }
  // Typed access for code that has checked dtype(); T must have dtype()'s size.
  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(data_.get());
  }

  // The same memory under another shape with as many elements. Throws Error(kInternal) otherwise.
  Tensor Reshape(const Shape& shape) const;
  // Rows [begin, end) of the first dimension, sharing memory.
  Tensor Slice(std::int64_t begin, std::int64_t end) const;

 private:
  std::shared_ptr<std::byte> data_;
  Shape shape_;
  DType dtype_ = DType::kF32;
  Device device_;
};

}  // namespace slalom
