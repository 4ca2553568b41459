// One network, sampler or attention layer on given tensors: what the program run_network does, for
// the golden tests to call.
#pragma once

#include "kernels/backend.h"
#include "tests/parity/network_options.h"
#include "tests/parity/network_tensors.h"

namespace slalom {

// Runs options.net and returns its outputs as host tensors; files are not touched, except the
// model's. Throws Error: kInvalidArgument when an input is missing or has the wrong shape or type,
// kUnimplemented for a network that this build lacks, and what loading a model throws.
TensorMap RunNetwork(Backend& backend, const NetworkOptions& options, const NetworkInputs& inputs);

// The nets behind it. Shapes in and out: the table in README.md.
TensorMap RunTokenizer(const NetworkOptions& options);
TensorMap RunTextEncoder(Backend& backend, const NetworkOptions& options,
                         const NetworkInputs& inputs);
TensorMap RunTransformer(Backend& backend, const NetworkOptions& options,
                         const NetworkInputs& inputs);
TensorMap RunVideoDecoder(Backend& backend, const NetworkOptions& options,
                          const NetworkInputs& inputs);
TensorMap RunSampler(Backend& backend, const NetworkOptions& options, const NetworkInputs& inputs);
TensorMap RunSla(Backend& backend, const NetworkOptions& options, const NetworkInputs& inputs);
TensorMap RunSlaBackward(Backend& backend, const NetworkOptions& options,
                         const NetworkInputs& inputs);
TensorMap RunSalad(Backend& backend, const NetworkOptions& options, const NetworkInputs& inputs);

}  // namespace slalom
