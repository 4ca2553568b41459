// One small picture as JPEG, for previews.
#pragma once

#include <string>

#include "kernels/core/tensor.h"

namespace slalom {

// `image` is host [height, width, 3] u8 RGB. Throws Error. Thread-safe.
std::string EncodeJpeg(const Tensor& image);

}  // namespace slalom
