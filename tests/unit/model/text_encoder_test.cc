#include "model/text_encoder.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/random.h"
#include "model/safetensors_writer.h"
#include "tests/unit/model/expect_error.h"
#include "tests/unit/model/temp_folder.h"

namespace slalom {
namespace {

using Matrix = std::vector<double>;  // row-major
using TensorMap = std::map<std::string, Tensor>;

TextEncoderConfig TinyConfig() {
  TextEncoderConfig config;
  config.vocab_size = 61;
  config.d_model = 24;
  config.d_kv = 8;
  config.num_heads = 3;
  config.d_ff = 40;
  config.num_layers = 3;
  return config;
}

TensorMap RandomWeights(const TextEncoderConfig& config) {
  TensorMap tensors;
  std::uint64_t stream = 0;
  const auto add = [&](const std::string& name, const Shape& shape, float mean, float deviation) {
    Tensor tensor = Tensor::Host(shape, DType::kF32);
    const std::span<float> values(tensor.data<float>(),
                                  static_cast<std::size_t>(tensor.NumElements()));
    FillNormal(3, stream++, 0, values);
    for (float& value : values) value = mean + deviation * value;
    tensors.emplace(name, tensor);
  };
  const int d = config.d_model;
  const int inner = config.num_heads * config.d_kv;
  add("shared.weight", {config.vocab_size, d}, 0, 1);
  add("encoder.final_layer_norm.weight", {d}, 1, 0.3f);
  for (int i = 0; i < config.num_layers; ++i) {
    const std::string block = "encoder.block." + std::to_string(i) + ".layer.";
    add(block + "0.layer_norm.weight", {d}, 1, 0.3f);
    add(block + "1.layer_norm.weight", {d}, 1, 0.3f);
    // Scores are not scaled, so q and k are small to keep the softmax from being one-hot.
    for (const char* name : {"q", "k"}) {
      add(block + "0.SelfAttention." + name + ".weight", {inner, d}, 0, 0.12f);
    }
    add(block + "0.SelfAttention.v.weight", {inner, d}, 0, 0.3f);
    add(block + "0.SelfAttention.o.weight", {d, inner}, 0, 0.3f);
    add(block + "0.SelfAttention.relative_attention_bias.weight",
        {config.relative_attention_num_buckets, config.num_heads}, 0, 1);
    add(block + "1.DenseReluDense.wi_0.weight", {config.d_ff, d}, 0, 0.3f);
    add(block + "1.DenseReluDense.wi_1.weight", {config.d_ff, d}, 0, 0.3f);
    add(block + "1.DenseReluDense.wo.weight", {d, config.d_ff}, 0, 0.3f);
  }
  return tensors;
}

// UMT5's encoder as its paper's and transformers' formulas say it, in doubles, with loops. `round`
// is applied to every weight and to what every operation stores: the identity gives the exact
// result, rounding to bf16 gives that of a plain bf16 implementation.
class Reference {
 public:
  Reference(const TextEncoderConfig& config, const TensorMap& tensors,
            std::function<double(double)> round)
      : config_(config), tensors_(tensors), round_(std::move(round)) {}

  Matrix Forward(const std::vector<std::int32_t>& ids) const {
    const int d = config_.d_model;
    const Matrix table = Load("shared.weight");
    Matrix x;
    for (std::int32_t id : ids) x.insert(x.end(), &table[id * d], &table[id * d] + d);
    for (int i = 0; i < config_.num_layers; ++i) {
      const std::string block = "encoder.block." + std::to_string(i) + ".layer.";
      Add(x, Attention(RmsNorm(x, block + "0.layer_norm.weight"), block + "0.SelfAttention."));
      Add(x, FeedForward(RmsNorm(x, block + "1.layer_norm.weight"), block + "1.DenseReluDense."));
    }
    return RmsNorm(x, "encoder.final_layer_norm.weight");
  }

 private:
  // The integer form of the bucket function for 32 buckets up to distance 128, by its edges.
  static int Bucket(int relative) {
    const int distance = std::abs(relative);
    int bucket = distance;
    if (distance >= 8) {
      const std::vector<int> edges = {8, 12, 16, 23, 32, 46, 64, 91};
      bucket = 7 + static_cast<int>(std::ranges::upper_bound(edges, distance) - edges.begin());
    }
    return bucket + (relative > 0 ? 16 : 0);
  }

  Matrix Load(const std::string& name) const {
    const Tensor& tensor = tensors_.at(name);
    Matrix values(tensor.data<float>(), tensor.data<float>() + tensor.NumElements());
    for (double& value : values) value = round_(value);
    return values;
  }

