// What only the CPU back end promises: the same bits for any number of threads, and time that falls
// with sparsity.
#include "kernels/cpu/cpu_backend.h"

#include <gtest/gtest.h>

#include <ctime>
#include <vector>

#include "kernels/core/error.h"
#include "kernels/core/random.h"
#include "tests/unit/kernels/device_test.h"

namespace slalom {
namespace {

Tensor Noise(Backend& backend, const Shape& shape, DType type, std::uint64_t stream) {
  std::vector<float> values(static_cast<std::size_t>(shape.NumElements()));
  FillNormal(11, stream, 0, values);
  Tensor out = backend.Allocate(shape, type);
  backend.Copy(Tensor::FromFloats(shape, values), out);
  return out;
}

// A linear layer, attention of three kinds and a convolution, one behind the other.
std::vector<std::uint8_t> RunSome(int threads, DType type) {
  const auto backend = MakeBackend(Device{}, {.cpu_threads = threads});
  std::vector<std::uint8_t> bytes;
  const auto keep = [&](const Tensor& x) {
    const auto more = HostBytes(x);
    bytes.insert(bytes.end(), more.begin(), more.end());
  };
  const Shape heads{1, 300, 2, 64};
  const Tensor x = Noise(*backend, Shape{300, 1000}, type, 1);
  const Tensor q = backend->Allocate(heads, type);
  backend->Linear({.x = x, .weight = Noise(*backend, Shape{128, 1000}, type, 2), .out = q});
  keep(q);
  const Tensor k = Noise(*backend, heads, type, 3);
  const Tensor v = Noise(*backend, heads, type, 4);
  const Tensor out = backend->Allocate(heads, type);
  backend->Attention({.q = q, .k = k, .v = v, .scale = 0.125f, .out = out});
  keep(out);
  const BlockMap map =
      backend->MakeBlockMap({.q = q, .k = k, .options = {BlockMapKind::kTopK, 0.3, 0.2, 64, 32}});
  keep(map.classes);
  for (const LinearScope scope :
       {LinearScope::kMarginal, LinearScope::kNonCritical, LinearScope::kAll}) {
    backend->SlaAttention({.q = q,
                           .k = k,
                           .v = v,
                           .map = &map,
                           .scope = scope,
                           .proj_weight = Noise(*backend, Shape{64, 64}, DType::kF32, 5),
                           .proj_bias = Noise(*backend, Shape{64}, DType::kF32, 6),
                           .out = out});
    keep(out);
  }
  const Tensor frames = backend->Allocate(Shape{3, 9, 11, 32}, type);
  backend->Conv({.x = Noise(*backend, Shape{3, 9, 11, 16}, type, 7),
                 .weight = Noise(*backend, Shape{32, 3, 3, 3, 16}, type, 8),
                 .out = frames});
  keep(frames);
  return bytes;
}

TEST(CpuBackend, BitsDoNotDependOnThreads) {
  for (const DType type : {DType::kF32, DType::kBF16}) {
    const auto one = RunSome(1, type);
    for (const int threads : {2, 3, 8}) {
      EXPECT_TRUE(RunSome(threads, type) == one) << threads << " threads, " << DTypeName(type);
    }
  }
}

TEST(CpuBackend, NeedsAvx2) {
  CpuFeatures old;
  old.name = "an old processor";
  try {
    const CpuBackend backend({}, old);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kFailedPrecondition);
    EXPECT_NE(std::string(error.what()).find("an old processor"), std::string::npos);
  }
}

TEST(CpuBackend, ForceF32) {
  EXPECT_EQ(MakeBackend(Device{}, {.force_f32 = true})->preferred_dtype(), DType::kF32);
}

TEST(CpuBackend, TensorsOutliveTheBackend) {
  Tensor kept;
  {
    const auto backend = MakeBackend(Device{});
    kept = backend->Allocate(Shape{1000}, DType::kF32);
    backend->Zero(kept);
  }
  EXPECT_EQ(kept.data<float>()[999], 0.0f);
}

// Processor time of this thread: a busy machine does not change it much.
double ThreadSeconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Skipped blocks cost nothing: at 5 % of the blocks SLA with its map and its linear branch takes
// less than a third of dense attention's time (a seventh was measured; the rest is room).
TEST(CpuBackend, TimeFallsWithSparsity) {
  const auto backend = MakeBackend(Device{}, {.cpu_threads = 1});
  const Shape shape{1, 4096, 1, 128};
  const Tensor q = Noise(*backend, shape, DType::kF32, 1);
  const Tensor k = Noise(*backend, shape, DType::kF32, 2);
  const Tensor v = Noise(*backend, shape, DType::kF32, 3);
  const Tensor weight = Noise(*backend, Shape{128, 128}, DType::kF32, 4);
  const Tensor bias = Noise(*backend, Shape{128}, DType::kF32, 5);
  const Tensor out = backend->Allocate(shape, DType::kF32);
  const auto best_of_three = [](const auto& run) {
    double best = 1e9;
    for (int i = 0; i < 4; ++i) {
      const double start = ThreadSeconds();
      run();
      if (i > 0) best = std::min(best, ThreadSeconds() - start);  // the first warms the caches
    }
    return best;
  };
  const double dense = best_of_three(
      [&] { backend->Attention({.q = q, .k = k, .v = v, .scale = 0.1f, .out = out}); });
  const double sparse = best_of_three([&] {
    const BlockMap map = backend->MakeBlockMap(
        {.q = q, .k = k, .options = {BlockMapKind::kTopK, 0.05, 0.1, 64, 64}});
    backend->SlaAttention({.q = q,
                           .k = k,
                           .v = v,
                           .map = &map,
                           .proj_weight = weight,
                           .proj_bias = bias,
                           .out = out});
  });
  EXPECT_LT(3 * sparse, dense) << "sparse " << sparse << " s, dense " << dense << " s";
}

}  // namespace
}  // namespace slalom
