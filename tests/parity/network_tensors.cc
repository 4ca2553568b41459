#include "tests/parity/network_tensors.h"

#include <algorithm>

#include "kernels/core/error.h"

namespace slalom {
namespace {

// "[2, *, 64]".
std::string ShapePattern(const std::vector<std::int64_t>& dims) {
  std::string text = "[";
  for (std::size_t i = 0; i < dims.size(); ++i) {
    if (i > 0) text += ", ";
    text += dims[i] < 0 ? "*" : std::to_string(dims[i]);
  }
  return text + "]";
}

bool Fits(const Shape& shape, const std::vector<std::int64_t>& dims) {
  return std::ranges::equal(shape.dims(), dims, [](std::int64_t have, std::int64_t want) {
    return want < 0 || have == want;
  });
}

}  // namespace

Tensor NetworkInputs::Find(const std::string& name, DType dtype,
                           const std::vector<std::int64_t>* dims) const {
  std::string expected = std::string("expected ") + DTypeName(dtype);
  if (dims) expected.append(" ").append(ShapePattern(*dims));
  if (!weights_) {
    throw Error(ErrorCode::kInvalidArgument, "tensor '" + name + "': no input file; " + expected);
  }
  const std::string where = weights_->path() + ": tensor '" + name + "'";
  if (!weights_->Has(name)) {
    throw Error(ErrorCode::kInvalidArgument, where + " is not there; " + expected);
  }
  Tensor tensor = weights_->Get(name);
  if (tensor.dtype() != dtype || tensor.NumElements() == 0 ||
      (dims && !Fits(tensor.shape(), *dims))) {
    throw Error(ErrorCode::kInvalidArgument, where + " is " + DTypeName(tensor.dtype()) + " " +
                                                 ToString(tensor.shape()) + "; " + expected);
  }
  return tensor;
}

Tensor NetworkInputs::Get(const std::string& name, DType dtype,
                          const std::vector<std::int64_t>& dims) const {
  return Find(name, dtype, &dims);
}

Tensor NetworkInputs::Get(const std::string& name, DType dtype) const {
  return Find(name, dtype, nullptr);
}

Tensor Upload(Backend& backend, const Tensor& host, DType dtype) {
  Tensor tensor = backend.Allocate(host.shape(), dtype);
  backend.Copy(host, tensor);
  return tensor;
}

Tensor Download(Backend& backend, const Tensor& tensor) {
  const bool floating = tensor.dtype() == DType::kBF16;
  Tensor host = Tensor::Host(tensor.shape(), floating ? DType::kF32 : tensor.dtype());
  backend.Copy(tensor, host);
  return host;
}

Tensor SwapMiddle(const Tensor& tensor) {
  const std::int64_t outer = tensor.dim(0);
  const std::int64_t rows = tensor.dim(1);
  const std::int64_t columns = tensor.dim(2);
  const std::int64_t width = tensor.dim(3);
  Tensor out = Tensor::Host({outer, columns, rows, width}, DType::kF32);
  const float* from = tensor.data<float>();
  for (std::int64_t a = 0; a < outer; ++a) {
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < columns; ++c, from += width) {
        std::copy_n(from, width, out.data<float>() + ((a * columns + c) * rows + r) * width);
      }
    }
  }
  return out;
}

}  // namespace slalom
