// Attention, at the sizes of Wan2.1 on random data.
#include <string>

#include "kernels/core/error.h"
#include "kernels/cuda/attention/backward.h"
#include "kernels/cuda/attention/block_map.h"
#include "kernels/cuda/attention/linear_branch.h"
#include "kernels/cuda/attention/problem.h"
#include "kernels/cuda/attention/salad.h"
#include "kernels/cuda/attention/sla.h"
#include "tests/bench/kernels_bench.h"

namespace slalom {
namespace {

constexpr DType kBF16 = DType::kBF16;
constexpr DType kF32 = DType::kF32;

void BenchDense(Bench& bench, std::int64_t q_length, std::int64_t k_length, std::int64_t heads,
                int head_size, cuda::AttentionKernel kernel, const std::string& name,
                bool biased = false) {
  if (!bench.Wanted(name)) return;
  const Shape q_shape{1, q_length, heads, head_size};
  const Shape k_shape{1, k_length, heads, head_size};
  const Tensor q = bench.Random(q_shape, kBF16), k = bench.Random(k_shape, kBF16);
  const Tensor v = bench.Random(k_shape, kBF16), out = bench.Empty(q_shape, kBF16);
  cuda::AttentionProblem problem = cuda::AttentionProblem::Of(q, k, v, out);
  Tensor bias;
  if (biased) {
    bias = bench.Random({heads, q_length + k_length - 1}, kF32);
    problem.relative_bias = bias.data<float>();
  }
  bench.Flops(name, 4.0 * q_length * k_length * heads * head_size,
              [&] { cuda::RunAttention(bench.backend().context(), problem, kernel); });
}

void BenchDenseShapes(Bench& bench) {
  using cuda::AttentionKernel;
  BenchDense(bench, kTokens, kTokens, kHeads, 128, AttentionKernel::kTensorCore,
             "attention mma.sync 32760 d128");
  BenchDense(bench, 32768, 32768, kHeads, 64, AttentionKernel::kTensorCore,
             "attention mma.sync 32768 d64");
  BenchDense(bench, 512, 512, 64, 64, AttentionKernel::kTensorCore, "attention mma.sync UMT5",
             true);
  BenchDense(bench, 6240, 6240, 1, 384, AttentionKernel::kProduct, "attention products VAE frame");
  if (bench.backend().context().compute_major != cuda::kHopperMajor) return;
  const auto hopper = AttentionKernel::kHopper;
  BenchDense(bench, kTokens, kTokens, kHeads, 128, hopper, "attention hopper 32760 d128");
  BenchDense(bench, 32768, 32768, kHeads, 128, hopper, "attention hopper 32768 d128");
  BenchDense(bench, 32768, 32768, kHeads, 64, hopper, "attention hopper 32768 d64");
  BenchDense(bench, kTokens, 512, kHeads, 128, hopper, "attention hopper cross 32760x512");
}

// Block-sparse attention of one shape and setting.
struct SparseCase {
  std::int64_t tokens = kTokens;
  std::int64_t heads = kHeads;
  int block_q = 128;
  double topk = 0.05;
  LinearScope scope = LinearScope::kAll;
  int block_k = 64;
  std::int64_t batch = 1;
  double negligible = BlockMapOptions{}.negligible;

