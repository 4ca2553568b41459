// Writes a model folder of random weights: the published sizes, or smaller ones for tests.
//
//   write_random_model --size 1.3b /data/random-1.3b
//   write_random_model --layers 2 --text-layers 2 --vocabulary 1000 --only transformer /tmp/small

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <exception>
#include <map>
#include <set>
#include <string>

#include "tests/bench/random_model.h"

int main(int argc, char** argv) {
  using slalom::DType;
  const std::map<std::string, DType> types = {{"f32", DType::kF32}, {"bf16", DType::kBF16}};
  slalom::RandomModelOptions model;
  std::string folder;
  std::string size = "1.3b";
  int layers = 0;
  std::set<std::string> only;

  CLI::App app("Writes a model folder of random weights in the diffusers layout.");
  app.add_option("folder", folder, "created when it is not there")->required();
  app.add_option("--size", size, "transformer: 1.3b or 14b")->capture_default_str();
  app.add_option("--layers", layers, "transformer blocks instead of all")
      ->check(CLI::Range(1, 256));
  app.add_option("--text-layers", model.text_encoder.num_layers, "text encoder blocks")
      ->check(CLI::Range(1, 256));
  app.add_option("--vocabulary", model.text_encoder.vocab_size, "rows of the text embedding")
      ->check(CLI::Range(512, 1 << 24));
  app.add_option("--only", only, "networks that get weights: transformer,text_encoder,vae")
      ->delimiter(',')
      ->check(CLI::IsMember({"transformer", "text_encoder", "vae"}));
  const auto add_type = [&](const char* option, DType& type, const char* what) {
    app.add_option(option, type, what)->transform(CLI::CheckedTransformer(types));
  };
  add_type("--transformer-dtype", model.transformer_dtype, "f32 (default) or bf16");
  add_type("--text-encoder-dtype", model.text_encoder_dtype, "f32 or bf16 (default)");
  add_type("--vae-dtype", model.vae_dtype, "f32 (default) or bf16");
  app.add_option("--seed", model.seed, "of the weights")->capture_default_str();
  app.add_option("--threads", model.threads, "0: one per core");
  CLI11_PARSE(app, argc, argv);

  try {
    model.transformer = slalom::PublishedTransformer(size);
    if (layers > 0) model.transformer.num_layers = layers;
    if (!only.empty()) {
      model.write_transformer = only.contains("transformer");
      model.write_text_encoder = only.contains("text_encoder");
      model.write_vae = only.contains("vae");
    }
    const auto start = std::chrono::steady_clock::now();
    slalom::WriteRandomModel(folder, model);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    std::printf("%s: written in %.1f s\n", folder.c_str(), took.count());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "write_random_model: %s\n", error.what());
    return 1;
  }
  return 0;
}
