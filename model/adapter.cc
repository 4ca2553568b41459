#include "model/adapter.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <optional>
#include <set>
#include <span>

#include "kernels/core/error.h"
#include "model/config_reader.h"
#include "model/host_floats.h"
#include "model/json_file.h"

namespace slalom {
namespace {

namespace fs = std::filesystem;

constexpr char kMetadataKey[] = "slalom.attention";

BlockMapOptions DefaultMap(AttentionKind kind) {
  BlockMapOptions map;
  if (kind == AttentionKind::kSalad) {
    map.topk = 0.1;        // the paper's sparsity of 0.90
    map.negligible = 0.0;  // SALAD's linear branch sums over every key
  }
  return map;
}

TokenTile ParseTile(const ConfigReader& reader, BlockMapKind map) {
  constexpr int kMostPerAxis = 64;
  const std::vector<int> sizes = reader.Ints("tile", {1, 1, 1}, 1, kMostPerAxis);
  if (sizes.size() != 3) reader.Fail("tile", "is not [frames, rows, columns]");
  const TokenTile tile = {.frames = sizes[0], .rows = sizes[1], .columns = sizes[2]};
  if (!tile.raster() && map == BlockMapKind::kWindow) {
    reader.Fail("tile", "does not go with windows, which are laid over the raster order");
  }
  return tile;
}

std::vector<double> ParseLayerTopK(const ConfigReader& reader, double mean,
                                   const TransformerConfig& config) {
  std::vector<double> layers = reader.Doubles("layer_topk");
  if (layers.empty()) return layers;
  if (std::ssize(layers) != config.num_layers) {
    reader.Fail("layer_topk", "has " + std::to_string(layers.size()) + " values, the transformer " +
                                  std::to_string(config.num_layers) + " layers");
  }
  double sum = 0;
  for (const double topk : layers) {
    if (!(topk > 0 && topk <= 1)) {
      reader.Fail("layer_topk", "holds " + std::to_string(topk) + ", which is no share above 0");
    }
    sum += topk;
  }
  if (std::abs(sum / static_cast<double>(layers.size()) - mean) > kSameTopK) {
    reader.Fail("layer_topk", "has another mean than topk, " + std::to_string(mean));
  }
  return layers;
}

// The adapter's description: everything but tensors.
AttentionAdapter ParseDescription(const Weights& weights, const TransformerConfig& config) {
  const auto text = weights.metadata().find(kMetadataKey);
  if (text == weights.metadata().end()) {
    throw Error(ErrorCode::kInvalidArgument,
                weights.path() + ": not an adapter, its metadata has no " + kMetadataKey);
  }
  const std::string source = weights.path() + ": " + kMetadataKey;
  const nlohmann::json object = ParseJson(text->second, source);
  const ConfigReader reader(object, source);
  reader.RequireKnown({"kind", "topk", "negligible", "scope", "feature_map", "block_q", "block_k",
                       "map", "gate", "dropped_layers", "tile", "layer_topk"});
  if (reader.Find({"kind"}) == nullptr) reader.Fail("kind", "is missing");

  AttentionAdapter adapter;
  adapter.trained = true;
  adapter.kind = reader.Choice("kind", AttentionKind::kSla,
                               {{"sla", AttentionKind::kSla}, {"salad", AttentionKind::kSalad}});
  adapter.map = DefaultMap(adapter.kind);
  adapter.map.kind =
      reader.Choice("map", BlockMapKind::kTopK,
                    {{"topk", BlockMapKind::kTopK}, {"window", BlockMapKind::kWindow}});
  adapter.map.topk = reader.Double({"topk"}, adapter.map.topk, 1e-6, 1.0);
  adapter.layer_topk = ParseLayerTopK(reader, adapter.map.topk, config);
  adapter.map.negligible = reader.Double({"negligible"}, adapter.map.negligible, 0.0, 0.999999);
  const auto block = [&](const char* key, int fallback) {
    const int size = reader.Int({key}, fallback, 16, 256);
    if (size % 16 != 0) reader.Fail(key, "is " + std::to_string(size) + ", no multiple of 16");
    return size;
  };
  adapter.map.block_q = block("block_q", adapter.map.block_q);
  adapter.map.block_k = block("block_k", adapter.map.block_k);
  adapter.scope = reader.Choice("scope", LinearScope::kMarginal,
                                {{"marginal", LinearScope::kMarginal},
                                 {"noncritical", LinearScope::kNonCritical},
                                 {"all", LinearScope::kAll}});
  adapter.feature_map = reader.Choice(
      "feature_map", FeatureMap::kSoftmax,
      {{"softmax", FeatureMap::kSoftmax}, {"elu", FeatureMap::kElu}, {"relu", FeatureMap::kRelu}});
  adapter.gate = reader.Choice("gate", SaladGate::kToken,
                               {{"token", SaladGate::kToken}, {"sample", SaladGate::kSample}});
  adapter.tile = ParseTile(reader, adapter.map.kind);
  const std::vector<int> dropped = reader.Ints("dropped_layers", {}, 0, config.num_layers - 1);
  const std::set<int> unique(dropped.begin(), dropped.end());
  adapter.dropped_layers.assign(unique.begin(), unique.end());
  return adapter;
}

// Hands out an adapter file's tensors by name and knows which were never asked for.
class TensorTaker {
 public:
  explicit TensorTaker(const Weights& weights) : weights_(weights) {
    for (std::string& name : weights.Names()) unused_.insert(std::move(name));
  }

