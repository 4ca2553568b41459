#include "model/adapter.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/random.h"
#include "model/safetensors_writer.h"
#include "tests/unit/model/expect_error.h"
#include "tests/unit/model/temp_folder.h"

namespace slalom {
namespace {

using TensorMap = std::map<std::string, Tensor>;

TransformerConfig TinyConfig() {
  TransformerConfig config;
  config.num_attention_heads = 2;
  config.attention_head_dim = 8;
  config.num_layers = 3;
  return config;
}

Tensor Random(const Shape& shape, std::uint64_t stream) {
  Tensor tensor = Tensor::Host(shape, DType::kF32);
  FillNormal(9, stream, 0, {tensor.data<float>(), static_cast<std::size_t>(tensor.NumElements())});
  return tensor;
}

// One spelling of the SLA branch: what stands between "blocks.N." and ".weight".
TensorMap SlaTensors(const std::string& spelling, const std::vector<int>& layers) {
  TensorMap tensors;
  for (int i : layers) {
    const std::string name = "blocks." + std::to_string(i) + "." + spelling;
    tensors[name + ".weight"] = Random({8, 8}, static_cast<std::uint64_t>(2 * i));
    tensors[name + ".bias"] = Random({8}, static_cast<std::uint64_t>(2 * i + 1));
  }
  return tensors;
}

TensorMap SaladTensors(const std::vector<int>& layers) {
  TensorMap tensors;
  for (int i : layers) {
    const std::string name = "blocks." + std::to_string(i) + ".attn1.salad.";
    tensors[name + "proj.weight"] = Random({16, 16}, 0);
    tensors[name + "proj.bias"] = Random({16}, 1);
    tensors[name + "gate.weight"] = Random({1, 16}, 2);
    tensors[name + "gate.bias"] = Random({1}, 3);
  }
  return tensors;
}

constexpr char kOurs[] = "attn1.sla.proj_l";

class AdapterTest : public testing::Test {
 protected:
  AttentionAdapter Load(const TensorMap& tensors, const std::string& description) const {
    WriteSafetensors(path_, tensors, {{"slalom.attention", description}});
    return LoadAdapter(path_, TinyConfig());
  }
  void ExpectInvalid(const std::string& description, std::initializer_list<std::string> words) {
    SCOPED_TRACE(description);
    ExpectError(ErrorCode::kInvalidArgument, words, [&] {
      Load(SlaTensors(kOurs, {0, 1, 2}), description);
    });
  }

