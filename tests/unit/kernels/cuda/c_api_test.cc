// The C ABI on a CUDA device: pointers and a stream of the caller's. What it computes is tested
// elsewhere; here, that it does so on the right memory, in the right order.
#include "tests/unit/kernels/c_api/c_api_test.h"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/c_api/slalom_attention.h"
#include "tests/reference/attention_backward.h"

namespace slalom {
namespace {

using reference::Array;
using reference::Exact;

constexpr std::int64_t kLength = 100, kHeads = 2, kSize = 32;

class CApiOnCuda : public CApiTest {
 protected:
  void SetUp() override {
    if (CudaDeviceCount() == 0) GTEST_SKIP() << "this machine has no CUDA device";
    CreateContext("cuda");
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
  }
  void TearDown() override {
    CApiTest::TearDown();
    for (void* pointer : memory_) cudaFree(pointer);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  template <typename T>
  T* Device(const std::vector<T>& values) {
    void* pointer = nullptr;
    EXPECT_EQ(cudaMalloc(&pointer, values.size() * sizeof(T)), cudaSuccess);
    memory_.push_back(pointer);
    // On the caller's stream: the ABI's work has to wait for it.
    EXPECT_EQ(cudaMemcpyAsync(pointer, values.data(), values.size() * sizeof(T),
                              cudaMemcpyHostToDevice, stream_),
              cudaSuccess);
    return static_cast<T*>(pointer);
  }
  float* Device(const Array& a) { return Device(Floats(a)); }
  float* Poisoned(std::int64_t count) {
    return Device(std::vector<float>(static_cast<std::size_t>(count), NAN));
  }
  void ExpectDeviceNear(const float* device, const Array& exact, const char* name) {
    std::vector<float> actual(static_cast<std::size_t>(exact.size()));
    // And this copy has to wait for the ABI's work.
    ASSERT_EQ(cudaMemcpyAsync(actual.data(), device, actual.size() * sizeof(float),
                              cudaMemcpyDeviceToHost, stream_),
              cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    ExpectNear(actual, exact, name);
  }

  cudaStream_t stream_ = nullptr;
  std::vector<void*> memory_;
};

TEST_F(CApiOnCuda, SlaForwardAndBackwardOnTheCallersStream) {
  const Shape shape{1, kLength, kHeads, kSize};
  const Array q = Random(shape), k = Random(shape), v = Random(shape), d_out = Random(shape);
  const Array weight = Random(Shape{kSize, kSize}, 0.3), bias = Random(Shape{kSize});
  const reference::Classes map = RandomMap(kHeads, kLength, 32, 16);
  slalom_sla_args args{};
  args.size = sizeof(args);
  args.stream = stream_;
  args.batch = 1;
  args.length = kLength;
  args.heads = kHeads;
  args.head_size = kSize;
  args.dtype = SLALOM_F32;
  args.block_q = 32;
  args.block_k = 16;
  args.scope = SLALOM_SCOPE_MARGINAL;
  args.q = Device(q);
  args.k = Device(k);
  args.v = Device(v);
  args.map = Device(map.values);
  args.proj_weight = Device(weight);
  args.proj_bias = Device(bias);
  float* out = Poisoned(q.size());
  args.out = out;
  args.lse = Poisoned(kHeads * kLength);
  args.d_out = Device(d_out);
  float* gradients[] = {Poisoned(q.size()), Poisoned(q.size()), Poisoned(q.size())};
  args.d_q = gradients[0];
  args.d_k = gradients[1];
  args.d_v = gradients[2];
  args.d_proj_weight = Poisoned(weight.size());
  args.d_proj_bias = Poisoned(bias.size());
  ASSERT_EQ(slalom_sla_forward(context_, &args), SLALOM_OK) << slalom_context_error(context_);
  ASSERT_EQ(slalom_sla_backward(context_, &args), SLALOM_OK) << slalom_context_error(context_);
  ExpectDeviceNear(out,
                   reference::Sla<Exact>(q, k, v, map, LinearScope::kMarginal, FeatureMap::kSoftmax,
                                         weight, bias),
                   "out");
  const auto exact = reference::SlaBackward<Exact>(q, k, v, map, LinearScope::kMarginal,
                                                   FeatureMap::kSoftmax, weight, bias, d_out);
  ExpectDeviceNear(gradients[0], exact.q, "d_q");
  ExpectDeviceNear(gradients[1], exact.k, "d_k");
  ExpectDeviceNear(gradients[2], exact.v, "d_v");
  ExpectDeviceNear(args.d_proj_weight, exact.proj_weight, "d_proj_weight");
  ExpectDeviceNear(args.d_proj_bias, exact.proj_bias, "d_proj_bias");
}

}  // namespace
}  // namespace slalom
