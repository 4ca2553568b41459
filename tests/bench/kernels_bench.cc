// Times the CUDA back end's operations at the sizes of Wan2.1-1.3B at 480x832x81, on random data.
// Prints a table; with --json FILE also writes the numbers there. Needs CUDA and this tree alone.
//
//   kernels_bench [--filter TEXT] [--json FILE]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/core/error.h"
#include "kernels/cuda/attention/backward.h"
#include "kernels/cuda/attention/block_map.h"
#include "kernels/cuda/attention/linear_branch.h"
#include "kernels/cuda/attention/problem.h"
#include "kernels/cuda/attention/sla.h"
#include "kernels/cuda/cuda_backend.h"

namespace slalom {
namespace {

constexpr DType kBF16 = DType::kBF16;
constexpr DType kF32 = DType::kF32;
constexpr std::int64_t kTokens = 32760;
constexpr std::int64_t kWidth = 1536;
constexpr std::int64_t kHeads = 12;
constexpr std::int64_t kHeadSize = 128;
constexpr std::int64_t kHidden = 8960;

struct Row {
  std::string name;
  double milliseconds = 0;
  double work = 0;  // FLOP or bytes
  bool bytes = false;
};

class Bench {
 public:
  Bench(cuda::CudaBackend& backend, std::string filter)
      : backend_(backend), filter_(std::move(filter)) {}

  // N(0, 1), uploaded once per shape and type and shared: benches only read inputs.
  Tensor Random(const Shape& shape, DType type, float scale = 1.0f) {
    const Tensor host = Tensor::Host(shape, kF32);
    std::uniform_real_distribution<float> uniform(-1.7f * scale, 1.7f * scale);
    float* values = host.data<float>();
    const std::int64_t period = std::min<std::int64_t>(host.NumElements(), 1 << 20);
    for (std::int64_t i = 0; i < period; ++i) values[i] = uniform(random_);
    // Filling hundreds of millions of values one by one would take longer than the benches.
    for (std::int64_t i = period; i < host.NumElements(); ++i) {
      values[i] = values[(i * 2654435761u) % static_cast<std::uint64_t>(period)];
    }
    const Tensor device = backend_.Allocate(shape, type);
    backend_.Copy(host, device);
    return device;
  }
  Tensor Empty(const Shape& shape, DType type) { return backend_.Allocate(shape, type); }

  bool Wanted(const std::string& name) const { return name.find(filter_) != std::string::npos; }

  // The median of 7 samples of at least 20 ms each, after a warm-up.
  void Time(const std::string& name, double work, bool bytes, const std::function<void()>& run) {
    if (!Wanted(name)) return;
    try {
      const double once = Seconds(run, 2) / 2;
      const int repeats = std::max(1, static_cast<int>(0.02 / std::max(once, 1e-7)));
      std::vector<double> samples;
      for (int i = 0; i < 7; ++i) samples.push_back(Seconds(run, repeats) / repeats);
      std::sort(samples.begin(), samples.end());
      rows_.push_back({name, samples[samples.size() / 2] * 1e3, work, bytes});
      Print(rows_.back());
    } catch (const Error& error) {
      std::printf("%-44s %s\n", name.c_str(), error.what());
    }
  }
  void Flops(const std::string& name, double flops, const std::function<void()>& run) {
    Time(name, flops, false, run);
  }
  void Bytes(const std::string& name, double bytes, const std::function<void()>& run) {
    Time(name, bytes, true, run);
  }

  static void Print(const Row& row) {
    const double rate = row.work / (row.milliseconds * 1e-3) * (row.bytes ? 1e-9 : 1e-12);
    std::printf("%-44s %9.4f ms %9.1f %s\n", row.name.c_str(), row.milliseconds, rate,
                row.bytes ? "GB/s" : "TFLOP/s");
    std::fflush(stdout);
  }

  void WriteJson(const std::string& path) const {
    std::ofstream out(path);
    out << "{\"device\": \"" << backend_.Describe() << "\", \"rows\": [";
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      const Row& row = rows_[i];
      out << (i == 0 ? "" : ", ") << "{\"name\": \"" << row.name
          << "\", \"ms\": " << row.milliseconds << ", \"" << (row.bytes ? "bytes" : "flop")
          << "\": " << row.work << "}";
    }
    out << "]}\n";
    if (!out) throw Error(ErrorCode::kUnavailable, "cannot write " + path);
  }

