// What the Hopper kernels rest on, one fact per test: copies by TMA, products by wgmma, registers
// and turns that warpgroups hand to each other. All values are small integers: results are exact.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cuda/context.h"
#include "kernels/cuda/hopper/mbarrier.cuh"
#include "kernels/cuda/hopper/tensor_map.h"
#include "kernels/cuda/hopper/tma.cuh"
#include "kernels/cuda/hopper/wgmma.cuh"
#include "kernels/cuda/vector.cuh"
#include "tests/unit/kernels/cuda/tma_layout.h"

namespace slalom::cuda {
namespace {

using namespace hopper;

// Memory that both sides see, freed at the end.
template <typename T>
class Buffer {
 public:
  explicit Buffer(std::size_t size) : host(size) {
    EXPECT_EQ(cudaMalloc(&device_, size * sizeof(T)), cudaSuccess);
  }
  ~Buffer() { cudaFree(device_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* Upload() {
    EXPECT_EQ(cudaMemcpy(device_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice),
              cudaSuccess);
    return device_;
  }
  void Download() {
    ASSERT_EQ(cudaGetLastError(), cudaSuccess);
    ASSERT_EQ(cudaMemcpy(host.data(), device_, host.size() * sizeof(T), cudaMemcpyDeviceToHost),
              cudaSuccess);
  }

  std::vector<T> host;

 private:
  T* device_ = nullptr;
};

class HopperFacts : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
      GTEST_SKIP() << "this machine has no CUDA device";
    }
    int major = 0;
    ASSERT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
    if (major != kHopperMajor) GTEST_SKIP() << "this device is not a Hopper";
  }

  void FillSmall(std::vector<bf16>& values) {
    for (bf16& value : values) value = __float2bfloat16(static_cast<float>(random_() % 9) - 4.0f);
  }

