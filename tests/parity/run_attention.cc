// The two sparse attention layers alone.
#include <algorithm>
#include <memory>
#include <utility>

#include "kernels/core/error.h"
#include "model/rope.h"
#include "tests/parity/run_network.h"

namespace slalom {
namespace {

constexpr int kMaxPositions = 1024;  // per axis of a token grid, as in Wan

struct Heads {
  Tensor q, k, v;  // [B, L, H, D] T, device
  std::int64_t batch, heads, length, width;
};

// q, k, v arrive as [B, H, L, D] f32.
Heads ReadHeads(Backend& backend, const NetworkInputs& inputs, DType dtype) {
  const Tensor q = inputs.Get("q", DType::kF32, {-1, -1, -1, -1});
  const std::vector<std::int64_t> dims(q.shape().dims().begin(), q.shape().dims().end());
  const auto upload = [&](const Tensor& host) { return Upload(backend, SwapMiddle(host), dtype); };
  return {.q = upload(q),
          .k = upload(inputs.Get("k", DType::kF32, dims)),
          .v = upload(inputs.Get("v", DType::kF32, dims)),
          .batch = dims[0],
          .heads = dims[1],
          .length = dims[2],
          .width = dims[3]};
}

// The map of the input file when it has one, else the one that q and k give.
BlockMap ReadOrMakeMap(Backend& backend, const NetworkOptions& options, const NetworkInputs& inputs,
                       const Heads& heads, const BlockMapArgs& args) {
  if (!inputs.Has("map")) return backend.MakeBlockMap(args);
  const BlockMapOptions& map = options.map;
  const auto blocks = [&](int size) { return (heads.length + size - 1) / size; };
  const Tensor classes = inputs.Get(
      "map", DType::kU8, {heads.batch, heads.heads, blocks(map.block_q), blocks(map.block_k)});
  const auto* first = classes.data<std::uint8_t>();
  if (std::any_of(first, first + classes.NumElements(), [](std::uint8_t c) { return c > 2; })) {
    throw Error(ErrorCode::kInvalidArgument,
                "tensor 'map': expected 1 (critical), 2 (marginal) and 0 (negligible) alone");
  }
  BlockMap forced =
      backend.BlockMapFromClasses(Upload(backend, classes, DType::kU8), map.block_q, map.block_k);
  if (map.kind == BlockMapKind::kWindow) forced.grid = args.grid;
  return forced;
}

// [1] f32: counted from the map that was used.
Tensor Sparsity(Backend& backend, const BlockMap& map) {
  const Tensor counter = backend.Allocate({2}, DType::kI64);
  backend.Zero(counter);
  backend.CountPairs(map, counter);
  const Tensor host = Download(backend, counter);
  const auto* pairs = host.data<std::int64_t>();
  const float sparsity =
      1.0f - static_cast<float>(static_cast<double>(pairs[0]) / static_cast<double>(pairs[1]));
  return Tensor::FromFloats({1}, {&sparsity, 1});
}

// SALAD's four weights, in the types that the backend takes.
void ReadSaladWeights(Backend& backend, const NetworkInputs& inputs, std::int64_t width,
                      DType dtype, SaladArgs& args) {
  const auto read = [&](const char* name, std::vector<std::int64_t> dims, DType type) {
    return Upload(backend, inputs.Get(name, DType::kF32, dims), type);
  };
  args.proj_weight = read("proj_weight", {width, width}, dtype);
  args.proj_bias = read("proj_bias", {width}, DType::kF32);
  args.gate_weight = read("gate_weight", {1, width}, DType::kF32);
  args.gate_bias = read("gate_bias", {1}, DType::kF32);
}

Tensor Rotate(Backend& backend, const Tensor& x, const RopeTables& rope) {
  Tensor out = backend.Allocate(x.shape(), x.dtype());
  backend.QkNormRope({.x = x.Reshape({x.dim(0), x.dim(1), x.dim(2) * x.dim(3)}),
                      .cos = rope.cos,
                      .sin = rope.sin,
                      .out = out});
  return out;
}

// SLA forward on what the input file has.
struct SlaForward {
  std::unique_ptr<const BlockMap> map;  // of the arguments
  SlaArgs args;
};

SlaForward RunSlaForward(Backend& backend, const NetworkOptions& options,
                         const NetworkInputs& inputs, const Heads& heads, bool save_lse) {
  const Tensor weight = inputs.Get("proj_weight", DType::kF32, {heads.width, heads.width});
  const Tensor bias = inputs.Get("proj_bias", DType::kF32, {heads.width});
  auto map = std::make_unique<const BlockMap>(ReadOrMakeMap(
      backend, options, inputs, heads, {.q = heads.q, .k = heads.k, .options = options.map}));
  SlaArgs args{.q = heads.q,
               .k = heads.k,
               .v = heads.v,
               .map = map.get(),
               .scope = options.scope,
               .feature_map = options.feature_map,
               .proj_weight = Upload(backend, weight, DType::kF32),
               .proj_bias = Upload(backend, bias, DType::kF32),
               .out = backend.Allocate(heads.q.shape(), options.dtype)};
  if (save_lse) {
    args.lse = backend.Allocate({heads.batch, heads.heads, heads.length}, DType::kF32);
  }
  backend.SlaAttention(args);
  return {std::move(map), args};
}

}  // namespace

TensorMap RunSla(Backend& backend, const NetworkOptions& options, const NetworkInputs& inputs) {
  const Heads heads = ReadHeads(backend, inputs, options.dtype);
  const SlaForward forward = RunSlaForward(backend, options, inputs, heads, false);
  return {{"o", SwapMiddle(Download(backend, forward.args.out))},
          {"map", Download(backend, forward.map->classes)},
          {"sparsity", Sparsity(backend, *forward.map)}};
}

TensorMap RunSlaBackward(Backend& backend, const NetworkOptions& options,
                         const NetworkInputs& inputs) {
  const Heads heads = ReadHeads(backend, inputs, options.dtype);
  const Tensor slopes =
      inputs.Get("do", DType::kF32, {heads.batch, heads.heads, heads.length, heads.width});
  const SlaForward forward = RunSlaForward(backend, options, inputs, heads, true);
  const auto like = [&](const Tensor& x) { return backend.Allocate(x.shape(), x.dtype()); };
  const SlaBackwardArgs args{.q = heads.q,
                             .k = heads.k,
                             .v = heads.v,
                             .map = forward.args.map,
                             .scope = options.scope,
                             .feature_map = options.feature_map,
                             .proj_weight = forward.args.proj_weight,
                             .proj_bias = forward.args.proj_bias,
                             .out = forward.args.out,
                             .lse = forward.args.lse,
                             .d_out = Upload(backend, SwapMiddle(slopes), options.dtype),
                             .d_q = like(heads.q),
                             .d_k = like(heads.k),
                             .d_v = like(heads.v),
                             .d_proj_weight = like(forward.args.proj_weight),
                             .d_proj_bias = like(forward.args.proj_bias)};
  backend.SlaAttentionBackward(args);
  return {{"dq", SwapMiddle(Download(backend, args.d_q))},
          {"dk", SwapMiddle(Download(backend, args.d_k))},
          {"dv", SwapMiddle(Download(backend, args.d_v))},
          {"dproj_weight", Download(backend, args.d_proj_weight)},
          {"dproj_bias", Download(backend, args.d_proj_bias)}};
}

TensorMap RunSalad(Backend& backend, const NetworkOptions& options, const NetworkInputs& inputs) {
  const Heads heads = ReadHeads(backend, inputs, options.dtype);
  if (options.grid.size() != heads.length) {
    throw Error(ErrorCode::kInvalidArgument,
                "salad needs --grid F,H,W with F * H * W = " + std::to_string(heads.length) +
                    ", the length of tensor 'q'");
  }
  const std::int64_t width = heads.heads * heads.width;
  const Tensor x = inputs.Get("x", DType::kF32, {heads.batch, heads.length, width});
  const RopeTables rope =
      MakeRopeTables(backend, options.grid, static_cast<int>(heads.width), kMaxPositions);

  SaladArgs args = {.q = Rotate(backend, heads.q, rope),
                    .k = Rotate(backend, heads.k, rope),
                    .v = heads.v,
                    .q_normed = heads.q,
                    .k_normed = heads.k,
                    .cos = rope.cos,
                    .sin = rope.sin,
                    .x = Upload(backend, x, options.dtype),
                    .map_kind = options.map.kind,
                    .grid = options.grid,
                    .gate = options.gate,
                    .out = backend.Allocate({heads.batch, heads.length, width}, options.dtype),
                    .gate_out = backend.Allocate({heads.batch, heads.length}, DType::kF32)};
  ReadSaladWeights(backend, inputs, width, options.dtype, args);
  BlockMapOptions map_options = options.map;
  map_options.negligible = 0;  // SALAD has no such class
  const BlockMap map =
      ReadOrMakeMap(backend, options, inputs, heads,
                    {.q = args.q, .k = args.k, .grid = options.grid, .options = map_options});
  args.map = &map;
  backend.SaladAttention(args);
  return {{"o", Download(backend, args.out)},
          {"map", Download(backend, map.classes)},
          {"sparsity", Sparsity(backend, map)},
          {"gate", Download(backend, args.gate_out)}};
}

}  // namespace slalom