  std::int64_t KeyBlocks() const { return (tokens + block_k - 1) / block_k; }
  Shape shape() const { return {batch, tokens, heads, kHeadSize}; }
  BlockMapOptions options() const {
    BlockMapOptions options;
    options.topk = topk;
    options.negligible = negligible;
    options.block_q = block_q;
    options.block_k = block_k;
    return options;
  }
  // Of the critical pairs' two products.
  double Flops() const {
    const auto keys = static_cast<double>(CriticalBlocks(topk, KeyBlocks()) * block_k);
    return 4.0 * batch * tokens * keys * heads * kHeadSize;
  }
};

BlockMapArgs MapArgs(const SparseCase& c, const Tensor& q, const Tensor& k) {
  BlockMapArgs args{.q = q, .k = k};
  args.options = c.options();
  return args;
}

// The same with the means that a network has of its norms.
BlockMapArgs MapArgsWithMeans(Bench& bench, const SparseCase& c, const BlockMapArgs& args) {
  const std::int64_t width = c.heads * kHeadSize;
  BlockMapArgs from_means = args;
  from_means.q_means = bench.Random({c.batch, (c.tokens + c.block_q - 1) / c.block_q, width}, kF32);
  from_means.k_means = bench.Random({c.batch, c.KeyBlocks(), width}, kF32);
  return from_means;
}

void BenchMap(Bench& bench, const SparseCase& c, const std::string& name) {
  if (!bench.Wanted(name)) return;
  const Tensor q = bench.Random(c.shape(), kBF16), k = bench.Random(c.shape(), kBF16);
  const BlockMapArgs args = MapArgs(c, q, k);
  Backend& backend = bench.backend();
  bench.Bytes(name, 2.0 * q.NumBytes(), [&] { backend.MakeBlockMap(args); });
  bench.Bytes(name + " by the library", 2.0 * q.NumBytes(), [&] {
    cuda::MakeBlockMap(bench.backend().context(), args, cuda::RankWay::kLibrary);
  });
  const BlockMapArgs from_means = MapArgsWithMeans(bench, c, args);
  bench.Bytes(name + " from means", from_means.q_means.NumBytes(),
              [&] { backend.MakeBlockMap(from_means); });
}

// The sparse branch alone.
void BenchSparse(Bench& bench, const SparseCase& c, const std::string& name) {
  if (!bench.Wanted(name)) return;
  const Tensor q = bench.Random(c.shape(), kBF16), k = bench.Random(c.shape(), kBF16);
  const Tensor v = bench.Random(c.shape(), kBF16);
  const BlockMap map = bench.backend().MakeBlockMap(MapArgs(c, q, k));
  SlaArgs args{.q = q, .k = k, .v = v, .map = &map};
  args.out = bench.Empty(c.shape(), kBF16);
  bench.Flops(name, c.Flops(), [&] { bench.backend().SlaAttention(args); });
  cuda::AttentionProblem problem = cuda::AttentionProblem::Of(q, k, v, args.out);
  problem.list = cuda::BlockList::Critical(map);
  bench.Flops(name + ": mma.sync", c.Flops(), [&] {
    cuda::RunAttention(bench.backend().context(), problem, cuda::AttentionKernel::kTensorCore);
  });
}

// run(args) with a map made before it; and with `parts` with one from means that are there already.
template <class Args, class Run>
void BenchWithMap(Bench& bench, const SparseCase& c, const Args& args, const BlockMapArgs& map_args,
                  bool parts, const std::string& name, const Run& run) {
  const auto with_map = [&](const BlockMapArgs& own_args) {
    const BlockMap own = bench.backend().MakeBlockMap(own_args);
    Args with_own = args;
    with_own.map = &own;
    run(with_own);
  };
  bench.Flops(name + ": with map", c.Flops(), [&] { with_map(map_args); });
  if (!parts) return;
  const BlockMapArgs from_means = MapArgsWithMeans(bench, c, map_args);
  bench.Flops(name + ": with map from means", c.Flops(), [&] { with_map(from_means); });
}

// Map, sparse and linear branch; and with `parts` less of them.
void BenchSla(Bench& bench, const SparseCase& c, bool parts, const std::string& name) {
  if (!bench.Wanted(name)) return;
  const Tensor q = bench.Random(c.shape(), kBF16), k = bench.Random(c.shape(), kBF16);
  const BlockMapArgs map_args = MapArgs(c, q, k);
  Backend& backend = bench.backend();
  const BlockMap map = backend.MakeBlockMap(map_args);
  SlaArgs args{.q = q, .k = k, .v = bench.Random(c.shape(), kBF16), .map = &map, .scope = c.scope};
  args.proj_weight = bench.Random({kHeadSize, kHeadSize}, kF32);
  args.proj_bias = bench.Random({kHeadSize}, kF32);
  args.out = bench.Empty(c.shape(), kBF16);
  if (parts) {
    bench.Flops(name, c.Flops(), [&] { backend.SlaAttention(args); });
    bench.Flops(name + ": in two kernels", c.Flops(), [&] {
      cuda::SlaAttention(bench.backend().context(), args, cuda::SlaWay::kSeparate);
    });
  }
  BenchWithMap(bench, c, args, map_args, parts, name,
               [&](const SlaArgs& with_map) { backend.SlaAttention(with_map); });
}

// SALAD's layer between its projections: map, both branches, gate and mixing; and with `parts` less
// of them.
void BenchSalad(Bench& bench, const SparseCase& c, bool parts, const std::string& name) {
  if (!bench.Wanted(name)) return;
  const std::int64_t width = c.heads * kHeadSize;
  const Tensor q = bench.Random(c.shape(), kBF16), k = bench.Random(c.shape(), kBF16);
  const BlockMapArgs map_args = MapArgs(c, q, k);
  Backend& backend = bench.backend();
  const BlockMap map = backend.MakeBlockMap(map_args);
  SaladArgs args{.q = q, .k = k, .v = bench.Random(c.shape(), kBF16)};
  args.q_normed = bench.Random(c.shape(), kBF16);
  args.k_normed = bench.Random(c.shape(), kBF16);
  args.cos = bench.Random({c.tokens, kHeadSize / 2}, kF32);
  args.sin = bench.Random({c.tokens, kHeadSize / 2}, kF32);
  args.x = bench.Random({c.batch, c.tokens, width}, kBF16);
  args.map = &map;
  args.proj_weight = bench.Random({width, width}, kBF16, 0.02f);
  args.proj_bias = bench.Random({width}, kF32);
  args.gate_weight = bench.Random({1, width}, kF32, 0.02f);
  args.gate_bias = bench.Random({1}, kF32);
  args.out = bench.Empty({c.batch, c.tokens, width}, kBF16);
  if (parts) {
    bench.Flops(name, c.Flops(), [&] { backend.SaladAttention(args); });
    bench.Flops(name + ": pass by pass", c.Flops(), [&] {
      cuda::SaladAttention(bench.backend().context(), args, cuda::SaladWay::kPlain);
    });
  }
  BenchWithMap(bench, c, args, map_args, parts, name,
               [&](const SaladArgs& with_map) { backend.SaladAttention(with_map); });
}

// The linear branch alone, every head at once. Bytes: Q, K, V and out once.
void BenchLinearBranch(Bench& bench, LinearScope scope, int block_q, cuda::Feature feature,
                       const std::string& name) {
  if (!bench.Wanted(name)) return;
  const Shape shape{1, kTokens, kHeads, kHeadSize};
  cuda::LinearBranchArgs args;
  args.q = bench.Random(shape, kBF16);
  args.k = bench.Random(shape, kBF16);
  args.v = bench.Random(shape, kBF16);
  args.out = bench.Empty(shape, kBF16);
  args.feature = feature;
  args.scope = scope;
  BlockMapArgs map_args{.q = args.q, .k = args.k};
  map_args.options.block_q = block_q;
  const BlockMap map = bench.backend().MakeBlockMap(map_args);
  args.map = &map;
  if (feature == cuda::Feature::kRotatedRelu) {
    args.cos = bench.Random({kTokens, kHeadSize / 2}, kF32);
    args.sin = bench.Random({kTokens, kHeadSize / 2}, kF32);
  } else {
    args.proj_weight = bench.Random({kHeadSize, kHeadSize}, kF32);
    args.proj_bias = bench.Random({kHeadSize}, kF32);
    args.accumulate = true;
    bench.backend().Zero(args.out);
  }
  bench.Bytes(name, 4.0 * args.q.NumBytes(),
              [&] { cuda::LinearBranch(bench.backend().context(), args); });
}

// The first half of the linear branch, by both kernels. Bytes: K and V once, and the sums where
// there is one per query block.
void BenchStates(Bench& bench, LinearScope scope, const std::string& name) {
  if (!bench.Wanted(name)) return;
  const Shape shape{1, kTokens, kHeads, kHeadSize};
  cuda::LinearBranchArgs args;
  args.q = args.k = bench.Random(shape, kBF16);
  args.v = bench.Random(shape, kBF16);
  args.scope = scope;
  const BlockMap map = bench.backend().MakeBlockMap({.q = args.q, .k = args.k});
  args.map = &map;
  args.proj_weight = bench.Random({kHeadSize, kHeadSize}, kF32);
  const double states = scope == LinearScope::kAll ? 1 : (kTokens + 63) / 64;
  const double bytes = 2.0 * args.k.NumBytes() + states * kHeads * kHeadSize * (kHeadSize + 1) * 2;
  const cuda::Context& context = bench.backend().context();
  for (const auto kernel :
       {cuda::StateKernelKind::kTensorCore, cuda::ChooseStateKernel(context.compute_major)}) {
    const bool hopper = kernel == cuda::StateKernelKind::kHopper;
    bench.Bytes(name + (hopper ? ", wgmma" : ", mma.sync"), bytes, [&] {
      cuda::VisitLinearStates(context, args, kernel, [](const cuda::LinearStates&) {});
    });
  }
}

// SLA's gradients: all of them, the sparse branch by each kernel, the linear branch. FLOP: the five
// products that the critical pairs need, whatever is computed twice.
void BenchBackward(Bench& bench, const SparseCase& c, const std::string& name) {
  if (!bench.Wanted(name)) return;
  const Shape shape = c.shape();
  Backend& backend = bench.backend();
  const cuda::Context& context = bench.backend().context();
  SlaBackwardArgs args;
  args.q = bench.Random(shape, kBF16);
  args.k = bench.Random(shape, kBF16);
  args.v = bench.Random(shape, kBF16);
  args.d_out = bench.Random(shape, kBF16);
  for (Tensor* x : {&args.out, &args.d_q, &args.d_k, &args.d_v}) *x = bench.Empty(shape, kBF16);
  args.lse = bench.Empty({c.batch, c.heads, c.tokens}, kF32);
  args.proj_weight = bench.Random({kHeadSize, kHeadSize}, kF32);
  args.proj_bias = bench.Random({kHeadSize}, kF32);
  args.d_proj_weight = bench.Empty({kHeadSize, kHeadSize}, kF32);
  args.d_proj_bias = bench.Empty({kHeadSize}, kF32);
  args.scope = c.scope;
  const BlockMap map = backend.MakeBlockMap(MapArgs(c, args.q, args.k));
  args.map = &map;
  SlaArgs forward{.q = args.q, .k = args.k, .v = args.v, .map = &map, .scope = c.scope};
  forward.proj_weight = args.proj_weight;
  forward.proj_bias = args.proj_bias;
  forward.out = args.out;
  forward.lse = args.lse;
  const double flops = 2.5 * c.Flops();
  bench.Flops(name + ": forward that saves lse", 0.4 * flops,
              [&] { backend.SlaAttention(forward); });
  bench.Flops(name, flops, [&] { backend.SlaAttentionBackward(args); });
  bench.Bytes(name + ": lists", static_cast<double>(map.classes.NumBytes()),
              [&] { cuda::MakeQueryLists(context, map); });
  const Tensor delta = bench.Empty(args.lse.shape(), kF32);
  bench.Bytes(name + ": delta", 2.0 * args.q.NumBytes(), [&] {
    cuda::DeltaArgs rows;
    rows.out = args.out;
    rows.d_out = args.d_out;
    rows.delta = delta;
    cuda::SparseDelta(context, rows);
  });
  const cuda::QueryLists queries = cuda::MakeQueryLists(context, map);
  cuda::SparseGradientProblem sparse =
      cuda::MakeSparseGradient(args.q, args.k, args.v, args.d_out, map, queries);
  sparse.lse = args.lse.data<float>();
  sparse.delta = delta.data<float>();
  sparse.d_q = args.d_q.raw();
  sparse.d_k = args.d_k.raw();
  sparse.d_v = args.d_v.raw();
  sparse.accumulate = true;
  bench.Flops(name + ": sparse, mma.sync", flops,
              [&] { cuda::SparseGradient(context, sparse, cuda::GradientKernel::kTensorCore); });
  const bool small = c.block_q % 64 != 0 || c.block_k % 64 != 0;
  if (small) {
    bench.Flops(name + ": sparse, row by row", flops,
                [&] { cuda::SparseGradient(context, sparse, cuda::GradientKernel::kRow); });
  } else if (context.compute_major == cuda::kHopperMajor) {
    bench.Flops(name + ": sparse, wgmma", flops,
                [&] { cuda::SparseGradient(context, sparse, cuda::GradientKernel::kHopper); });
  }
  cuda::LinearGradientArgs linear;
  linear.q = args.q;
  linear.k = args.k;
  linear.v = args.v;
  linear.scope = c.scope;
  linear.map = &map;
  linear.proj_weight = args.proj_weight;
  linear.d_out = args.d_out;
  linear.d_q = args.d_q;
  linear.d_k = args.d_k;
  linear.d_v = args.d_v;
  linear.delta = delta;
  linear.d_proj_weight = args.d_proj_weight;
  bench.Bytes(name + ": linear", 7.0 * args.q.NumBytes(),
              [&] { cuda::LinearGradient(context, linear); });
  if (!small) return;
  bench.Bytes(name + ": linear, row by row", 7.0 * args.q.NumBytes(),
              [&] { cuda::RowLinearGradient(context, linear); });
}

// The sparse branch alone, by each kernel that takes small blocks.
void BenchSmallBlocks(Bench& bench, const SparseCase& c, const std::string& name) {
  if (!bench.Wanted(name)) return;
  const Tensor q = bench.Random(c.shape(), kBF16), k = bench.Random(c.shape(), kBF16);
  const Tensor v = bench.Random(c.shape(), kBF16), out = bench.Empty(c.shape(), kBF16);
  const BlockMap map = bench.backend().MakeBlockMap(MapArgs(c, q, k));
  cuda::AttentionProblem problem = cuda::AttentionProblem::Of(q, k, v, out);
  problem.list = cuda::BlockList::Critical(map);
  const cuda::Context& context = bench.backend().context();
  using cuda::AttentionKernel;
  bench.Flops(name + ": mma.sync", c.Flops(),
              [&] { cuda::RunAttention(context, problem, AttentionKernel::kTensorCore); });
  bench.Flops(name + ": row by row", c.Flops(),
              [&] { cuda::RunAttention(context, problem, AttentionKernel::kRow); });
}

// Models of two heads and a few thousand tokens: a request with guidance, and a batch of training.
void BenchBlocksOf16(Bench& bench) {
  for (const std::int64_t batch : {2, 16}) {
    const std::string name = "small 16x16, batch " + std::to_string(batch);
    const SparseCase sla{.tokens = 2304,
                         .heads = 2,
                         .block_q = 16,
                         .scope = LinearScope::kMarginal,
                         .block_k = 16,
                         .batch = batch,
                         .negligible = 0.1};
    SparseCase salad = sla;
    salad.topk = 0.1;
    salad.negligible = 0.0;
    BenchSmallBlocks(bench, sla, name + ": sparse 0.05");
    BenchSla(bench, sla, true, name + ": SLA 0.05 marginal");
    BenchSalad(bench, salad, true, name + ": SALAD 0.10");
    BenchBackward(bench, sla, name + ": backward SLA 0.05");
  }
  BenchSla(bench,
           {.tokens = 7488,
            .heads = 2,
            .block_q = 16,
            .scope = LinearScope::kMarginal,
            .block_k = 16,
            .batch = 2,
            .negligible = 0.1},
           true, "small 16x16, 7488 tokens: SLA 0.05 marginal");
}

void BenchMassKept(Bench& bench) {
  const std::string name = "sla softmax mass kept, 64 rows a head";
  if (!bench.Wanted(name)) return;
  const Shape shape{1, kTokens, kHeads, kHeadSize};
  const Tensor q = bench.Random(shape, kBF16), k = bench.Random(shape, kBF16);
  const Tensor out = bench.Empty({1}, kF32);
  Backend& backend = bench.backend();
  const BlockMap map = backend.MakeBlockMap({.q = q, .k = k});
  bench.Bytes(name, q.NumBytes(), [&] { backend.AttentionMassKept(q, k, 0.088f, map, 64, out); });
  bench.Bytes(name + ", f32", q.NumBytes(), [&] {
    cuda::AttentionMassKept(bench.backend().context(), q, k, 0.088f, map, 64, out,
                            cuda::MassWay::kPlain);
  });
}

// How time grows with the number of tokens and with the share of blocks that are kept.
void BenchSweeps(Bench& bench) {
  for (const std::int64_t tokens : {8192, 16384, 32768, 65536, 131072}) {
    const std::string name = "sweep length " + std::to_string(tokens);
    BenchDense(bench, tokens, tokens, kHeads, kHeadSize, cuda::AttentionKernel::kHopper,
               name + ": dense");
    BenchSla(bench, {.tokens = tokens}, false, name + ": SLA 0.05");
    BenchSalad(bench, {.tokens = tokens, .topk = 0.1}, false, name + ": SALAD 0.10");
  }
  for (const char* topk : {"0.02", "0.05", "0.10", "0.20", "0.30", "0.50", "0.75", "1.00"}) {
    const std::string name = std::string("sweep topk ") + topk;
    BenchSla(bench, {.topk = std::stod(topk)}, false, name + ": SLA");
    BenchSla(bench, {.block_q = 64, .topk = std::stod(topk), .scope = LinearScope::kMarginal},
             false, name + ": SLA 64x64 marginal");
  }
}

void BenchSparseShapes(Bench& bench) {
  const SparseCase wide, narrow{.block_q = 64, .scope = LinearScope::kMarginal};
  BenchMap(bench, wide, "map 128x64");
  BenchMap(bench, narrow, "map 64x64");
  BenchSparse(bench, wide, "sparse 0.05 128x64");
  BenchSparse(bench, narrow, "sparse 0.05 64x64");
  BenchSparse(bench, {.tokens = 32768, .block_q = 64}, "sparse 0.05 64x64, 32768 tokens");
  BenchSparse(bench, {.tokens = 32768, .block_q = 64, .topk = 0.1},
              "sparse 0.10 64x64, 32768 tokens");
  BenchSparse(bench, {.topk = 0.1}, "sparse 0.10 128x64");
  BenchSla(bench, wide, true, "sla 0.05 128x64 all");
  BenchSla(bench, narrow, true, "sla 0.05 64x64 marginal");
  BenchSla(bench, {.block_q = 64, .scope = LinearScope::kNonCritical}, true,
           "sla 0.05 64x64 noncritical");
  BenchSalad(bench, {.topk = 0.1}, true, "salad 0.10 128x64");
  BenchSalad(bench, {.block_q = 64, .topk = 0.1}, true, "salad 0.10 64x64");
}

}  // namespace

void BenchAttention(Bench& bench) {
  BenchDenseShapes(bench);
  BenchSparseShapes(bench);
  using cuda::Feature;
  BenchLinearBranch(bench, LinearScope::kAll, 128, Feature::kSoftmax, "sla branch alone, all");
  BenchLinearBranch(bench, LinearScope::kMarginal, 64, Feature::kSoftmax,
                    "sla branch alone, marginal 64x64");
  BenchLinearBranch(bench, LinearScope::kAll, 64, Feature::kRotatedRelu, "salad branch alone");
  BenchStates(bench, LinearScope::kAll, "sla sums, all");
  BenchStates(bench, LinearScope::kMarginal, "sla sums, marginal 64x64");
  BenchBackward(bench, {}, "backward all 128x64 topk 0.05");
  BenchBackward(bench, {.block_q = 64, .scope = LinearScope::kMarginal},
                "backward marginal 64x64 topk 0.05");
  BenchBlocksOf16(bench);
  BenchMassKept(bench);
  BenchSla(bench, {.tokens = 75600, .heads = 40}, true, "14B shape, SLA 0.05 128x64 all");
  BenchSweeps(bench);
}

}  // namespace slalom