  std::mt19937 random_{5};
};

__device__ std::byte* Align1024(std::byte* pointer) {
  return pointer + (1024 - SharedAddress(pointer) % 1024) % 1024;
}

// --- TMA ---

__global__ void __launch_bounds__(128)
    CopyKernel(const __grid_constant__ CUtensorMap map, int c0, int c1, int c2, int c3, int bytes,
               std::uint16_t* out) {
  extern __shared__ std::byte dynamic_shared[];
  std::byte* tile = Align1024(dynamic_shared);
  __shared__ std::uint64_t full;
  if (threadIdx.x == 0) {
    BarrierInit(&full, 1);
    BarrierInitFence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    BarrierExpect(&full, static_cast<std::uint32_t>(bytes));
    CopyBox(&map, &full, tile, c0, c1, c2, c3);
  }
  BarrierWait(&full, 0);
  const auto* cells = reinterpret_cast<const std::uint16_t*>(tile);
  for (int i = threadIdx.x; i < bytes / 2; i += blockDim.x) out[i] = cells[i];
}

// A box of `width` columns, `rows` of dimension 2 and `lines` of dimension 1.
struct Box {
  int width, lines, rows;
  int c0, c1, c2, c3;
};

void CheckCopy(const Box& box) {
  constexpr int kColumns = 128, kLines = 3, kRows = 70, kSamples = 2;
  Buffer<std::uint16_t> tensor(kColumns * kLines * kRows * kSamples);
  for (std::size_t i = 0; i < tensor.host.size(); ++i) {
    tensor.host[i] = static_cast<std::uint16_t>(i * 2654435761u >> 13 | 1);  // never zero
  }
  const CUtensorMap map =
      MakeTensorMap(tensor.Upload(), {kColumns, kLines, kRows, kSamples},
                    {kColumns, kColumns * kLines, kColumns * kLines * kRows},
                    {static_cast<std::uint32_t>(box.width), static_cast<std::uint32_t>(box.lines),
                     static_cast<std::uint32_t>(box.rows), 1});
  const int cells = box.width * box.lines * box.rows;
  Buffer<std::uint16_t> out(static_cast<std::size_t>(cells));
  CopyKernel<<<1, 128, cells * 2 + 1024>>>(map, box.c0, box.c1, box.c2, box.c3, cells * 2,
                                           out.Upload());
  out.Download();
  for (int i = 0; i < cells; ++i) {
    const int column = box.c0 + i % box.width;
    const int line = box.c1 + i / box.width % box.lines;
    const int row = box.c2 + i / box.width / box.lines;
    const bool inside = line >= 0 && line < kLines && row >= 0 && row < kRows;
    const int at = ((box.c3 * kRows + row) * kLines + line) * kColumns + column;
    const std::uint32_t cell = SwizzledByte(static_cast<std::uint32_t>(i) * 2, box.width * 2) / 2;
    ASSERT_EQ(out.host[cell], inside ? tensor.host[static_cast<std::size_t>(at)] : 0)
        << "element " << i << " of the box";
  }
}

TEST_F(HopperFacts, CopyInside) { CheckCopy({64, 1, 64, 64, 1, 3, 1}); }
TEST_F(HopperFacts, CopyBeyondTheEndIsZero) { CheckCopy({64, 1, 64, 0, 2, 32, 1}); }
TEST_F(HopperFacts, CopyOfNothingIsZero) { CheckCopy({64, 1, 64, 0, 0, 128, 0}); }
TEST_F(HopperFacts, CopyNarrowInside) { CheckCopy({32, 2, 16, 96, 1, 8, 1}); }
TEST_F(HopperFacts, CopyNarrowFromBeforeTheStart) { CheckCopy({32, 8, 16, 32, -1, -1, 0}); }

// --- wgmma ---

// d [64, kN] = a [64, kDepth] b; b is [kN, kDepth], or [kDepth, kN] when kTransposed, and then a
// comes from registers.
template <int kColumns, int kDepthCount, bool kIsTransposed>
struct Product {
  static constexpr int kN = kColumns;
  static constexpr int kDepth = kDepthCount;
  static constexpr bool kTransposed = kIsTransposed;
  static constexpr int kPanels = kTransposed ? kN / 64 : 1;
  static constexpr int kBytesA = 64 * kDepth * 2;
  static constexpr int kBytesB = kN * kDepth * 2;
};

template <class P>
__device__ void Multiply(float (&d)[P::kN / 2], int step, std::uint32_t a_tile,
                         std::uint32_t b_tile, const bf16* a) {
  if constexpr (P::kTransposed) {
    const int lane = threadIdx.x % 32;
    const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
    const bf16* pairs = a + row * P::kDepth + step * 16 + 2 * (lane % 4);
    std::uint32_t fragment[4];
    for (int i = 0; i < 4; ++i) {
      fragment[i] =
          *reinterpret_cast<const std::uint32_t*>(pairs + i % 2 * 8 * P::kDepth + i / 2 * 8);
    }
    const std::uint64_t b = SwizzledTile(b_tile + step * 16 * 128, P::kDepth * 128);
    WgmmaFence();
    if constexpr (P::kN == 64) Wgmma64x64<true>(d, fragment, b, step > 0);
    if constexpr (P::kN == 128) Wgmma64x128<true>(d, fragment, b, step > 0);
  } else if constexpr (P::kDepth == 64) {
    const std::uint64_t lhs = SwizzledTile(a_tile + step * 32, 0);
    const std::uint64_t rhs = SwizzledTile(b_tile + step * 32, 0);
    WgmmaFence();
    if constexpr (P::kN == 64) Wgmma64x64<false>(d, lhs, rhs, step > 0);
    if constexpr (P::kN == 128) Wgmma64x128<false>(d, lhs, rhs, step > 0);
  } else {
    const std::uint64_t lhs = SwizzledRows<64>(a_tile + step * 32, 8);
    const std::uint64_t rhs = SwizzledRows<64>(b_tile + step * 32, 8);
    WgmmaFence();
    if constexpr (P::kN == 96) Wgmma64x96<false>(d, lhs, rhs, step > 0);
    if constexpr (P::kN == 192) Wgmma64x192<false>(d, lhs, rhs, step > 0);
  }
  WgmmaCommit();
  WgmmaWait<0>();
  HoldRegisters(d);
}

template <class P>
__global__ void __launch_bounds__(128)
    ProductKernel(const __grid_constant__ CUtensorMap a_map,
                  const __grid_constant__ CUtensorMap b_map, const bf16* a, float* out) {
  extern __shared__ std::byte dynamic_shared[];
  std::byte* a_tile = Align1024(dynamic_shared);
  std::byte* b_tile = a_tile + P::kBytesA;
  __shared__ std::uint64_t full;
  if (threadIdx.x == 0) {
    BarrierInit(&full, 1);
    BarrierInitFence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    BarrierExpect(&full, P::kBytesA + P::kBytesB);
    CopyBox(&a_map, &full, a_tile, 0, 0, 0, 0);
    for (int panel = 0; panel < P::kPanels; ++panel) {
      CopyBox(&b_map, &full, b_tile + panel * P::kDepth * 128, panel * 64, 0, 0, 0);
    }
  }
  BarrierWait(&full, 0);
  float d[P::kN / 2] = {};
#pragma unroll
  for (int step = 0; step < P::kDepth / 16; ++step) {
    Multiply<P>(d, step, SharedAddress(a_tile), SharedAddress(b_tile), a);
  }
  const int lane = threadIdx.x % 32;
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < P::kN / 2; ++i) {
    out[(row + i % 4 / 2 * 8) * P::kN + i / 4 * 8 + 2 * (lane % 4) + i % 2] = d[i];
  }
}

