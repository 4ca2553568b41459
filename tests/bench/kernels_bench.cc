// Times the CUDA back end's operations at the sizes of Wan2.1-1.3B at 480x832x81, on random data.
// Prints a table; with --json FILE also writes the numbers there. Needs CUDA and this tree alone.
//
//   kernels_bench [--filter TEXT] [--json FILE]
#include "tests/bench/kernels_bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <thread>

#include "kernels/core/error.h"

namespace slalom {
namespace {

constexpr DType kBF16 = DType::kBF16;
constexpr DType kF32 = DType::kF32;
constexpr std::int64_t kHidden = 8960;
constexpr std::int64_t kThreads = 8;

// splitmix64: value i of a sequence depends on i alone, so that threads can share the work.
// Hundreds of millions of values must not take longer than the benches.
constexpr std::uint64_t kRandomStep = 0x9E3779B97F4A7C15u;
std::uint64_t RandomAt(std::uint64_t start, std::int64_t i) {
  std::uint64_t z = start + static_cast<std::uint64_t>(i + 1) * kRandomStep;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

void Print(const Row& row) {
  const double rate = row.work / (row.milliseconds * 1e-3) * (row.bytes ? 1e-9 : 1e-12);
  std::printf("%-44s %9.4f ms %9.1f %s\n", row.name.c_str(), row.milliseconds, rate,
              row.bytes ? "GB/s" : "TFLOP/s");
  std::fflush(stdout);
}

}  // namespace

Tensor Bench::Random(const Shape& shape, DType type, float scale) {
  const Tensor host = Tensor::Host(shape, kF32);
  const float step = scale * std::sqrt(12.0f) / 0x1p32f;
  float* values = host.data<float>();
  const std::int64_t count = host.NumElements(), share = (count + kThreads - 1) / kThreads;
  std::vector<std::thread> threads;
  for (std::int64_t first = 0; first < count; first += share) {
    threads.emplace_back([=, start = random_] {
      for (std::int64_t i = first; i < std::min(first + share, count); ++i) {
        values[i] = static_cast<float>(static_cast<std::int32_t>(RandomAt(start, i))) * step;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  random_ += static_cast<std::uint64_t>(count) * kRandomStep;
  const Tensor device = backend_.Allocate(shape, type);
  backend_.Copy(host, device);
  return device;
}

void Bench::Time(const std::string& name, double work, bool bytes,
                 const std::function<void()>& run) {
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

void Bench::WriteJson(const std::string& path) const {
  std::ofstream out(path);
  out << "{\"device\": \"" << backend_.Describe() << "\", \"rows\": [";
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    out << (i == 0 ? "" : ", ") << "{\"name\": \"" << row.name << "\", \"ms\": " << row.milliseconds
        << ", \"" << (row.bytes ? "bytes" : "flop") << "\": " << row.work << "}";
  }
  out << "]}\n";
  if (!out) throw Error(ErrorCode::kUnavailable, "cannot write " + path);
}

double Bench::Seconds(const std::function<void()>& run, int repeats) {
  backend_.Synchronize();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < repeats; ++i) run();
  backend_.Synchronize();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

namespace {

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
  if (!bench.Wanted("copy 800 MB") && !bench.Wanted("layer norm + modulation, f32 to bf16") &&
      !bench.Wanted("rms norm, bf16") && !bench.Wanted("q/k norm + rope + means of 128")) {
    return;
  }
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
