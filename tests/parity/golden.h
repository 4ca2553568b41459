// Golden cases: what the official implementations made of given inputs (see README.md), and how
// near we have to come.
#pragma once

#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "tests/parity/network_options.h"
#include "tests/parity/network_tensors.h"

namespace slalom {

// max |a - b| / max |b| has to stay below this in f32.
inline constexpr double kF32Tolerance = 1e-4;

// One committed case and the device to run it on.
struct GoldenCase {
  std::string name;    // "transformer_odd"
  std::string device;  // "cpu" or "cuda"
};
// Names the test: "transformer_odd_cpu".
std::string TestName(const GoldenCase& golden);
std::ostream& operator<<(std::ostream& stream, const GoldenCase& golden);

// The committed cases whose run_network command line begins with one of `nets`, on both devices,
// in the order of their names; only those with a bf16 run of the reference if so asked.
std::vector<GoldenCase> GoldenCases(const std::vector<std::string>& nets, bool with_bf16 = false);

// A case's files, opened.
class Golden {
 public:
  // Throws Error when a file is damaged or missing.
  explicit Golden(const GoldenCase& golden);

  const NetworkOptions& options() const { return options_; }
  const NetworkInputs& inputs() const { return inputs_; }
  // What the reference gave, host. "x_bf16" is its bf16 run of "x".
  const TensorMap& outputs() const { return outputs_; }

 private:
  NetworkOptions options_;
  NetworkInputs inputs_;
  TensorMap outputs_;
};

// max |a - b| / max |b| of two host tensors, f32 or bf16; infinite when a holds a NaN or an
// infinity, or when the shapes differ.
double MaxRelativeError(const Tensor& a, const Tensor& b);

// Runs a case in f32 and expects every output: floats within kF32Tolerance, integers exactly.
void ExpectF32Parity(Backend& backend, const Golden& golden);
// Runs a case in bf16 and expects the error rule: against the f32 golden we are at most twice as
// far off as the reference's own bf16 run.
void ExpectBf16ErrorRule(Backend& backend, const Golden& golden);

// A backend for `device`; null, with the test marked as skipped, when this machine has no such
// device.
std::unique_ptr<Backend> BackendOrSkip(const std::string& device);

}  // namespace slalom
