#include "tests/parity/golden.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "kernels/core/error.h"
#include "tests/parity/run_network.h"

namespace slalom {
namespace {

const std::filesystem::path kGoldens = SLALOM_SOURCE_DIR "/tests/parity/goldens";
const std::filesystem::path kDemo = SLALOM_SOURCE_DIR "/model/demo";
constexpr std::string_view kOut = ".out.safetensors";

std::vector<std::string> Arguments(const Weights& out) {
  return nlohmann::json::parse(out.metadata().at("args")).get<std::vector<std::string>>();
}

std::vector<float> Floats(const Tensor& tensor) {
  std::vector<float> values(static_cast<std::size_t>(tensor.NumElements()));
  if (tensor.dtype() == DType::kF32) {
    std::copy_n(tensor.data<float>(), values.size(), values.begin());
  } else if (tensor.dtype() == DType::kBF16) {
    std::transform(tensor.data<BFloat16>(), tensor.data<BFloat16>() + values.size(), values.begin(),
                   [](BFloat16 value) { return static_cast<float>(value); });
  } else {
    throw Error(ErrorCode::kInternal, "not a floating tensor");
  }
  return values;
}

bool IsFloating(const Tensor& tensor) {
  return tensor.dtype() == DType::kF32 || tensor.dtype() == DType::kBF16;
}

bool IsBf16Run(const std::string& name) { return name.ends_with("_bf16"); }

}  // namespace

std::string TestName(const GoldenCase& golden) { return golden.name + "_" + golden.device; }

std::ostream& operator<<(std::ostream& stream, const GoldenCase& golden) {
  return stream << TestName(golden);
}

std::vector<GoldenCase> GoldenCases(const std::vector<std::string>& nets, bool with_bf16) {
  std::vector<GoldenCase> cases;
  for (const auto& entry : std::filesystem::directory_iterator(kGoldens / "cases")) {
    const std::string file = entry.path().filename();
    if (!file.ends_with(kOut)) continue;
    const Weights out = Weights::OpenFile(entry.path());
    const std::string net = Arguments(out)[0];
    if (std::ranges::find(nets, net) == nets.end()) continue;
    if (with_bf16 && std::ranges::none_of(out.Names(), IsBf16Run)) continue;
    const std::string name = file.substr(0, file.size() - kOut.size());
    cases.push_back({name, "cpu"});
    if (net != "tokenizer") cases.push_back({name, "cuda"});
  }
  std::ranges::sort(cases, {}, TestName);
  return cases;
}

Golden::Golden(const GoldenCase& golden) {
  const std::filesystem::path folder = kGoldens / "cases";
  const Weights out = Weights::OpenFile(folder / (golden.name + std::string(kOut)));
  for (const std::string& name : out.Names()) outputs_[name] = out.Get(name);
  const auto& metadata = out.metadata();
  std::vector<std::string> arguments = Arguments(out);
  // NET, then IN and OUT, then options, as on the command line.
  arguments.insert(arguments.begin() + 1, {"-", "-"});
  options_ = ParseNetworkOptions(arguments);
  options_.device = ParseDevice(golden.device);
  if (metadata.contains("in")) inputs_ = NetworkInputs(folder / metadata.at("in"));
  if (metadata.contains("model")) {
    const std::string& model = metadata.at("model");
    options_.model = model == "demo" ? kDemo : kGoldens / model;
  }
}

double MaxRelativeError(const Tensor& a, const Tensor& b) {
  constexpr double kNever = std::numeric_limits<double>::infinity();
  if (!(a.shape() == b.shape())) return kNever;
  const std::vector<float> ours = Floats(a);
  const std::vector<float> theirs = Floats(b);
  double error = 0;
  double largest = 0;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    if (!std::isfinite(ours[i])) return kNever;
    error = std::max(error, std::abs(static_cast<double>(ours[i]) - theirs[i]));
    largest = std::max(largest, std::abs(static_cast<double>(theirs[i])));
  }
  return error == 0 ? 0 : error / largest;
}

void ExpectF32Parity(Backend& backend, const Golden& golden) {
  NetworkOptions options = golden.options();
  options.dtype = DType::kF32;
  const TensorMap ours = RunNetwork(backend, options, golden.inputs());
  for (const auto& [name, expected] : golden.outputs()) {
    if (IsBf16Run(name)) continue;
    SCOPED_TRACE("output " + name);
    ASSERT_TRUE(ours.contains(name));
    const Tensor& actual = ours.at(name);
    if (IsFloating(expected)) {
      const double error = MaxRelativeError(actual, expected);
      std::printf("  %-18s max relative error %.2g\n", name.c_str(), error);
      EXPECT_LE(error, kF32Tolerance);
    } else {
      ASSERT_EQ(actual.dtype(), expected.dtype());
      ASSERT_EQ(ToString(actual.shape()), ToString(expected.shape()));
      EXPECT_EQ(std::memcmp(actual.raw(), expected.raw(), expected.NumBytes()), 0);
    }
  }
}

void ExpectBf16ErrorRule(Backend& backend, const Golden& golden) {
  NetworkOptions options = golden.options();
  options.dtype = DType::kBF16;
  const TensorMap ours = RunNetwork(backend, options, golden.inputs());
  for (const auto& [name, reference] : golden.outputs()) {
    if (!IsBf16Run(name)) continue;
    const std::string plain = name.substr(0, name.size() - std::string_view("_bf16").size());
    SCOPED_TRACE("output " + plain);
    ASSERT_TRUE(ours.contains(plain));
    const Tensor& truth = golden.outputs().at(plain);
    const double error = MaxRelativeError(ours.at(plain), truth);
    const double allowed = 2 * MaxRelativeError(reference, truth);
    std::printf("  %-18s bf16: max relative error %.2g, the reference's %.2g\n", plain.c_str(),
                error, allowed / 2);
    EXPECT_LE(error, allowed);
  }
}

std::unique_ptr<Backend> BackendOrSkip(const std::string& device) {
  if (device == "cuda" && CudaDeviceCount() == 0) {
    [] { GTEST_SKIP() << "no CUDA device: this case has not been run on a GPU"; }();
    return nullptr;
  }
  return MakeBackend(ParseDevice(device));
}

}  // namespace slalom