  TempFolder folder_;
  std::string path_ = folder_ / "adapter.safetensors";
};

TEST_F(AdapterTest, ReadsSlaInAllThreeSpellings) {
  for (const char* spelling :
       {kOurs, "self_attn.attn_op.local_attn.proj_l", "attn1.attn_impl.proj_l"}) {
    SCOPED_TRACE(spelling);
    const AttentionAdapter adapter = Load(SlaTensors(spelling, {0, 1, 2}), R"({"kind": "sla"})");
    EXPECT_EQ(adapter.kind, AttentionKind::kSla);
    EXPECT_TRUE(adapter.trained);
    ASSERT_EQ(adapter.layers.size(), 3u);
    EXPECT_EQ(adapter.layers[2].proj_weight.data<float>()[5], Random({8, 8}, 4).data<float>()[5]);
    EXPECT_EQ(adapter.layers[2].proj_bias.data<float>()[5], Random({8}, 5).data<float>()[5]);
    EXPECT_FALSE(adapter.layers[2].gate_weight.defined());
  }
}

TEST_F(AdapterTest, PaperDefaults) {
  const AttentionAdapter sla = Load(SlaTensors(kOurs, {0, 1, 2}), R"({"kind": "sla"})");
  EXPECT_EQ(sla.map.topk, 0.05);
  EXPECT_EQ(sla.map.negligible, 0.1);
  EXPECT_EQ(sla.map.block_q, 64);
  EXPECT_EQ(sla.map.block_k, 64);
  EXPECT_EQ(sla.scope, LinearScope::kMarginal);
  EXPECT_EQ(sla.feature_map, FeatureMap::kSoftmax);
  EXPECT_DOUBLE_EQ(sla.NominalSparsity(), 0.95);
  EXPECT_DOUBLE_EQ(sla.NominalSparsity(0.2), 0.8);
  const AttentionAdapter salad = Load(SaladTensors({0, 1, 2}), R"({"kind": "salad"})");
  EXPECT_EQ(salad.map.topk, 0.1);
  EXPECT_EQ(salad.map.negligible, 0.0);
  EXPECT_EQ(salad.gate, SaladGate::kToken);
}

TEST_F(AdapterTest, ReadsEverySetting) {
  const AttentionAdapter adapter = Load(SaladTensors({1}), R"({"kind": "salad", "topk": 0.25,
      "negligible": 0.5, "scope": "all", "feature_map": "elu", "block_q": 128, "block_k": 32,
      "map": "window", "gate": "sample", "dropped_layers": [2, 0, 2]})");
  EXPECT_EQ(adapter.kind, AttentionKind::kSalad);
  EXPECT_EQ(adapter.map.kind, BlockMapKind::kWindow);
  EXPECT_EQ(adapter.map.topk, 0.25);
  EXPECT_EQ(adapter.map.negligible, 0.5);
  EXPECT_EQ(adapter.map.block_q, 128);
  EXPECT_EQ(adapter.map.block_k, 32);
  EXPECT_EQ(adapter.scope, LinearScope::kAll);
  EXPECT_EQ(adapter.feature_map, FeatureMap::kElu);
  EXPECT_EQ(adapter.gate, SaladGate::kSample);
  EXPECT_EQ(adapter.dropped_layers, (std::vector<int>{0, 2}));
  EXPECT_FALSE(adapter.layers[0].proj_weight.defined());
  EXPECT_TRUE(adapter.layers[1].proj_weight.defined());
  EXPECT_TRUE(adapter.layers[1].gate_bias.defined());
  EXPECT_FALSE(adapter.layers[2].proj_weight.defined());
}

TEST_F(AdapterTest, ReadsTheOrderOfTokens) {
  EXPECT_TRUE(Load(SlaTensors(kOurs, {0, 1, 2}), R"({"kind": "sla"})").tile.raster());
  const AttentionAdapter tiled =
      Load(SlaTensors(kOurs, {0, 1, 2}), R"({"kind": "sla", "tile": [4, 2, 8]})");
  EXPECT_EQ(tiled.tile, (TokenTile{.frames = 4, .rows = 2, .columns = 8}));
  ExpectInvalid(R"({"kind": "sla", "tile": [4, 4]})", {"tile", "columns"});
  ExpectInvalid(R"({"kind": "sla", "tile": [4, 4, 0]})", {"tile"});
  ExpectInvalid(R"({"kind": "sla", "tile": [4, 4, 4], "map": "window"})", {"tile", "windows"});
}

TEST_F(AdapterTest, LayersMayHaveTheirOwnTopK) {
  EXPECT_TRUE(Load(SlaTensors(kOurs, {0, 1, 2}), R"({"kind": "sla"})").layer_topk.empty());
  const AttentionAdapter adapter =
      Load(SlaTensors(kOurs, {0, 1, 2}),
           R"({"kind": "sla", "topk": 0.2, "layer_topk": [0.1, 0.3, 0.2]})");
  EXPECT_EQ(adapter.layer_topk, (std::vector<double>{0.1, 0.3, 0.2}));
  EXPECT_DOUBLE_EQ(adapter.NominalSparsity(), 0.8);
  ExpectInvalid(R"({"kind": "sla", "topk": 0.2, "layer_topk": [0.1, 0.3]})",
                {"2 values", "3 layers"});
  ExpectInvalid(R"({"kind": "sla", "topk": 0.2, "layer_topk": [0.0, 0.4, 0.2]})", {"layer_topk"});
  ExpectInvalid(R"({"kind": "sla", "topk": 0.3, "layer_topk": [0.1, 0.3, 0.2]})", {"mean"});
  ExpectInvalid(R"({"kind": "sla", "layer_topk": ["a", 0.3, 0.2]})", {"numbers"});
}

TEST_F(AdapterTest, RefusesBadDescriptions) {
  ExpectInvalid("{}", {"kind", "missing"});
  ExpectInvalid(R"({"kind": "vsa"})", {"kind", "vsa", "sla, salad"});
  ExpectInvalid(R"({"kind": 1})", {"kind"});
  ExpectInvalid(R"({"kind": "sla", "top_k": 0.1})", {"'top_k'"});
  ExpectInvalid(R"({"kind": "sla", "topk": 0})", {"topk"});
  ExpectInvalid(R"({"kind": "sla", "topk": 1.5})", {"topk", "1.5"});
  ExpectInvalid(R"({"kind": "sla", "negligible": 1})", {"negligible"});
  ExpectInvalid(R"({"kind": "sla", "scope": "most"})", {"scope", "most"});
  ExpectInvalid(R"({"kind": "sla", "block_q": 65})", {"block_q", "65"});
  ExpectInvalid(R"({"kind": "sla", "block_k": 1024})", {"block_k", "1024"});
  ExpectInvalid(R"({"kind": "sla", "dropped_layers": [3]})", {"dropped_layers", "3"});
  ExpectInvalid(R"({"kind": "sla", "dropped_layers": 1})", {"dropped_layers"});
  ExpectError(ErrorCode::kDataLoss, {path_, "slalom.attention"}, [&] {
    Load(SlaTensors(kOurs, {0, 1, 2}), "{\"kind\"");
  });
  WriteSafetensors(path_, SlaTensors(kOurs, {0, 1, 2}));
  ExpectError(ErrorCode::kInvalidArgument, {path_, "not an adapter"},
              [&] { LoadAdapter(path_, TinyConfig()); });
}

TEST_F(AdapterTest, RefusesTensorsThatDoNotFit) {
  const std::string sla = R"({"kind": "sla"})";
  ExpectError(ErrorCode::kNotFound, {"blocks.1.attn1.sla.proj_l.weight", "dropped_layers"}, [&] {
    Load(SlaTensors(kOurs, {0, 2}), sla);
  });
  TensorMap tensors = SlaTensors(kOurs, {0, 1, 2});
  tensors["blocks.0.attn1.sla.proj_l.bias"] = Random({9}, 0);
  ExpectError(ErrorCode::kInvalidArgument, {"proj_l.bias", "[9]", "[8]"},
              [&] { Load(tensors, sla); });
  tensors = SlaTensors(kOurs, {0, 1, 2, 3});
  ExpectError(ErrorCode::kInvalidArgument, {"blocks.3", "no place"}, [&] { Load(tensors, sla); });
  ExpectError(ErrorCode::kNotFound, {"salad"}, [&] {
    Load(SlaTensors(kOurs, {0, 1, 2}), R"({"kind": "salad"})");
  });
}

TEST_F(AdapterTest, UntrainedOnesAreZero) {
  const AttentionAdapter sla = UntrainedAdapter(AttentionKind::kSla, TinyConfig());
  const AttentionAdapter salad = UntrainedAdapter(AttentionKind::kSalad, TinyConfig());
  EXPECT_FALSE(sla.trained);
  ASSERT_EQ(sla.layers.size(), 3u);
  EXPECT_EQ(sla.layers[2].proj_weight.shape(), (Shape{8, 8}));
  EXPECT_EQ(salad.layers[0].proj_weight.shape(), (Shape{16, 16}));
  EXPECT_EQ(salad.layers[0].gate_weight.shape(), (Shape{1, 16}));
  for (const Tensor& tensor : {sla.layers[1].proj_weight, sla.layers[1].proj_bias,
                               salad.layers[1].proj_weight, salad.layers[1].gate_weight}) {
    for (std::int64_t i = 0; i < tensor.NumElements(); ++i) {
      EXPECT_EQ(tensor.data<float>()[i], 0.0f);
    }
  }
}

TEST_F(AdapterTest, AModelFolderHasBothKinds) {
  std::filesystem::create_directory(folder_ / "attention");
  WriteSafetensors(folder_ / "attention/salad.safetensors", SaladTensors({0, 1, 2}),
                   {{"slalom.attention", R"({"kind": "salad", "topk": 0.3})"}});
  const auto adapters = LoadAdapters(folder_.path(), TinyConfig());
  ASSERT_EQ(adapters.size(), 2u);
  EXPECT_EQ(adapters[0].kind, AttentionKind::kSla);
  EXPECT_FALSE(adapters[0].trained);
  EXPECT_EQ(adapters[1].kind, AttentionKind::kSalad);
  EXPECT_TRUE(adapters[1].trained);
  EXPECT_EQ(adapters[1].map.topk, 0.3);

  std::filesystem::rename(folder_ / "attention/salad.safetensors",
                          folder_ / "attention/sla.safetensors");
  ExpectError(ErrorCode::kInvalidArgument, {"sla.safetensors", "other kind"},
              [&] { LoadAdapters(folder_.path(), TinyConfig()); });
}

TEST_F(AdapterTest, EveryLinearOfTheOwnStreamMayHaveALora) {
  TensorMap tensors = SlaTensors(kOurs, {0, 1, 2});
  const auto add = [&](const std::string& name, std::int64_t in, std::int64_t out) {
    tensors["blocks.2." + name + ".lora_A.weight"] = Random({3, in}, 1);
    tensors["blocks.2." + name + ".lora_B.weight"] = Random({out, 3}, 2);
  };
  const std::int64_t ffn = TinyConfig().ffn_dim;
  for (const char* name : {"attn1.to_v", "attn2.to_q", "attn2.to_out.0"}) add(name, 16, 16);
  add("ffn.net.0.proj", 16, ffn);
  add("ffn.net.2", ffn, 16);
  const AttentionAdapter adapter = Load(tensors, R"({"kind": "sla"})");
  EXPECT_EQ(adapter.lora.size(), 5u);
  EXPECT_EQ(adapter.lora.at("blocks.2.ffn.net.2").b.shape(), (Shape{16, 3}));

  // A prompt's keys and values are made once for all kinds of attention.
  add("attn2.to_k", 16, 16);
  ExpectError(ErrorCode::kInvalidArgument, {"attn2.to_k", "no place"},
              [&] { Load(tensors, R"({"kind": "sla"})"); });
}

class LoraTest : public AdapterTest {
 protected:
  LoraTest() {
    tensors_ = SlaTensors(kOurs, {0, 1, 2});
    tensors_[name_ + ".lora_A.weight"] = Random({4, 16}, 20);
    tensors_[name_ + ".lora_B.weight"] = Random({16, 4}, 21);
    WriteSafetensors(folder_ / "base.safetensors",
                     {{name_ + ".weight", base_}, {"blocks.1.attn1.to_k.weight", base_}});
  }

