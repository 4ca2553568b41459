#include "tests/parity/run_network.h"

#include "kernels/core/error.h"

namespace slalom {

TensorMap RunNetwork(Backend& backend, const NetworkOptions& options, const NetworkInputs& inputs) {
  const std::string& net = options.net;
  const bool has_model =
      net == "tokenizer" || net == "text_encoder" || net == "transformer" || net == "vae_decoder";
  if (has_model && options.model.empty()) {
    throw Error(ErrorCode::kInvalidArgument, net + " needs --model");
  }
  if (net == "tokenizer") return RunTokenizer(options);
  if (net == "text_encoder") return RunTextEncoder(backend, options, inputs);
  if (net == "transformer") return RunTransformer(backend, options, inputs);
  if (net == "vae_decoder") return RunVideoDecoder(backend, options, inputs);
  if (net == "sampler") return RunSampler(backend, options, inputs);
  if (net == "sla") return RunSla(backend, options, inputs);
  if (net == "salad") return RunSalad(backend, options, inputs);
  if (net == "sla_backward") return RunSlaBackward(backend, options, inputs);
  throw Error(ErrorCode::kInvalidArgument, "no net is called '" + net + "'");
}

}  // namespace slalom
