// Adapters: the weights that turn a dense transformer into one with SLA or SALAD attention.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/attention.h"
#include "kernels/backend.h"
#include "kernels/core/tensor.h"
#include "model/config.h"
#include "model/token_order.h"
#include "model/weights.h"

namespace slalom {

// Values of topk that are one but for rounding.
constexpr double kSameTopK = 1e-9;

// The linear branch of one transformer block; host tensors in the stored type. An undefined
// proj_weight means that this layer dropped its linear branch.
struct AdapterLayer {
  Tensor proj_weight;  // SLA [D, D]; SALAD [d, d]
  Tensor proj_bias;    // SLA [D]; SALAD [d]
  Tensor gate_weight;  // SALAD [1, d]
  Tensor gate_bias;    // SALAD [1]
};

// W + scale * B A for one Linear.
struct LoraPair {
  Tensor a;            // host [r, in]
  Tensor b;            // host [out, r]
  double scale = 1.0;  // alpha / r; 1 without an alpha
};

// One safetensors file whose __metadata__ holds a JSON object under "slalom.attention" with the
// keys kind, topk, negligible, scope, feature_map, block_q, block_k, map, gate, dropped_layers,
// tile ([frames, rows, columns]: the order of the tokens; raster when it is absent), layer_topk
// (each layer's own topk, of which topk is the mean; topk in every layer when it is absent). Tensor
// names (N a block):
//   SLA    blocks.N.attn1.sla.proj_l.{weight,bias}, or as TurboDiffusion
//          (blocks.N.self_attn.attn_op.local_attn.proj_l.*) and FastVideo
//          (blocks.N.attn1.attn_impl.proj_l.*) write them
//   SALAD  blocks.N.attn1.salad.{proj,gate}.{weight,bias}
//   LoRA   <Linear>.lora_{A,B}.weight and, optional, <Linear>.alpha, on any of a block's Linears
//          attn1.{to_q,to_k,to_v,to_out.0}, attn2.{to_q,to_out.0}, ffn.net.0.proj, ffn.net.2. Not
//          attn2.{to_k,to_v}: what they make of a prompt is shared by clips of every attention.
// Any other tensor in the file is an error. Immutable after loading; concurrent reads are safe.
struct AttentionAdapter {
  AttentionKind kind = AttentionKind::kSla;
  BlockMapOptions map;
  LinearScope scope = LinearScope::kMarginal;
  FeatureMap feature_map = FeatureMap::kSoftmax;
  SaladGate gate = SaladGate::kToken;
  TokenTile tile;
  std::vector<double> layer_topk;        // one per transformer block, or empty: map.topk in all
  std::vector<int> dropped_layers;       // ascending
  std::vector<AdapterLayer> layers;      // one per transformer block
  std::map<std::string, LoraPair> lora;  // by the Linear's name: "blocks.0.attn1.to_q"
  bool trained = false;                  // false: the zero-initialised stand-in

  // Share of the block pairs that are skipped by the softmax branch, at `topk` instead of the
  // adapter's when it is positive. Exact for long clips; the number reported for a clip is counted.
  double NominalSparsity(double topk = 0) const;
};

// Reads one adapter file. Throws Error as Weights does; kInvalidArgument when metadata or shapes
// don't fit the transformer.
AttentionAdapter LoadAdapter(const std::string& path, const TransformerConfig& config);

// The paper's defaults with a zero-initialised linear branch: pure sparse attention. It lets a
// model without trained adapters run `--attention sla` and `salad`.
AttentionAdapter UntrainedAdapter(AttentionKind kind, const TransformerConfig& config);

// SLA and SALAD, in this order: <folder>/attention/{sla,salad}.safetensors, untrained where the
// file is not there.
std::vector<AttentionAdapter> LoadAdapters(const std::string& folder,
                                           const TransformerConfig& config);

// The weight of Linear `name` ("blocks.0.attn1.to_q") with the adapter's LoRA merged in: the sum is
// made in f32 and rounded once. Without a LoRA on it, what Weights::Load gives.
Tensor LoadMerged(Backend& backend, const Weights& base, const AttentionAdapter& adapter,
                  const std::string& name, const Shape& expected, DType dtype);

}  // namespace slalom
