#include "kernels/core/tensor.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "kernels/core/error.h"

namespace slalom {
namespace {

constexpr std::size_t kHostAlignment = 64;

[[noreturn]] void Fail(const std::string& message) { throw Error(ErrorCode::kInternal, message); }

}  // namespace

Shape::Shape(std::initializer_list<std::int64_t> dims)
    : Shape(std::span<const std::int64_t>(dims.begin(), dims.size())) {}

Shape::Shape(std::span<const std::int64_t> dims) {
  if (dims.size() > kMaxRank) Fail("a shape has at most 6 dimensions");
  if (std::any_of(dims.begin(), dims.end(), [](std::int64_t d) { return d < 0; })) {
    Fail("a shape has no negative dimension");
  }
  rank_ = static_cast<int>(dims.size());
  std::copy(dims.begin(), dims.end(), dims_.begin());
}

std::int64_t Shape::operator[](int index) const {
  const int i = index < 0 ? index + rank_ : index;
  if (i < 0 || i >= rank_) {
    Fail("dimension " + std::to_string(index) + " of shape " + ToString(*this));
  }
  return dims_[static_cast<std::size_t>(i)];
}

std::int64_t Shape::NumElements() const {
  std::int64_t n = 1;
  for (const std::int64_t d : dims()) n *= d;
  return n;
}

bool operator==(const Shape& a, const Shape& b) {
  return std::equal(a.dims().begin(), a.dims().end(), b.dims().begin(), b.dims().end());
}

std::string ToString(const Shape& shape) {
  std::string text = "[";
  for (int i = 0; i < shape.rank(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + "]";
}

Tensor::Tensor(std::shared_ptr<std::byte> data, const Shape& shape, DType dtype, Device device)
    : data_(std::move(data)), shape_(shape), dtype_(dtype), device_(device) {}

Tensor Tensor::Host(const Shape& shape, DType dtype) {
  const std::size_t bytes = static_cast<std::size_t>(shape.NumElements()) * ByteSize(dtype);
  const std::size_t padded = (bytes / kHostAlignment + 1) * kHostAlignment;
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(kHostAlignment, padded));
  if (memory == nullptr) {
    throw Error(ErrorCode::kResourceExhausted,
                "out of host memory: " + std::to_string(bytes) + " bytes");
  }
  return {std::shared_ptr<std::byte>(memory, [](std::byte* p) { std::free(p); }), shape, dtype,
          Device{}};
}

Tensor Tensor::FromFloats(const Shape& shape, std::span<const float> values) {
  if (static_cast<std::int64_t>(values.size()) != shape.NumElements()) {
    Fail(std::to_string(values.size()) + " values for shape " + ToString(shape));
  }
  Tensor tensor = Host(shape, DType::kF32);
  std::copy(values.begin(), values.end(), tensor.data<float>());
  return tensor;
}

Tensor Tensor::Reshape(const Shape& shape) const {
  if (shape.NumElements() != NumElements()) {
    Fail("cannot view " + ToString(shape_) + " as " + ToString(shape));
  }
  return {data_, shape, dtype_, device_};
}

Tensor Tensor::Slice(std::int64_t begin, std::int64_t end) const {
  if (shape_.rank() == 0 || begin < 0 || begin > end || end > shape_[0]) {
    Fail("rows " + std::to_string(begin) + ".." + std::to_string(end) + " of " + ToString(shape_));
  }
  std::array<std::int64_t, Shape::kMaxRank> dims{};
  std::copy(shape_.dims().begin(), shape_.dims().end(), dims.begin());
  const std::int64_t row_elements = shape_[0] == 0 ? 0 : NumElements() / shape_[0];
  dims[0] = end - begin;
  std::byte* start =
      data_.get() + begin * row_elements * static_cast<std::int64_t>(ByteSize(dtype_));
  return {
      std::shared_ptr<std::byte>(data_, start),
      Shape(std::span<const std::int64_t>(dims.data(), static_cast<std::size_t>(shape_.rank()))),
      dtype_, device_};
}

}  // namespace slalom