  Matrix Linear(const Matrix& x, int in, const std::string& name) const {
    const Matrix w = Load(name);
    const int out = static_cast<int>(w.size()) / in;
    Matrix y;
    for (std::size_t row = 0; row < x.size() / in; ++row) {
      for (int o = 0; o < out; ++o) {
        double sum = 0;
        for (int i = 0; i < in; ++i) sum += x[row * in + i] * w[o * in + i];
        y.push_back(round_(sum));
      }
    }
    return y;
  }

  Matrix RmsNorm(const Matrix& x, const std::string& name) const {
    const int d = config_.d_model;
    const Matrix w = Load(name);
    Matrix y(x.size());
    for (std::size_t row = 0; row < x.size() / d; ++row) {
      double squares = 0;
      for (int i = 0; i < d; ++i) squares += x[row * d + i] * x[row * d + i];
      const double factor = 1 / std::sqrt(squares / d + config_.layer_norm_epsilon);
      for (int i = 0; i < d; ++i) y[row * d + i] = round_(round_(x[row * d + i] * factor) * w[i]);
    }
    return y;
  }

  Matrix Attention(const Matrix& x, const std::string& name) const {
    const int heads = config_.num_heads;
    const int dim = config_.d_kv;
    const int inner = heads * dim;
    const int n = static_cast<int>(x.size()) / config_.d_model;
    const Matrix q = Linear(x, config_.d_model, name + "q.weight");
    const Matrix k = Linear(x, config_.d_model, name + "k.weight");
    const Matrix v = Linear(x, config_.d_model, name + "v.weight");
    const Matrix bias = Load(name + "relative_attention_bias.weight");
    Matrix out(static_cast<std::size_t>(n) * inner);
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < n; ++i) {
        Matrix p(n);
        double total = 0;
        for (int j = 0; j < n; ++j) {
          double score = 0;
          for (int c = 0; c < dim; ++c) {
            score += q[i * inner + h * dim + c] * k[j * inner + h * dim + c];
          }
          p[j] = std::exp(round_(round_(score) + bias[Bucket(j - i) * heads + h]));
          total += p[j];
        }
        for (int c = 0; c < dim; ++c) {
          double sum = 0;
          for (int j = 0; j < n; ++j) sum += round_(p[j] / total) * v[j * inner + h * dim + c];
          out[i * inner + h * dim + c] = round_(sum);
        }
      }
    }
    return Linear(out, inner, name + "o.weight");
  }

  Matrix FeedForward(const Matrix& x, const std::string& name) const {
    const Matrix gate = Linear(x, config_.d_model, name + "wi_0.weight");
    Matrix hidden = Linear(x, config_.d_model, name + "wi_1.weight");
    for (std::size_t i = 0; i < hidden.size(); ++i) {
      const double g = gate[i];
      const double inner = std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g);
      hidden[i] = round_(round_(0.5 * g * (1 + std::tanh(inner))) * hidden[i]);
    }
    return Linear(hidden, config_.d_ff, name + "wo.weight");
  }

  void Add(Matrix& x, const Matrix& y) const {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = round_(x[i] + y[i]);
  }

  const TextEncoderConfig& config_;
  const TensorMap& tensors_;
  std::function<double(double)> round_;
};

double Exact(double value) { return value; }
double ToBFloat16(double value) {
  return static_cast<double>(static_cast<float>(BFloat16(static_cast<float>(value))));
}

Matrix Values(const Tensor& tensor) {
  Matrix values;
  for (std::int64_t i = 0; i < tensor.NumElements(); ++i) {
    values.push_back(tensor.dtype() == DType::kF32
                         ? static_cast<double>(tensor.data<float>()[i])
                         : static_cast<double>(static_cast<float>(tensor.data<BFloat16>()[i])));
  }
  return values;
}

// The worst element's error over the largest value; a NaN never passes.
double Error(const Matrix& actual, const Matrix& expected) {
  EXPECT_EQ(actual.size(), expected.size());
  double worst = 0;
  double largest = 0;
  for (std::size_t i = 0; i < std::min(actual.size(), expected.size()); ++i) {
    if (std::isnan(actual[i])) return INFINITY;
    worst = std::max(worst, std::abs(actual[i] - expected[i]));
    largest = std::max(largest, std::abs(expected[i]));
  }
  return worst / largest;
}

std::vector<std::int32_t> SomeIds(int n, int vocab_size) {
  std::vector<std::int32_t> ids;
  for (int i = 0; i < n; ++i) {
    ids.push_back(static_cast<std::int32_t>(Philox4x32(5, 1, static_cast<std::uint64_t>(i))[0] %
                                            static_cast<std::uint32_t>(vocab_size)));
  }
  return ids;
}

