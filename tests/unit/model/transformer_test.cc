#include "model/transformer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "kernels/core/random.h"
#include "model/config.h"
#include "tests/unit/model/expect_error.h"
#include "tests/unit/model/temp_folder.h"
#include "tests/unit/model/tiny_model.h"
#include "tests/unit/model/transformer_reference.h"

namespace slalom {
namespace {

Tensor Random(const Shape& shape, std::uint64_t stream) {
  Tensor tensor = Tensor::Host(shape, DType::kF32);
  FillNormal(5, stream, 0, {tensor.data<float>(), static_cast<std::size_t>(tensor.NumElements())});
  return tensor;
}

std::vector<double> Doubles(const Tensor& tensor) {
  return {tensor.data<float>(), tensor.data<float>() + tensor.NumElements()};
}

// The largest difference, relative to the largest value.
double RelativeError(const float* values, const std::vector<double>& expected) {
  double error = 0;
  double size = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    error = std::max(error, std::abs(values[i] - expected[i]));
    size = std::max(size, std::abs(expected[i]));
  }
  return error / size;
}

class TransformerTest : public testing::TestWithParam<int> {
 protected:
  TransformerTest() {
    TinyModelOptions options;
    options.head_dim = GetParam();
    WriteTinyModel(folder_.path(), options);
    config_ = LoadTransformerConfig(folder_ / "transformer/config.json");
  }
  Weights Open() const { return Weights::Open(folder_ / "transformer", "diffusion_pytorch_model"); }

  TempFolder folder_;
  TransformerConfig config_;
  std::unique_ptr<Backend> backend_ = MakeBackend(Device{}, {});
};

// Odd grids, two samples with their own texts and times, one text longer than nothing and one that
// fills every row.
TEST_P(TransformerTest, AgreesWithTheReference) {
  const Transformer transformer(*backend_, Open(), config_, {}, DType::kF32);
  const Tensor latent = Random({2, 16, 3, 6, 10}, 1);
  const std::vector<float> timesteps = {999.0f, 437.0f};
  const std::vector<Tensor> embeddings = {Random({5, config_.text_dim}, 2),
                                          Random({config_.text_len, config_.text_dim}, 3)};
  const TextContext first = transformer.PrepareText(*backend_, embeddings[0]);
  const TextContext second = transformer.PrepareText(*backend_, embeddings[1]);
  const std::vector<const TextContext*> texts = {&first, &second};
  const TokenGrid grid = transformer.GridOf(latent);
  ASSERT_EQ(grid.size(), 3 * 3 * 5);
  const RopeTables rope = MakeRopeTables(*backend_, grid, config_.attention_head_dim, 1024);
  const AttentionSetting dense = transformer.Setting(AttentionKind::kDense);
  Tensor velocity = Tensor::Host(latent.shape(), DType::kF32);
  transformer.Forward(*backend_, {.latent = latent,
                                  .timesteps = Tensor::FromFloats({2}, timesteps),
                                  .text = texts,
                                  .rope = &rope,
                                  .attention = &dense,
                                  .velocity = velocity});
  for (int b = 0; b < 2; ++b) {
    const std::vector<double> expected = ReferenceTransformer(
        Open(), config_, Doubles(latent.Slice(b, b + 1)), 3, 6, 10,
        timesteps[static_cast<std::size_t>(b)], Doubles(embeddings[static_cast<std::size_t>(b)]));
    EXPECT_LT(RelativeError(velocity.Slice(b, b + 1).data<float>(), expected), 1e-5) << b;
  }
}

// Dense attention does not care in which order tokens stand; sparse attention sees other blocks.
TEST_P(TransformerTest, TilesReorderWhatBlocksSeeAndNothingElse) {
  const Transformer transformer(*backend_, Open(), config_,
                                {UntrainedAdapter(AttentionKind::kSla, config_)}, DType::kF32);
  const Tensor latent = Random({2, 16, 3, 8, 12}, 1);
  const TextContext text = transformer.PrepareText(*backend_, Random({5, config_.text_dim}, 2));
  const std::vector<const TextContext*> texts = {&text, &text};
  const auto run = [&](const AttentionSetting& attention) {
    const RopeTables rope = MakeRopeTables(*backend_, transformer.GridOf(latent),
                                           config_.attention_head_dim, 1024, attention.tile);
    Tensor velocity = Tensor::Host(latent.shape(), DType::kF32);
    transformer.Forward(*backend_, {.latent = latent,
                                    .timesteps = Tensor::FromFloats({2}, std::vector{700.f, 20.f}),
                                    .text = texts,
                                    .rope = &rope,
                                    .attention = &attention,
                                    .velocity = velocity});
    return velocity;
  };
  const std::vector<double> dense = Doubles(run(transformer.Setting(AttentionKind::kDense)));
  AttentionSetting attention = transformer.Setting(AttentionKind::kSla, 1.0);
  attention.map.block_q = attention.map.block_k = 16;
  attention.tile = {.frames = 2, .rows = 3, .columns = 4};
  EXPECT_LT(RelativeError(run(attention).data<float>(), dense), 1e-5);

  attention.map.topk = 0.3;
  const std::vector<double> tiled = Doubles(run(attention));
  attention.tile = {};
  EXPECT_GT(RelativeError(run(attention).data<float>(), tiled), 1e-4);
}

TEST_P(TransformerTest, RefusesWhatDoesNotFit) {
  const Transformer transformer(*backend_, Open(), config_, {}, DType::kF32);
  ExpectError(ErrorCode::kFailedPrecondition, {"adapter"},
              [&] { transformer.Setting(AttentionKind::kSla); });
  ExpectError(ErrorCode::kInternal, {"embeddings"}, [&] {
    transformer.PrepareText(*backend_, Random({config_.text_len + 1, config_.text_dim}, 1));
  });
  ExpectError(ErrorCode::kInvalidArgument, {"7 token positions"},
              [&] { MakeRopeTables(*backend_, {.frames = 1, .height = 2, .width = 8}, 32, 7); });
  TransformerConfig wider = config_;
  wider.ffn_dim += 1;
  ExpectError(ErrorCode::kInvalidArgument, {"blocks.0.ffn", "expected"},
              [&] { Transformer(*backend_, Open(), wider, {}, DType::kF32); });
}

// 32 leaves 5 pairs to rows and columns each and 6 to frames; 128 is Wan's own size.
INSTANTIATE_TEST_SUITE_P(HeadSizes, TransformerTest, testing::Values(32, 128));

}  // namespace
}  // namespace slalom
