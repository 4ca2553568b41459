// Loading a model folder.
#include "model/pipeline.h"

#include <filesystem>
#include <string>
#include <utility>

#include "kernels/core/error.h"
#include "model/adapter.h"
#include "model/config.h"
#include "model/wan_pipeline.h"
#include "model/weights.h"

namespace slalom {
namespace {

DType ChooseDType(const std::string& name, const Backend& backend) {
  if (name == "auto") return backend.preferred_dtype();
  if (name == "f32") return DType::kF32;
  if (name == "bf16") return DType::kBF16;
  throw Error(ErrorCode::kInvalidArgument, "dtype: is " + name + ", must be auto, f32 or bf16");
}

}  // namespace

std::unique_ptr<Pipeline> LoadPipeline(const std::string& folder, const PipelineOptions& options) {
  WanModel model;
  model.config = LoadModelConfig(folder);
  model.backend = MakeBackend(
      options.device, {.cpu_threads = options.cpu_threads, .force_f32 = options.dtype == "f32"});
  Backend& backend = *model.backend;
  model.dtype = ChooseDType(options.dtype, backend);

  const auto open = [&](const char* network, const char* stem) {
    Weights weights = Weights::Open((std::filesystem::path(folder) / network).string(), stem);
    model.parameters += weights.NumParameters();
    return weights;
  };
  constexpr char kDiffusersStem[] = "diffusion_pytorch_model";
  model.tokenizer = std::make_unique<Tokenizer>(
      (std::filesystem::path(folder) / "tokenizer").string(), model.config.text_encoder.vocab_size);
  model.text_encoder = std::make_unique<TextEncoder>(backend, open("text_encoder", "model"),
                                                     model.config.text_encoder, model.dtype);
  model.transformer = std::make_unique<Transformer>(
      backend, open("transformer", kDiffusersStem), model.config.transformer,
      LoadAdapters(folder, model.config.transformer), model.dtype);
  model.decoder = std::make_unique<VideoDecoder>(backend, open("vae", kDiffusersStem),
                                                 model.config.vae, model.dtype);
  return std::make_unique<WanPipeline>(std::move(model), options);
}

}  // namespace slalom