  // The tensor under the first of these names that is there; undefined when none is.
  Tensor Find(const std::vector<std::string>& names) {
    for (const std::string& name : names) {
      if (!weights_.Has(name)) continue;
      unused_.erase(name);
      return weights_.Get(name);
    }
    return {};
  }

  Tensor Take(const std::vector<std::string>& names, const Shape& expected) {
    Tensor tensor = Find(names);
    if (!tensor.defined()) {
      throw Error(ErrorCode::kNotFound,
                  weights_.path() + ": has no tensor '" + names.front() +
                      "'; a block without a linear branch must stand in dropped_layers");
    }
    if (!(tensor.shape() == expected)) {
      throw Error(ErrorCode::kInvalidArgument, weights_.path() + ": tensor '" + names.front() +
                                                   "' has the shape " + ToString(tensor.shape()) +
                                                   ", expected " + ToString(expected));
    }
    return tensor;
  }

  [[noreturn]] void Fail(const std::string& what) const {
    throw Error(ErrorCode::kInvalidArgument, weights_.path() + ": " + what);
  }

  const std::set<std::string>& unused() const { return unused_; }

 private:
  const Weights& weights_;
  std::set<std::string> unused_;
};

AdapterLayer TakeSlaLayer(TensorTaker& taker, const std::string& block, std::int64_t head_dim) {
  const auto names = [&](const std::string& leaf) {
    return std::vector<std::string>{block + ".attn1.sla.proj_l." + leaf,
                                    block + ".self_attn.attn_op.local_attn.proj_l." + leaf,
                                    block + ".attn1.attn_impl.proj_l." + leaf};
  };
  AdapterLayer layer;
  layer.proj_weight = taker.Take(names("weight"), {head_dim, head_dim});
  layer.proj_bias = taker.Take(names("bias"), {head_dim});
  return layer;
}

AdapterLayer TakeSaladLayer(TensorTaker& taker, const std::string& block, std::int64_t dim) {
  const std::string salad = block + ".attn1.salad.";
  AdapterLayer layer;
  layer.proj_weight = taker.Take({salad + "proj.weight"}, {dim, dim});
  layer.proj_bias = taker.Take({salad + "proj.bias"}, {dim});
  layer.gate_weight = taker.Take({salad + "gate.weight"}, {1, dim});
  layer.gate_bias = taker.Take({salad + "gate.bias"}, {1});
  return layer;
}

// One Linear of a block that may carry a LoRA.
struct LoraTarget {
  const char* name;
  std::int64_t in;
  std::int64_t out;
};

std::vector<LoraTarget> LoraTargets(const TransformerConfig& config) {
  const std::int64_t dim = config.dim();
  const std::int64_t ffn = config.ffn_dim;
  return {{"attn1.to_q", dim, dim},     {"attn1.to_k", dim, dim}, {"attn1.to_v", dim, dim},
          {"attn1.to_out.0", dim, dim}, {"attn2.to_q", dim, dim}, {"attn2.to_out.0", dim, dim},
          {"ffn.net.0.proj", dim, ffn}, {"ffn.net.2", ffn, dim}};
}

std::optional<LoraPair> TakeLora(TensorTaker& taker, const std::string& linear, std::int64_t in,
                                 std::int64_t out) {
  LoraPair pair;
  pair.a = taker.Find({linear + ".lora_A.weight"});
  pair.b = taker.Find({linear + ".lora_B.weight"});
  const Tensor alpha = taker.Find({linear + ".alpha"});
  if (!pair.a.defined() && !pair.b.defined() && !alpha.defined()) return std::nullopt;
  if (!pair.a.defined() || !pair.b.defined()) taker.Fail(linear + " has half a LoRA");
  const bool fits = pair.a.shape().rank() == 2 && pair.b.shape().rank() == 2 &&
                    pair.a.dim(1) == in && pair.b.dim(0) == out && pair.a.dim(0) >= 1 &&
                    pair.a.dim(0) == pair.b.dim(1);
  if (!fits) {
    taker.Fail(linear + " has a LoRA of the shapes " + ToString(pair.a.shape()) + " and " +
               ToString(pair.b.shape()) + ", expected [r, " + std::to_string(in) + "] and [" +
               std::to_string(out) + ", r]");
  }
  if (alpha.defined()) {
    if (alpha.NumElements() != 1) taker.Fail(linear + ".alpha is not one number");
    pair.scale = static_cast<double>(ToFloats(alpha)[0]) / static_cast<double>(pair.a.dim(0));
    if (!std::isfinite(pair.scale)) taker.Fail(linear + ".alpha is not finite");
  }
  return pair;
}

}  // namespace

double AttentionAdapter::NominalSparsity(double topk) const {
  return 1.0 - (topk > 0 ? topk : map.topk);
}

AttentionAdapter LoadAdapter(const std::string& path, const TransformerConfig& config) {
  const Weights weights = Weights::OpenFile(path);
  AttentionAdapter adapter = ParseDescription(weights, config);
  const std::set<int> dropped(adapter.dropped_layers.begin(), adapter.dropped_layers.end());
  TensorTaker taker(weights);
  adapter.layers.resize(static_cast<std::size_t>(config.num_layers));
  for (int i = 0; i < config.num_layers; ++i) {
    const std::string block = "blocks." + std::to_string(i);
    for (const LoraTarget& linear : LoraTargets(config)) {
      const std::string name = block + "." + linear.name;
      if (auto lora = TakeLora(taker, name, linear.in, linear.out)) {
        adapter.lora.emplace(name, *lora);
      }
    }
    if (dropped.contains(i)) continue;
    adapter.layers[static_cast<std::size_t>(i)] =
        adapter.kind == AttentionKind::kSla ? TakeSlaLayer(taker, block, config.attention_head_dim)
                                            : TakeSaladLayer(taker, block, config.dim());
  }
  if (!taker.unused().empty()) {
    taker.Fail("tensor '" + *taker.unused().begin() + "' has no place in this adapter");
  }
  return adapter;
}

AttentionAdapter UntrainedAdapter(AttentionKind kind, const TransformerConfig& config) {
  const auto zeros = [](const Shape& shape) {
    Tensor tensor = Tensor::Host(shape, DType::kF32);
    std::fill_n(tensor.data<float>(), tensor.NumElements(), 0.0f);
    return tensor;
  };
  AttentionAdapter adapter;
  adapter.kind = kind;
  adapter.map = DefaultMap(kind);
  // One block of zeros serves all layers.
  AdapterLayer layer;
  if (kind == AttentionKind::kSla) {
    layer.proj_weight = zeros({config.attention_head_dim, config.attention_head_dim});
    layer.proj_bias = zeros({config.attention_head_dim});
  } else {
    layer.proj_weight = zeros({config.dim(), config.dim()});
    layer.proj_bias = zeros({config.dim()});
    layer.gate_weight = zeros({1, config.dim()});
    layer.gate_bias = zeros({1});
  }
  adapter.layers.assign(static_cast<std::size_t>(config.num_layers), layer);
  return adapter;
}

std::vector<AttentionAdapter> LoadAdapters(const std::string& folder,
                                           const TransformerConfig& config) {
  std::vector<AttentionAdapter> adapters;
  for (const auto& [kind, file] : {std::pair(AttentionKind::kSla, "sla.safetensors"),
                                   std::pair(AttentionKind::kSalad, "salad.safetensors")}) {
    const std::string path = (fs::path(folder) / "attention" / file).string();
    std::error_code ignored;
    if (!fs::exists(path, ignored)) {
      adapters.push_back(UntrainedAdapter(kind, config));
      continue;
    }
    adapters.push_back(LoadAdapter(path, config));
    if (adapters.back().kind != kind) {
      throw Error(ErrorCode::kInvalidArgument, path + ": holds an adapter of the other kind");
    }
  }
  return adapters;
}

Tensor LoadMerged(Backend& backend, const Weights& base, const AttentionAdapter& adapter,
                  const std::string& name, const Shape& expected, DType dtype) {
  const auto lora = adapter.lora.find(name);
  if (lora == adapter.lora.end()) return base.Load(backend, name + ".weight", expected, dtype);

  const LoraPair& pair = lora->second;
  const std::int64_t rank = pair.a.dim(0);
  const std::int64_t in = pair.a.dim(1);
  const std::vector<float> a = ToFloats(pair.a);
  std::vector<float> b = ToFloats(pair.b);
  for (float& value : b) value = static_cast<float>(value * pair.scale);
  // Linear multiplies by a transposed weight, so B A is a Linear whose weight is A transposed.
  std::vector<float> a_transposed(a.size());  // [in, r]
  for (std::int64_t r = 0; r < rank; ++r) {
    for (std::int64_t i = 0; i < in; ++i) a_transposed[i * rank + r] = a[r * in + i];
  }
  const auto upload = [&](const Shape& shape, std::span<const float> values) {
    Tensor tensor = backend.Allocate(shape, DType::kF32);
    backend.Copy(Tensor::FromFloats(shape, values), tensor);
    return tensor;
  };
  Tensor sum = base.Load(backend, name + ".weight", expected, DType::kF32);
  backend.Linear({.x = upload(pair.b.shape(), b),
                  .weight = upload({in, rank}, a_transposed),
                  .residual = sum,
                  .out = sum});
  if (dtype == DType::kF32) return sum;
  Tensor merged = backend.Allocate(expected, dtype);
  backend.Copy(sum, merged);
  return merged;
}

}  // namespace slalom