  Tensor Merge(const AttentionAdapter& adapter, const std::string& name, DType dtype) {
    const Weights base = Weights::OpenFile(folder_ / "base.safetensors");
    return LoadMerged(*backend_, base, adapter, name, {16, 16}, dtype);
  }

  double Expected(int row, int column, double scale) const {
    double sum = 0;
    for (int r = 0; r < 4; ++r) {
      sum += static_cast<double>(Random({16, 4}, 21).data<float>()[row * 4 + r]) *
             Random({4, 16}, 20).data<float>()[r * 16 + column];
    }
    return base_.data<float>()[row * 16 + column] + scale * sum;
  }

  const std::string name_ = "blocks.1.attn1.to_out.0";
  const Tensor base_ = Random({16, 16}, 30);
  TensorMap tensors_;
  std::unique_ptr<Backend> backend_ = MakeBackend(Device{}, {.cpu_threads = 1});
};

TEST_F(LoraTest, IsMergedIntoTheBaseWeight) {
  const AttentionAdapter adapter = Load(tensors_, R"({"kind": "sla"})");
  ASSERT_EQ(adapter.lora.size(), 1u);
  const Tensor merged = Merge(adapter, name_, DType::kF32);
  const Tensor half = Merge(adapter, name_, DType::kBF16);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      const double expected = Expected(row, column, 1.0);
      EXPECT_NEAR(merged.data<float>()[row * 16 + column], expected, 1e-5);
      EXPECT_NEAR(static_cast<float>(half.data<BFloat16>()[row * 16 + column]), expected,
                  std::abs(expected) / 256 + 1e-6);
    }
  }
  // A Linear without a LoRA is the base's.
  const Tensor plain = Merge(adapter, "blocks.1.attn1.to_k", DType::kF32);
  EXPECT_EQ(plain.data<float>()[7], base_.data<float>()[7]);
}

