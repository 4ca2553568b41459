// oneDNN behind two calls, with the primitives built so far kept by shape.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <tuple>

#include "kernels/backend.h"

namespace slalom {

// y[M, N] = act(x[M, K] w[N, K]^T + bias[N]), then y = residual + gate[N] * y. Strides are in
// elements; rows are dense inside.
struct MatmulCall {
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  DType type = DType::kF32;      // of x and w
  DType out_type = DType::kF32;  // of y and residual
  Activation activation = Activation::kNone;
  const void* x = nullptr;
  const void* weight = nullptr;
  const float* bias = nullptr;     // optional
  const void* residual = nullptr;  // optional; may be y
  const float* gate = nullptr;     // optional, with residual
  void* out = nullptr;
};

// One causal convolution over frames that stand one behind the other: x [T + kt - 1, H, W, Ci]
// (history included), y [T, H, W, Co].
struct ConvolutionCall {
  std::int64_t frames_out = 0;
  std::int64_t height = 0;
  std::int64_t width = 0;
  std::int64_t channels_in = 0;
  std::int64_t channels_out = 0;
  std::int64_t kt = 1, kh = 1, kw = 1;
  DType type = DType::kF32;
  const void* x = nullptr;
  const void* weight = nullptr;  // [Co, kt, kh, kw, Ci]
  const float* bias = nullptr;   // optional
  bool add_to_out = false;       // out already holds the residual
  void* out = nullptr;
};

class OneDnn {
 public:
  explicit OneDnn(int threads);
  ~OneDnn();
  OneDnn(const OneDnn&) = delete;
  OneDnn& operator=(const OneDnn&) = delete;

  // Type bf16 needs AVX-512.
  void Matmul(const MatmulCall& call);
  void Convolution(const ConvolutionCall& call);

 private:
  struct State;
  int threads_;
  std::unique_ptr<State> state_;
};

}  // namespace slalom