template <class P>
void CheckProduct(std::vector<bf16> a_values, std::vector<bf16> b_values) {
  constexpr std::uint64_t kDepth = P::kDepth, kN = P::kN;
  Buffer<bf16> a(64 * kDepth), b(kN * kDepth);
  a.host = std::move(a_values);
  b.host = std::move(b_values);
  Buffer<float> out(64 * kN);
  out.host.assign(64 * kN, NAN);
  const CUtensorMap a_map = MakeTensorMap(
      a.Upload(), {kDepth, 64, 1, 1}, {kDepth, 64 * kDepth, 64 * kDepth}, {P::kDepth, 64, 1, 1});
  const std::uint64_t width = P::kTransposed ? kN : kDepth, rows = P::kTransposed ? kDepth : kN;
  const CUtensorMap b_map =
      MakeTensorMap(b.Upload(), {width, rows, 1, 1}, {width, width * rows, width * rows},
                    {P::kTransposed ? 64u : P::kDepth, static_cast<std::uint32_t>(rows), 1, 1});
  constexpr int kSharedBytes = P::kBytesA + P::kBytesB + 1024;
  ASSERT_EQ(cudaFuncSetAttribute(ProductKernel<P>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 kSharedBytes),
            cudaSuccess);
  ProductKernel<P><<<1, 128, kSharedBytes>>>(a_map, b_map, a.Upload(), out.Upload());
  out.Download();
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < P::kN; ++n) {
      float sum = 0;
      for (int k = 0; k < P::kDepth; ++k) {
        const int at = P::kTransposed ? k * P::kN + n : n * P::kDepth + k;
        sum += __bfloat162float(a.host[m * P::kDepth + k]) * __bfloat162float(b.host[at]);
      }
      ASSERT_EQ(out.host[m * P::kN + n], sum) << "row " << m << " column " << n;
    }
  }
}

class HopperProducts : public HopperFacts {
 protected:
  template <class P>
  void Check() {
    std::vector<bf16> a(64 * P::kDepth), b(P::kN * P::kDepth);
    FillSmall(a);
    FillSmall(b);
    CheckProduct<P>(a, b);
  }
};

TEST_F(HopperProducts, Scores64) { Check<Product<64, 64, false>>(); }
TEST_F(HopperProducts, Scores128) { Check<Product<128, 64, false>>(); }
TEST_F(HopperProducts, Values64) { Check<Product<64, 64, true>>(); }
TEST_F(HopperProducts, Values128) { Check<Product<128, 64, true>>(); }
TEST_F(HopperProducts, Channels96) { Check<Product<96, 32, false>>(); }
TEST_F(HopperProducts, Channels192) { Check<Product<192, 32, false>>(); }

