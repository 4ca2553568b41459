#include "tests/parity/network_options.h"

#include <CLI/CLI.hpp>
#include <map>
#include <vector>

#include "kernels/core/error.h"

namespace slalom {
namespace {

// An option that takes one of a few names.
template <typename Enum>
void AddChoice(CLI::App& app, const std::string& name, Enum& value, const std::string& description,
               const std::map<std::string, Enum>& names) {
  std::string choices;
  for (const auto& [choice, unused] : names) choices += (choices.empty() ? "" : "|") + choice;
  app.add_option(name, value, description)
      ->transform(CLI::CheckedTransformer(names))
      ->option_text(choices);
}

void AddModelOptions(CLI::App& app, NetworkOptions& options) {
  app.add_option("--model", options.model, "a model folder in the diffusers layout");
  app.add_option_function<std::string>(
         "--device", [&options](const std::string& text) { options.device = ParseDevice(text); },
         "where to run")
      ->option_text("cpu|cuda|cuda:N (default cpu)");
  AddChoice<DType>(app, "--dtype", options.dtype, "compute type",
                   {{"f32", DType::kF32}, {"bf16", DType::kBF16}});
  app.add_option("--text", options.text, "tokenizer: the prompt");
  AddChoice<AttentionKind>(app, "--attention", options.attention, "transformer: self-attention",
                           {{"dense", AttentionKind::kDense},
                            {"sla", AttentionKind::kSla},
                            {"salad", AttentionKind::kSalad}});
  app.add_flag("--whole", options.whole, "vae_decoder: all frames in one piece");
  AddChoice<SamplerKind>(
      app, "--sampler", options.sampler, "sampler: the method",
      {{"unipc", SamplerKind::kUniPc}, {"euler", SamplerKind::kEuler}, {"rcm", SamplerKind::kRcm}});
  app.add_option("--steps", options.steps, "sampler: steps")->check(CLI::Range(1, 1000));
  app.add_option("--shift", options.shift, "sampler: flow shift")->check(CLI::PositiveNumber);
}

void AddAttentionOptions(CLI::App& app, NetworkOptions& options) {
  app.add_option("--topk", options.map.topk, "share of key blocks that are critical")
      ->check(CLI::Range(0.0, 1.0));
  app.add_option("--negligible", options.map.negligible, "share of key blocks that are dropped")
      ->check(CLI::Range(0.0, 1.0));
  app.add_option("--block-q", options.map.block_q, "rows of a query block")
      ->check(CLI::Range(1, 1024));
  app.add_option("--block-k", options.map.block_k, "rows of a key block")
      ->check(CLI::Range(1, 1024));
  AddChoice<LinearScope>(app, "--scope", options.scope, "sla: keys of the linear branch",
                         {{"marginal", LinearScope::kMarginal},
                          {"noncritical", LinearScope::kNonCritical},
                          {"all", LinearScope::kAll}});
  AddChoice<FeatureMap>(
      app, "--feature-map", options.feature_map, "sla: phi",
      {{"softmax", FeatureMap::kSoftmax}, {"elu", FeatureMap::kElu}, {"relu", FeatureMap::kRelu}});
  AddChoice<BlockMapKind>(app, "--map", options.map.kind, "salad: how blocks are chosen",
                          {{"topk", BlockMapKind::kTopK}, {"window", BlockMapKind::kWindow}});
  AddChoice<SaladGate>(app, "--gate", options.gate, "salad: granularity of the gate",
                       {{"token", SaladGate::kToken}, {"sample", SaladGate::kSample}});
}

}  // namespace

NetworkOptions ParseNetworkOptions(std::span<const std::string> arguments) {
  NetworkOptions options;
  CLI::App app("Runs one network, sampler or attention layer on given tensors.", "run_network");
  app.add_option("NET", options.net, "what to run")
      ->required()
      ->check(CLI::IsMember({"tokenizer", "text_encoder", "transformer", "vae_decoder", "sampler",
                             "sla", "sla_backward", "salad"}));
  app.add_option("IN", options.in, "input tensors (safetensors); - for the tokenizer")->required();
  app.add_option("OUT", options.out, "output tensors (safetensors)")->required();
  AddModelOptions(app, options);
  AddAttentionOptions(app, options);
  std::vector<std::int64_t> grid;
  app.add_option("--grid", grid, "salad: the token grid")
      ->delimiter(',')
      ->expected(3)
      ->check(CLI::PositiveNumber)
      ->option_text("F,H,W");

  // CLI11 takes a vector's arguments from its end.
  std::vector<std::string> reversed(arguments.rbegin(), arguments.rend());
  try {
    app.parse(reversed);
  } catch (const CLI::CallForHelp&) {
    throw Error(ErrorCode::kCancelled, app.help());
  } catch (const CLI::Error& error) {
    throw Error(ErrorCode::kInvalidArgument, error.what());
  }
  if (!grid.empty()) options.grid = {grid[0], grid[1], grid[2]};
  return options;
}

}  // namespace slalom
