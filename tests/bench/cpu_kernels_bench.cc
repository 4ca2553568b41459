// Rates of the CPU back end's operations: cpu_kernels_bench [threads]. One line per case: its best
// time of several, the arithmetic rate, and the rate per second of processor time, which is what
// counts on a machine that others use too (run it with 1 thread there).
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/random.h"

namespace slalom {
namespace {

class Bench {
 public:
  Bench(Backend& backend, DType type) : backend_(backend), type_(type) {}

  void Linears();
  void Convolutions();
  void Attentions();

 private:
  Tensor Noise(const Shape& shape, DType type) {
    std::vector<float> values(static_cast<std::size_t>(shape.NumElements()));
    FillNormal(1, stream_++, 0, values);
    Tensor out = backend_.Allocate(shape, type);
    backend_.Copy(Tensor::FromFloats(shape, values), out);
    return out;
  }
  // Prints the line and returns the best processor time.
  double Report(const std::string& what, double flop, const std::function<void()>& run);
  void Sparse(const Tensor& q, const Tensor& k, const Tensor& v, double topk, int block,
              double dense);

  Backend& backend_;
  DType type_;
  std::uint64_t stream_ = 0;
};

double Bench::Report(const std::string& what, double flop, const std::function<void()>& run) {
  constexpr int kRuns = 5;
  double best = 1e30;
  double best_cpu = 1e30;
  for (int i = 0; i <= kRuns; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const std::clock_t cpu_start = std::clock();
    run();
    backend_.Synchronize();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const double cpu = static_cast<double>(std::clock() - cpu_start) / CLOCKS_PER_SEC;
    if (i == 0) continue;
    best = std::min(best, seconds.count());
    best_cpu = std::min(best_cpu, cpu);
  }
  std::printf("%-5s %-42s %9.2f ms %8.1f GFLOP/s %8.1f per core\n",
              type_ == DType::kF32 ? "f32" : "bf16", what.c_str(), best * 1e3, flop / best * 1e-9,
              flop / best_cpu * 1e-9);
  std::fflush(stdout);
  return best_cpu;
}

void Bench::Linears() {
  struct Size {
    std::int64_t m, n, k;
  };
  for (const Size s : {Size{2304, 256, 256}, Size{2304, 1024, 256}, Size{2304, 256, 1024},
                       Size{2304, 1536, 1536}}) {
    const Tensor x = Noise(Shape{s.m, s.k}, type_);
    const Tensor w = Noise(Shape{s.n, s.k}, type_);
    const Tensor b = Noise(Shape{s.n}, DType::kF32);
    const Tensor gate = Noise(Shape{1, s.n}, DType::kF32);
    const Tensor out = backend_.Allocate(Shape{s.m, s.n}, type_);
    const Tensor residual = backend_.Allocate(Shape{s.m, s.n}, DType::kF32);
    backend_.Zero(residual);
    const std::string size =
        std::to_string(s.m) + "x" + std::to_string(s.n) + "x" + std::to_string(s.k);
    const double flop = 2.0 * static_cast<double>(s.m * s.n * s.k);
    LinearArgs args{.x = x, .weight = w, .bias = b, .out = out};
    Report("linear " + size, flop, [&] { backend_.Linear(args); });
    args.activation = Activation::kGeluTanh;
    Report("linear, gelu " + size, flop, [&] { backend_.Linear(args); });
    args.activation = Activation::kNone;
    args.residual = args.out = residual;
    args.gate = gate;
    Report("linear, gated f32 residual " + size, flop, [&] { backend_.Linear(args); });
  }
}

void Bench::Convolutions() {
  struct Size {
    std::int64_t frames, side, in, out, kt, k;
    bool upsample;
  };
  for (const Size s : {Size{1, 256, 16, 16, 3, 3, false}, Size{4, 256, 16, 16, 3, 3, false},
                       Size{4, 256, 16, 3, 3, 3, false}, Size{4, 128, 32, 32, 3, 3, false},
                       Size{4, 128, 32, 16, 1, 3, true}, Size{2, 64, 64, 64, 3, 3, false},
                       Size{1, 32, 64, 64, 3, 3, false}, Size{2, 64, 64, 128, 3, 1, false},
                       Size{1, 60, 384, 384, 3, 3, false}}) {
    const Tensor x = Noise(Shape{s.frames, s.side, s.side, s.in}, type_);
    const Tensor w = Noise(Shape{s.out, s.kt, s.k, s.k, s.in}, type_);
    const std::int64_t side = s.upsample ? 2 * s.side : s.side;
    ConvArgs args{.x = x, .weight = w, .bias = Noise(Shape{s.out}, DType::kF32)};
    if (s.kt > 1) args.history = Noise(Shape{2, s.side, s.side, s.in}, type_);
    args.upsample = s.upsample;
    args.out = backend_.Allocate(Shape{s.frames, side, side, s.out}, type_);
    const double flop =
        2.0 * static_cast<double>(s.frames * side * side * s.in * s.out * s.kt * s.k * s.k);
    Report("conv " + std::to_string(s.frames) + "x" + std::to_string(s.side) + "^2 " +
               std::to_string(s.in) + "->" + std::to_string(s.out) + " kt" + std::to_string(s.kt) +
               (s.upsample ? " up" : ""),
           flop, [&] { backend_.Conv(args); });
  }
  const Tensor x = Noise(Shape{4, 256, 256, 16}, type_);
  const Tensor gamma = Noise(Shape{16}, DType::kF32);
  Report("channel norm, silu 4x256^2 16", 0,
         [&] { backend_.ChannelNorm({.x = x, .gamma = gamma, .silu = true, .out = x}); });
}

void Bench::Attentions() {
  for (const std::int64_t length : {2304, 7488}) {
    const Shape shape{1, length, 2, 128};
    const Tensor q = Noise(shape, type_);
    const Tensor k = Noise(shape, type_);
    const Tensor v = Noise(shape, type_);
    const Tensor out = backend_.Allocate(shape, type_);
    const double dense =
        Report("dense attention L " + std::to_string(length),
               4.0 * static_cast<double>(length * length) * 256,
               [&] { backend_.Attention({.q = q, .k = k, .v = v, .scale = 0.088f, .out = out}); });
    for (const int block : {16, 64}) {
      for (const double topk : {0.05, 0.10}) Sparse(q, k, v, topk, block, dense);
    }
  }
}

void Bench::Sparse(const Tensor& q, const Tensor& k, const Tensor& v, double topk, int block,
                   double dense) {
  const std::string at = " topk " + std::to_string(topk).substr(0, 4) + " blocks of " +
                         std::to_string(block) + " L " + std::to_string(q.dim(1));
  BlockMap map;
  const BlockMapOptions options{BlockMapKind::kTopK, topk, 0.1, block, block};
  const double map_time = Report("block map" + at, 0, [&] {
    map = backend_.MakeBlockMap({.q = q, .k = k, .options = options});
  });
  SlaArgs args{.q = q, .k = k, .v = v, .map = &map};
  args.proj_weight = Noise(Shape{128, 128}, DType::kF32);
  args.proj_bias = Noise(Shape{128}, DType::kF32);
  args.out = backend_.Allocate(q.shape(), type_);
  for (const LinearScope scope :
       {LinearScope::kMarginal, LinearScope::kNonCritical, LinearScope::kAll}) {
    args.scope = scope;
    const double time = Report("SLA scope " + std::to_string(static_cast<int>(scope)) + at, 0,
                               [&] { backend_.SlaAttention(args); });
    std::printf("      dense / (map + SLA) = %.1f\n", dense / (time + map_time));
  }
}

}  // namespace
}  // namespace slalom

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 0;
  const auto backend = slalom::MakeBackend(slalom::Device{}, {.cpu_threads = threads});
  std::printf("%s\n", backend->Describe().c_str());
  for (const slalom::DType type : {slalom::DType::kF32, slalom::DType::kBF16}) {
    slalom::Bench bench(*backend, type);
    bench.Linears();
    bench.Convolutions();
    bench.Attentions();
  }
  return 0;
}