// d [64, kN] = a^T b for a [64, 64] and b [64, kN], whose rows both run along k, and the sums of
// a's columns as a product with ones. a is written by threads, as features of keys are.
template <int kN>
__global__ void __launch_bounds__(128)
    SumsKernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
               float* out, float* totals) {
  extern __shared__ std::byte dynamic_shared[];
  std::byte* a = Align1024(dynamic_shared);
  std::byte* ones = a + 64 * 128;
  std::byte* b = ones + 1024;
  __shared__ std::uint64_t full;
  if (threadIdx.x == 0) {
    BarrierInit(&full, 1);
    BarrierInitFence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    BarrierExpect(&full, 64 * 128 + 64 * kN * 2);
    CopyBox(&a_map, &full, a, 0, 0, 0, 0);
    for (int panel = 0; panel < kN / 64; ++panel) {
      CopyBox(&b_map, &full, b + panel * 64 * 128, panel * 64, 0, 0, 0);
    }
  }
  BarrierWait(&full, 0);
  for (int i = threadIdx.x; i < 64 * 64; i += 128) {
    auto* value = reinterpret_cast<bf16*>(a) + i;
    *value = __float2bfloat16(2.0f * __bfloat162float(*value));
  }
  for (int i = threadIdx.x; i < 512; i += 128) {
    reinterpret_cast<bf16*>(ones)[i] = __float2bfloat16(1.0f);
  }
  AsyncProxyFence();
  __syncthreads();
  float d[kN / 2] = {}, total[4] = {};
  HoldRegisters(d);
  HoldRegisters(total);
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const std::uint64_t lhs = SwizzledTile(SharedAddress(a) + step * 16 * 128, 64 * 128);
    const std::uint64_t rhs = SwizzledTile(SharedAddress(b) + step * 16 * 128, 64 * 128);
    if constexpr (kN == 64) Wgmma64x64<true, true>(d, lhs, rhs, step > 0);
    if constexpr (kN == 128) Wgmma64x128<true, true>(d, lhs, rhs, step > 0);
    Wgmma64x8<false, true>(total, lhs, SwizzledTile(SharedAddress(ones), 0), step > 0);
  }
  WgmmaCommit();
  WgmmaWait<0>();
  HoldRegisters(d);
  HoldRegisters(total);
  const int lane = threadIdx.x % 32;
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    out[(row + i % 4 / 2 * 8) * kN + i / 4 * 8 + 2 * (lane % 4) + i % 2] = d[i];
  }
  for (int i = 0; i < 4; ++i) totals[(row + i / 2 * 8) * 8 + 2 * (lane % 4) + i % 2] = total[i];
}

class HopperSums : public HopperFacts {
 protected:
  template <int kN>
  void Check() {
    Buffer<bf16> a(64 * 64), b(64 * kN);
    FillSmall(a.host);
    FillSmall(b.host);
    Buffer<float> out(64 * kN), totals(64 * 8);
    const CUtensorMap a_map =
        MakeTensorMap(a.Upload(), {64, 64, 1, 1}, {64, 64 * 64, 64 * 64}, {64, 64, 1, 1});
    const CUtensorMap b_map =
        MakeTensorMap(b.Upload(), {kN, 64, 1, 1}, {kN, 64 * kN, 64 * kN}, {64, 64, 1, 1});
    SumsKernel<kN><<<1, 128, 28 * 1024>>>(a_map, b_map, out.Upload(), totals.Upload());
    out.Download();
    totals.Download();
    for (int m = 0; m < 64; ++m) {
      float total = 0;
      for (int k = 0; k < 64; ++k) total += 2.0f * __bfloat162float(a.host[k * 64 + m]);
      for (int i = 0; i < 8; ++i) ASSERT_EQ(totals.host[m * 8 + i], total) << "row " << m;
      for (int n = 0; n < kN; ++n) {
        float sum = 0;
        for (int k = 0; k < 64; ++k) {
          sum += 2.0f * __bfloat162float(a.host[k * 64 + m]) * __bfloat162float(b.host[k * kN + n]);
        }
        ASSERT_EQ(out.host[m * kN + n], sum) << "row " << m << " column " << n;
      }
    }
  }
};

TEST_F(HopperSums, Sums64) { Check<64>(); }
TEST_F(HopperSums, Sums128) { Check<128>(); }

