// Block maps in one kernel against those by a library product. Queries and keys are small integers
// and blocks powers of two, so that means and scores are exact and full of ties: the maps must
// agree in every byte.
#include "kernels/cuda/attention/block_map.h"

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/cuda_backend.h"

namespace slalom::cuda {
namespace {

class BlockMaps : public testing::Test {
 protected:
  void SetUp() override {
    if (CudaDeviceCount() == 0) GTEST_SKIP() << "this machine has no CUDA device";
    backend_ = std::make_unique<CudaBackend>(0, BackendOptions{});
  }

  Tensor SmallIntegers(const Shape& shape) {
    const Tensor host = Tensor::Host(shape, DType::kF32);
    for (std::int64_t i = 0; i < host.NumElements(); ++i) {
      host.data<float>()[i] = static_cast<float>(random_() % 3) - 1.0f;
    }
    const Tensor device = backend_->Allocate(shape, DType::kBF16);
    backend_->Copy(host, device);
    return device;
  }

  template <typename T>
  std::vector<T> Download(const Tensor& tensor) {
    const Tensor host = Tensor::Host(tensor.shape(), tensor.dtype());
    backend_->Copy(tensor, host);
    return {host.data<T>(), host.data<T>() + host.NumElements()};
  }

  void Compare(const Shape& shape, const BlockMapOptions& options) {
    const BlockMapArgs args{
        .q = SmallIntegers(shape), .k = SmallIntegers(shape), .options = options};
    const std::int64_t key_blocks = (shape[1] + options.block_k - 1) / options.block_k;
    ASSERT_EQ(ChooseRankWay(shape[3], key_blocks, 9), RankWay::kOwn);
    if (ChooseRankWay(shape[3], key_blocks, backend_->context().compute_major) != RankWay::kOwn) {
      return;
    }
    const BlockMap wanted = MakeBlockMap(backend_->context(), args, RankWay::kLibrary);
    const BlockMap own = MakeBlockMap(backend_->context(), args, RankWay::kOwn);
    const std::string name = ToString(shape) + " topk " + std::to_string(options.topk);
    EXPECT_EQ(Download<std::uint8_t>(own.classes), Download<std::uint8_t>(wanted.classes)) << name;
    EXPECT_EQ(Download<std::int32_t>(own.critical), Download<std::int32_t>(wanted.critical))
        << name;
    EXPECT_EQ(Download<std::int32_t>(own.counts), Download<std::int32_t>(wanted.counts)) << name;
  }

  std::unique_ptr<CudaBackend> backend_;
  std::mt19937 random_{3};
};

TEST_F(BlockMaps, OneKernelOrTwo) {
  const auto options = [](double topk, double negligible, int block_q, int block_k) {
    return BlockMapOptions{BlockMapKind::kTopK, topk, negligible, block_q, block_k};
  };
  // From one block to more than registers hold.
  for (const std::int64_t blocks : {1, 5, 16, 17, 128, 129, 400, 600, 1300}) {
    Compare({1, blocks * 16, 2, 64}, options(0.1, 0.1, 16, 16));
  }
  Compare({2, 64 * 40 + 32, 3, 128}, options(0.05, 0.1, 128, 64));
  Compare({2, 64 * 40 + 32, 3, 128}, options(0.001, 0.0, 64, 64));
  Compare({1, 64 * 33, 2, 20}, options(0.3, 0.5, 64, 64));
  Compare({1, 64 * 33, 2, 128}, options(1.0, 0.5, 64, 64));
}

TEST(ChooseRankWay, TakesOneKernelWhileScoresFit) {
  EXPECT_EQ(ChooseRankWay(128, 512, 9), RankWay::kOwn);
  EXPECT_EQ(ChooseRankWay(128, 1182, 9), RankWay::kOwn);
  EXPECT_EQ(ChooseRankWay(128, 4000, 9), RankWay::kLibrary);
  EXPECT_EQ(ChooseRankWay(128, 1182, 8), RankWay::kLibrary);
  EXPECT_EQ(ChooseRankWay(7, 64, 9), RankWay::kLibrary);
}

}  // namespace
}  // namespace slalom::cuda