  cuda::CudaBackend& backend() { return backend_; }

 private:
  double Seconds(const std::function<void()>& run, int repeats) {
    backend_.Synchronize();
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < repeats; ++i) run();
    backend_.Synchronize();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  cuda::CudaBackend& backend_;
  std::string filter_;
  std::mt19937 random_{1};
  std::vector<Row> rows_;
};

void BenchDense(Bench& bench, std::int64_t q_length, std::int64_t k_length, std::int64_t heads,
                int head_size, cuda::AttentionKernel kernel, const std::string& name) {
  if (!bench.Wanted(name)) return;
  const Shape q_shape{1, q_length, heads, head_size};
  const Shape k_shape{1, k_length, heads, head_size};
  const Tensor q = bench.Random(q_shape, kBF16), k = bench.Random(k_shape, kBF16);
  const Tensor v = bench.Random(k_shape, kBF16), out = bench.Empty(q_shape, kBF16);
  cuda::AttentionProblem problem;
  problem.q = q.raw();
  problem.k = k.raw();
  problem.v = v.raw();
  problem.out = out.raw();
  problem.batch = 1;
  problem.heads = heads;
  problem.q_length = q_length;
  problem.k_length = k_length;
  problem.head_size = head_size;
  problem.scale = 1.0f / std::sqrt(static_cast<float>(head_size));
  bench.Flops(name, 4.0 * q_length * k_length * heads * head_size,
              [&] { cuda::RunAttention(bench.backend().context(), problem, kernel); });
}

void BenchAttention(Bench& bench) {
  using cuda::AttentionKernel;
  BenchDense(bench, kTokens, kTokens, kHeads, 128, AttentionKernel::kTensorCore,
             "attention mma.sync 32760 d128");
  BenchDense(bench, 512, 512, 64, 64, AttentionKernel::kTensorCore, "attention mma.sync UMT5");
  BenchDense(bench, 6240, 6240, 1, 384, AttentionKernel::kProduct, "attention products VAE frame");
  if (bench.backend().context().compute_major != 9) return;
  const auto hopper = AttentionKernel::kHopper;
  BenchDense(bench, kTokens, kTokens, kHeads, 128, hopper, "attention hopper 32760 d128");
  BenchDense(bench, 32768, 32768, kHeads, 128, hopper, "attention hopper 32768 d128");
  BenchDense(bench, 32768, 32768, kHeads, 64, hopper, "attention hopper 32768 d64");
  BenchDense(bench, kTokens, 512, kHeads, 128, hopper, "attention hopper cross 32760x512");
}

void BenchSparse(Bench& bench, int block_q, double topk, LinearScope scope, bool linear,
                 const std::string& name) {
  if (!bench.Wanted(name)) return;
  const Shape shape{1, kTokens, kHeads, kHeadSize};
  const Tensor q = bench.Random(shape, kBF16), k = bench.Random(shape, kBF16);
  const Tensor v = bench.Random(shape, kBF16), out = bench.Empty(shape, kBF16);
  const Tensor weight = bench.Random({kHeadSize, kHeadSize}, kF32);
  const Tensor bias = bench.Random({kHeadSize}, kF32);
  BlockMapArgs map_args{.q = q, .k = k};
  map_args.options.block_q = block_q;
  map_args.options.topk = topk;
  Backend& backend = bench.backend();
  bench.Bytes(name + ": map", 2.0 * q.NumBytes(), [&] { backend.MakeBlockMap(map_args); });
  bench.Bytes(name + ": map by the library", 2.0 * q.NumBytes(), [&] {
    cuda::MakeBlockMap(bench.backend().context(), map_args, cuda::RankWay::kLibrary);
  });
  BlockMapArgs from_means = map_args;
  from_means.q_means = bench.Random({1, (kTokens + block_q - 1) / block_q, kWidth}, kF32);
  from_means.k_means = bench.Random({1, (kTokens + 63) / 64, kWidth}, kF32);
  bench.Bytes(name + ": map from means", from_means.q_means.NumBytes(),
              [&] { backend.MakeBlockMap(from_means); });
  const BlockMap map = backend.MakeBlockMap(map_args);
  SlaArgs args{.q = q, .k = k, .v = v, .map = &map, .scope = scope};
  if (linear) {
    args.proj_weight = weight;
    args.proj_bias = bias;
  }
  args.out = out;
  const double pairs = static_cast<double>(CriticalBlocks(topk, (kTokens + 63) / 64)) * 64.0;
  const double flops = 4.0 * kTokens * pairs * kWidth;
  bench.Flops(name, flops, [&] { backend.SlaAttention(args); });
  if (!linear) return;
  const cuda::Context& context = bench.backend().context();
  bench.Flops(name + ": in two kernels", flops,
              [&] { cuda::SlaAttention(context, args, cuda::SlaWay::kSeparate); });
  bench.Flops(name + ": with map", flops, [&] {
    const BlockMap own = backend.MakeBlockMap(map_args);
    SlaArgs with_map = args;
    with_map.map = &own;
    backend.SlaAttention(with_map);
  });
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
  for (const auto kernel : {cuda::StateKernelKind::kTensorCore,
                            cuda::ChooseStateKernel(args.feature, context.compute_major)}) {
    const bool hopper = kernel == cuda::StateKernelKind::kHopper;
    bench.Bytes(name + (hopper ? ", wgmma" : ", mma.sync"), bytes, [&] {
      cuda::VisitLinearStates(context, args, kernel, [](const cuda::LinearStates&) {});
    });
  }
}

// SLA's gradients: all of them, the sparse branch by each kernel, the linear branch. FLOP: the five
// products that the critical pairs need, whatever is computed twice.
void BenchBackward(Bench& bench, int block_q, double topk, LinearScope scope,
                   const std::string& name) {
  if (!bench.Wanted(name)) return;
  const Shape shape{1, kTokens, kHeads, kHeadSize};
  Backend& backend = bench.backend();
  const cuda::Context& context = bench.backend().context();
  SlaBackwardArgs args;
  args.q = bench.Random(shape, kBF16);
  args.k = bench.Random(shape, kBF16);
  args.v = bench.Random(shape, kBF16);
  args.d_out = bench.Random(shape, kBF16);
  for (Tensor* x : {&args.out, &args.d_q, &args.d_k, &args.d_v}) *x = bench.Empty(shape, kBF16);
  args.lse = bench.Empty({1, kHeads, kTokens}, kF32);
  args.proj_weight = bench.Random({kHeadSize, kHeadSize}, kF32);
  args.proj_bias = bench.Random({kHeadSize}, kF32);
  args.d_proj_weight = bench.Empty({kHeadSize, kHeadSize}, kF32);
  args.d_proj_bias = bench.Empty({kHeadSize}, kF32);
  args.scope = scope;
  BlockMapArgs map_args{.q = args.q, .k = args.k};
  map_args.options.block_q = block_q;
  map_args.options.topk = topk;
  const BlockMap map = backend.MakeBlockMap(map_args);
  args.map = &map;
  SlaArgs forward{.q = args.q, .k = args.k, .v = args.v, .map = &map, .scope = scope};
  forward.proj_weight = args.proj_weight;
  forward.proj_bias = args.proj_bias;
  forward.out = args.out;
  forward.lse = args.lse;
  const double pairs = static_cast<double>(CriticalBlocks(topk, (kTokens + 63) / 64)) * 64.0;
  const double flops = 10.0 * kTokens * pairs * kWidth;
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
  if (context.compute_major == 9) {
    bench.Flops(name + ": sparse, wgmma", flops,
                [&] { cuda::SparseGradient(context, sparse, cuda::GradientKernel::kHopper); });
  }
  cuda::LinearGradientArgs linear;
  linear.q = args.q;
  linear.k = args.k;
  linear.v = args.v;
  linear.scope = scope;
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

enum class Extras { kNone, kBias, kGate };  // kGate: bias, gate and an f32 residual

void BenchLinear(Bench& bench, std::int64_t n, std::int64_t k, Activation activation, Extras extras,
                 const std::string& name) {
  if (!bench.Wanted(name)) return;
  const DType out_type = extras == Extras::kGate ? kF32 : kBF16;
  LinearArgs args;
  args.x = bench.Random({kTokens, k}, kBF16);
  args.weight = bench.Random({n, k}, kBF16, 0.02f);
  if (extras != Extras::kNone) args.bias = bench.Random({n}, kF32);
  args.activation = activation;
  args.out = bench.Empty({kTokens, n}, out_type);
  if (extras == Extras::kGate) {
    args.residual = args.out;
    args.gate = bench.Random({1, n}, kF32, 0.0f);
    bench.backend().Zero(args.out);
  }
  bench.Flops(name, 2.0 * kTokens * n * k, [&] { bench.backend().Linear(args); });
}

void BenchLinears(Bench& bench) {
  const Activation none = Activation::kNone, gelu = Activation::kGeluTanh;
  BenchLinear(bench, kWidth, kWidth, none, Extras::kNone, "linear 1536x1536 plain");
  BenchLinear(bench, kWidth, kWidth, none, Extras::kBias, "linear 1536x1536 bias");
  BenchLinear(bench, kWidth, kWidth, none, Extras::kGate, "linear 1536x1536 gate + residual");
  BenchLinear(bench, kHidden, kWidth, none, Extras::kNone, "linear 8960x1536 plain");
  BenchLinear(bench, kHidden, kWidth, gelu, Extras::kBias, "linear 8960x1536 gelu");
  BenchLinear(bench, kWidth, kHidden, none, Extras::kNone, "linear 1536x8960 plain");
  BenchLinear(bench, kWidth, kHidden, none, Extras::kBias, "linear 1536x8960 bias");
  BenchLinear(bench, kWidth, kHidden, none, Extras::kGate, "linear 1536x8960 gate + residual");
}

void BenchRows(Bench& bench) {
  if (!bench.Wanted("copy 800 MB") && !bench.Wanted("norm")) return;
  Backend& backend = bench.backend();
  const Tensor x = bench.Random({1, kTokens, kWidth}, kBF16);
  const Tensor stream = bench.Random({1, kTokens, kWidth}, kF32);
  const Tensor out = bench.Empty({1, kTokens, kWidth}, kBF16);
  const Tensor scale = bench.Random({1, kWidth}, kF32), shift = bench.Random({1, kWidth}, kF32);
  const double half = 2.0 * kTokens * kWidth;
  bench.Bytes("copy 800 MB", 8 * 2.0 * half,
              [&, big = bench.Empty({8, kTokens, kWidth}, kBF16),
               to = bench.Empty({8, kTokens, kWidth}, kBF16)] { backend.Copy(big, to); });
  bench.Bytes("layer norm + modulation, f32 to bf16", 3 * half, [&] {
    backend.LayerNorm({.x = stream, .scale = scale, .shift = shift, .out = out});
  });
  bench.Bytes("layer norm + modulation, bf16", 2 * half,
              [&] { backend.LayerNorm({.x = x, .scale = scale, .shift = shift, .out = out}); });
  const Tensor weight = bench.Random({kWidth}, kF32);
  bench.Bytes("rms norm, bf16", 2 * half,
              [&] { backend.RmsNorm({.x = x, .weight = weight, .out = out.Reshape(x.shape())}); });
  const Tensor cos = bench.Random({kTokens, 64}, kF32), sin = bench.Random({kTokens, 64}, kF32);
  bench.Bytes("q/k norm + rope", 2 * half + 2.0 * cos.NumBytes(), [&] {
    backend.QkNormRope({.x = x,
                        .weight = weight,
                        .cos = cos,
                        .sin = sin,
                        .out = out.Reshape({1, kTokens, kHeads, kHeadSize})});
  });
  for (const int pool : {64, 128}) {
    const Tensor means = bench.Empty({1, (kTokens + pool - 1) / pool, kWidth}, kF32);
    bench.Bytes("q/k norm + rope + means of " + std::to_string(pool),
                2 * half + 2.0 * cos.NumBytes(), [&] {
                  backend.QkNormRope({.x = x,
                                      .weight = weight,
                                      .cos = cos,
                                      .sin = sin,
                                      .out = out.Reshape({1, kTokens, kHeads, kHeadSize}),
                                      .means = means,
                                      .pool = pool});
                });
  }
}

void BenchConv(Bench& bench, std::int64_t frames, std::int64_t height, std::int64_t width,
               std::int64_t in, std::int64_t out, bool upsample, const std::string& name) {
  if (!bench.Wanted(name)) return;
  const std::int64_t kt = upsample ? 1 : 3, factor = upsample ? 2 : 1;
  ConvArgs args;
  args.x = bench.Random({frames, height, width, in}, kBF16);
  if (!upsample) args.history = bench.Random({2, height, width, in}, kBF16);
  args.weight = bench.Random({out, kt, 3, 3, in}, kBF16, 0.02f);
  args.bias = bench.Random({out}, kF32);
  args.upsample = upsample;
  args.out = bench.Empty({frames, height * factor, width * factor, out}, kBF16);
  const double flops = 2.0 * args.out.NumElements() * kt * 9 * in;
  bench.Flops(name, flops, [&] { bench.backend().Conv(args); });
}

void BenchDecoder(Bench& bench) {
  BenchConv(bench, 1, 60, 104, 384, 384, false, "conv 384 60x104x1");
  BenchConv(bench, 2, 120, 208, 384, 384, false, "conv 384 120x208x2");
  BenchConv(bench, 4, 240, 416, 192, 192, false, "conv 192 240x416x4");
  BenchConv(bench, 4, 480, 832, 96, 96, false, "conv 96 480x832x4");
  BenchConv(bench, 4, 480, 832, 96, 3, false, "conv 96 to 3 480x832x4");
  BenchConv(bench, 4, 240, 416, 192, 96, true, "conv 192 to 96 doubled 480x832x4");
  if (!bench.Wanted("channel norm")) return;
  const Shape shape{4, 480, 832, 96};
  const Tensor x = bench.Random(shape, kBF16), out = bench.Empty(shape, kBF16);
  const Tensor gamma = bench.Random({96}, kF32);
  bench.Bytes("channel norm + SiLU 96 480x832x4", 2.0 * x.NumBytes(), [&] {
    bench.backend().ChannelNorm({.x = x, .gamma = gamma, .silu = true, .out = out});
  });
}

void RunAll(Bench& bench) {
  BenchRows(bench);
  BenchLinears(bench);
  BenchDecoder(bench);
  BenchAttention(bench);
  BenchSparse(bench, 128, 0.05, LinearScope::kAll, false, "sparse 0.05 128x64");
  BenchSparse(bench, 64, 0.05, LinearScope::kAll, false, "sparse 0.05 64x64");
  BenchSparse(bench, 128, 0.05, LinearScope::kAll, true, "sla 0.05 128x64 all");
  BenchSparse(bench, 64, 0.05, LinearScope::kMarginal, true, "sla 0.05 64x64 marginal");
  using cuda::Feature;
  BenchLinearBranch(bench, LinearScope::kAll, 128, Feature::kSoftmax, "sla branch alone, all");
  BenchLinearBranch(bench, LinearScope::kMarginal, 64, Feature::kSoftmax,
                    "sla branch alone, marginal 64x64");
  BenchLinearBranch(bench, LinearScope::kAll, 64, Feature::kRotatedRelu, "salad branch alone");
  BenchStates(bench, LinearScope::kAll, "sla sums, all");
  BenchStates(bench, LinearScope::kMarginal, "sla sums, marginal 64x64");
  BenchBackward(bench, 128, 0.05, LinearScope::kAll, "backward all 128x64 topk 0.05");
  BenchBackward(bench, 64, 0.05, LinearScope::kMarginal, "backward marginal 64x64 topk 0.05");
  BenchMassKept(bench);
}

int Main(int argc, char** argv) {
  std::string filter, json;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--filter") == 0) filter = argv[i + 1];
    if (std::strcmp(argv[i], "--json") == 0) json = argv[i + 1];
  }
  try {
    if (CudaDeviceCount() == 0) {
      throw Error(ErrorCode::kFailedPrecondition, "this machine has no CUDA device");
    }
    cuda::CudaBackend backend(0, BackendOptions{});
    std::printf("%s\n", backend.Describe().c_str());
    Bench bench(backend, filter);
    RunAll(bench);
    if (!json.empty()) bench.WriteJson(json);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernels_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace slalom

int main(int argc, char** argv) { return slalom::Main(argc, argv); }