// A convolution's tap: 8 lines of 8 pixels out of a patch of 10 lines of 10, from any row on; b is
// 64 weights. `kWidth` channels: a row of one of the two swizzles.
template <int kWidth>
__global__ void __launch_bounds__(128)
    PatchKernel(const __grid_constant__ CUtensorMap patch_map,
                const __grid_constant__ CUtensorMap weight_map, int first_row, float* out) {
  constexpr std::uint32_t kRowBytes = kWidth * 2;
  extern __shared__ std::byte dynamic_shared[];
  std::byte* patch = Align1024(dynamic_shared);
  std::byte* weights = patch + 13 * 1024;
  __shared__ std::uint64_t full;
  if (threadIdx.x == 0) {
    BarrierInit(&full, 1);
    BarrierInitFence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    BarrierExpect(&full, (100 + 64) * kRowBytes);
    CopyBox(&patch_map, &full, patch, 0, 0, 0, 0);
    CopyBox(&weight_map, &full, weights, 0, 0, 0, 0);
  }
  BarrierWait(&full, 0);
  float d[32] = {};
  HoldRegisters(d);
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) {
    const std::uint32_t start = SharedAddress(patch) + first_row * kRowBytes + step * 32;
    Wgmma64x64<false>(d, SwizzledRows<kRowBytes>(start, 10),
                      SwizzledRows<kRowBytes>(SharedAddress(weights) + step * 32, 8), step > 0);
  }
  WgmmaCommit();
  WgmmaWait<0>();
  HoldRegisters(d);
  const int lane = threadIdx.x % 32;
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    out[(row + i % 4 / 2 * 8) * 64 + i / 4 * 8 + 2 * (lane % 4) + i % 2] = d[i];
  }
}

class HopperPatches : public HopperFacts {
 protected:
  template <int kWidth>
  void Check() {
    constexpr std::uint64_t kChannels = kWidth;
    Buffer<bf16> patch(100 * kChannels), weights(64 * kChannels);
    FillSmall(patch.host);
    FillSmall(weights.host);
    Buffer<float> out(64 * 64);
    const CUtensorMap patch_map =
        MakeTensorMap(patch.Upload(), {kChannels, 10, 10, 1},
                      {kChannels, 10 * kChannels, 100 * kChannels}, {kWidth, 10, 10, 1});
    const CUtensorMap weight_map =
        MakeTensorMap(weights.Upload(), {kChannels, 64, 1, 1},
                      {kChannels, 64 * kChannels, 64 * kChannels}, {kWidth, 64, 1, 1});
    for (const int first_row : {0, 1, 2, 10, 11, 12, 20, 21, 22}) {
      PatchKernel<kWidth><<<1, 128, 24 * 1024>>>(patch_map, weight_map, first_row, out.Upload());
      out.Download();
      for (int pixel = 0; pixel < 64; ++pixel) {
        const int row = first_row + pixel / 8 * 10 + pixel % 8;
        for (int n = 0; n < 64; ++n) {
          float sum = 0;
          for (int k = 0; k < kWidth; ++k) {
            sum += __bfloat162float(patch.host[row * kChannels + k]) *
                   __bfloat162float(weights.host[n * kChannels + k]);
          }
          ASSERT_EQ(out.host[pixel * 64 + n], sum) << "first row " << first_row;
        }
      }
    }
  }
};

TEST_F(HopperPatches, ChannelsOfAPatch32) { Check<32>(); }
TEST_F(HopperPatches, ChannelsOfAPatch64) { Check<64>(); }

// --- warpgroups ---

constexpr int kTurns = 7;

// Registers move from a producer to two consumers, which then take turns.
__global__ void __launch_bounds__(384, 1) TurnsKernel(int* log) {
  __shared__ int length;
  if (threadIdx.x == 0) length = 0;
  __syncthreads();
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  if (warpgroup == 0) {
    LowerRegisters<24>();
  } else {
    RaiseRegisters<240>();
    const int group = warpgroup - 1;
    if (group == 1) NamedBarrierArrive(1, 256);
    for (int turn = 0; turn < kTurns; ++turn) {
      NamedBarrierSync(1 + group, 256);
      if (threadIdx.x % 128 == 0) log[atomicAdd(&length, 1)] = group;
      NamedBarrierArrive(2 - group, 256);
    }
    if (group == 0) NamedBarrierSync(1, 256);
  }
}

TEST_F(HopperFacts, WarpgroupsTakeTurns) {
  Buffer<int> log(2 * kTurns);
  log.host.assign(log.host.size(), -1);
  TurnsKernel<<<1, 384>>>(log.Upload());
  log.Download();
  for (int i = 0; i < 2 * kTurns; ++i) EXPECT_EQ(log.host[static_cast<std::size_t>(i)], i % 2);
}

}  // namespace
}  // namespace slalom::cuda
