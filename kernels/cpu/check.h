// Argument checks: a wrong shape or type is a bug in the caller and names the argument.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/core/dtype.h"
#include "kernels/core/error.h"
#include "kernels/core/tensor.h"

namespace slalom {

// Checks the arguments of one operation; every failure throws Error(kInternal, "Op: argument:
// ...").
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  void That(bool ok, const char* argument, const std::string& expected) const {
    if (!ok) Fail(argument, expected);
  }
  // Defined and on the CPU.
  void Present(const Tensor& tensor, const char* argument) const {
    if (!tensor.defined()) Fail(argument, "is missing");
    if (!tensor.device().is_cpu()) Fail(argument, "lives on " + ToString(tensor.device()));
  }
  void Rank(const Tensor& tensor, int rank, const char* argument) const {
    Present(tensor, argument);
    if (tensor.shape().rank() != rank) {
      Fail(argument, "has shape " + ToString(tensor.shape()) + "; rank " + std::to_string(rank) +
                         " is expected");
    }
  }
  void Is(const Tensor& tensor, const Shape& shape, DType dtype, const char* argument) const {
    Present(tensor, argument);
    if (!(tensor.shape() == shape) || tensor.dtype() != dtype) {
      Fail(argument, "is " + std::string(DTypeName(tensor.dtype())) + " " +
                         ToString(tensor.shape()) + "; " + DTypeName(dtype) + " " +
                         ToString(shape) + " is expected");
    }
  }
  // As Is, where leading dimensions may be merged or split.
  void Holds(const Tensor& tensor, std::int64_t elements, DType dtype, const char* argument) const {
    Present(tensor, argument);
    if (tensor.NumElements() != elements || tensor.dtype() != dtype) {
      Fail(argument, "is " + std::string(DTypeName(tensor.dtype())) + " " +
                         ToString(tensor.shape()) + "; " + std::to_string(elements) +
                         " elements of " + DTypeName(dtype) + " are expected");
    }
  }
  // A compute type: f32 or bf16.
  void Compute(const Tensor& tensor, const char* argument) const {
    Present(tensor, argument);
    if (tensor.dtype() != DType::kF32 && tensor.dtype() != DType::kBF16) {
      Fail(argument, std::string("is ") + DTypeName(tensor.dtype()) + "; F32 or BF16 is expected");
    }
  }

 private:
  [[noreturn]] void Fail(const char* argument, const std::string& what) const {
    throw Error(ErrorCode::kInternal, std::string(op_) + ": " + argument + " " + what);
  }

  const char* op_;
};

}  // namespace slalom