TEST_F(LoraTest, AlphaScalesIt) {
  tensors_[name_ + ".alpha"] = Tensor::FromFloats({}, std::vector<float>{8.0f});
  const Tensor merged = Merge(Load(tensors_, R"({"kind": "sla"})"), name_, DType::kF32);
  EXPECT_NEAR(merged.data<float>()[16 * 3 + 2], Expected(3, 2, 2.0), 1e-5);
}

TEST_F(LoraTest, RefusesHalvesAndWrongShapes) {
  TensorMap half = tensors_;
  half.erase(name_ + ".lora_B.weight");
  ExpectError(ErrorCode::kInvalidArgument, {name_, "half"},
              [&] { Load(half, R"({"kind": "sla"})"); });
  TensorMap wrong = tensors_;
  wrong[name_ + ".lora_A.weight"] = Random({3, 16}, 0);
  ExpectError(ErrorCode::kInvalidArgument, {name_, "[3, 16]", "[16, 4]"},
              [&] { Load(wrong, R"({"kind": "sla"})"); });
  wrong = tensors_;
  wrong[name_ + ".alpha"] = Random({2}, 0);
  ExpectError(ErrorCode::kInvalidArgument, {"alpha"}, [&] { Load(wrong, R"({"kind": "sla"})"); });
}

}  // namespace
}  // namespace slalom