class TextEncoderTest : public testing::Test {
 protected:
  TextEncoderTest() : config_(TinyConfig()), tensors_(RandomWeights(config_)) {
    backend_ = MakeBackend(Device{}, {.cpu_threads = 1});
  }

  Weights Open(const TensorMap& tensors) const {
    WriteSafetensors(folder_ / "model.safetensors", tensors);
    return Weights::Open(folder_.path(), "model");
  }

  Matrix Run(DType dtype, const std::vector<std::int32_t>& ids) const {
    const TextEncoder encoder(*backend_, Open(tensors_), config_, dtype);
    const Tensor out = encoder.Forward(*backend_, ids);
    EXPECT_EQ(out.dtype(), dtype);
    EXPECT_EQ(out.shape(), (Shape{static_cast<std::int64_t>(ids.size()), config_.d_model}));
    return Values(out);
  }

  TempFolder folder_;
  TextEncoderConfig config_;
  TensorMap tensors_;
  std::unique_ptr<Backend> backend_;
};

// 200 tokens reach every bucket of the relative positions.
TEST_F(TextEncoderTest, AgreesWithTheReferenceInF32) {
  for (int n : {1, 2, 17, 200}) {
    const auto ids = SomeIds(n, config_.vocab_size);
    const Matrix expected = Reference(config_, tensors_, Exact).Forward(ids);
    EXPECT_LT(Error(Run(DType::kF32, ids), expected), 1e-5) << n << " tokens";
  }
}

// The error rule: at most twice the error of a plain bf16 implementation.
TEST_F(TextEncoderTest, IsAccurateInBf16) {
  for (int n : {3, 64, 200}) {
    const auto ids = SomeIds(n, config_.vocab_size);
    const Matrix expected = Reference(config_, tensors_, Exact).Forward(ids);
    const double plain = Error(Reference(config_, tensors_, ToBFloat16).Forward(ids), expected);
    const double ours = Error(Run(DType::kBF16, ids), expected);
    EXPECT_GT(plain, 1e-3) << n << " tokens";
    EXPECT_LE(ours, 2 * plain) << n << " tokens";
  }
}

// The tests above would not notice a part that has no effect on their result.
TEST_F(TextEncoderTest, EveryTensorMatters) {
  const auto ids = SomeIds(40, config_.vocab_size);
  const Matrix base = Run(DType::kF32, ids);
  for (auto& [name, tensor] : tensors_) {
    Tensor changed = Tensor::Host(tensor.shape(), DType::kF32);
    std::transform(tensor.data<float>(), tensor.data<float>() + tensor.NumElements(),
                   changed.data<float>(), [](float value) { return 0.5f * value; });
    std::swap(tensor, changed);
    EXPECT_GT(Error(Run(DType::kF32, ids), base), 1e-3) << name;
    std::swap(tensor, changed);
  }
}

TEST_F(TextEncoderTest, ReadsTheTiedEmbeddingUnderItsOtherName) {
  const auto ids = SomeIds(5, config_.vocab_size);
  const Matrix base = Run(DType::kF32, ids);
  auto table = tensors_.extract("shared.weight");
  table.key() = "encoder.embed_tokens.weight";
  tensors_.insert(std::move(table));
  EXPECT_EQ(Run(DType::kF32, ids), base);
}

TEST_F(TextEncoderTest, RefusesIdsOutsideTheVocabulary) {
  const TextEncoder encoder(*backend_, Open(tensors_), config_, DType::kF32);
  for (const auto& ids : std::vector<std::vector<std::int32_t>>{{}, {0, -1}, {1, 61}}) {
    ExpectError(ErrorCode::kInvalidArgument, {}, [&] { encoder.Forward(*backend_, ids); });
  }
}

TEST_F(TextEncoderTest, RefusesWeightsThatDoNotFit) {
  const std::string table = "encoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight";
  for (const std::string& name :
       {std::string("shared.weight"),
        std::string("encoder.block.1.layer.1.DenseReluDense.wi_1.weight"), table}) {
    TensorMap missing = tensors_;
    missing.erase(name);
    EXPECT_THROW(TextEncoder(*backend_, Open(missing), config_, DType::kF32), slalom::Error);
    TensorMap wrong = tensors_;
    wrong[name] = Tensor::FromFloats({2, 2}, std::vector<float>{1, 2, 3, 4});
    ExpectError(ErrorCode::kInvalidArgument, {name, "[2, 2]"},
                [&] { TextEncoder(*backend_, Open(wrong), config_, DType::kF32); });
  }
}

}  // namespace
}  // namespace slalom
