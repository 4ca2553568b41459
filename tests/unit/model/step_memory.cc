#include "tests/unit/model/step_memory.h"

#include <vector>

#include "model/adapter.h"
#include "model/clip_cost.h"
#include "model/config.h"
#include "model/rope.h"
#include "model/transformer.h"
#include "model/weights.h"
#include "tests/unit/model/temp_folder.h"

namespace slalom {

StepMemory MeasureStepMemory(Backend& backend, const TinyModelOptions& options, ClipSpec spec,
                             int block) {
  constexpr int kLatentsKept = 4;
  TempFolder folder;
  WriteTinyModel(folder.path(), options);
  const ModelConfig config = LoadModelConfig(folder.path());
  const TransformerConfig& sizes = config.transformer;
  const DType dtype = backend.preferred_dtype();
  const Transformer transformer(backend,
                                Weights::Open(folder / "transformer", "diffusion_pytorch_model"),
                                sizes, LoadAdapters(folder.path(), sizes), dtype);
  spec.guidance_scale = 3.0;
  const ClipShape shape = ShapeOf(config, spec);
  const auto prepare = [&] {
    Tensor text = backend.Allocate({7, sizes.text_dim}, dtype);
    backend.Zero(text);
    return transformer.PrepareText(backend, text);
  };

  StepMemory memory;
  const std::size_t idle = backend.Memory().bytes_in_use;
  const TextContext prompt = prepare(), negative = prepare();
  const RopeTables rope =
      MakeRopeTables(backend, shape.grid, sizes.attention_head_dim, sizes.rope_max_seq_len);
  std::vector<Tensor> history;
  for (int i = 0; i < kLatentsKept; ++i) {
    history.push_back(backend.Allocate(shape.latent(), DType::kF32));
  }
  const std::size_t waiting = backend.Memory().bytes_in_use;
  memory.waiting = static_cast<double>(waiting - idle);
  memory.predicted_waiting = static_cast<double>(WaitingBytes(config, spec, dtype));

  backend.ResetPeak();
  const Shape batch = {2, shape.channels, shape.frames, shape.height, shape.width};
  const Tensor latent = backend.Allocate(batch, DType::kF32);
  backend.Zero(latent);
  const Tensor times = backend.Allocate({1}, DType::kF32);
  backend.Zero(times);
  const std::vector<const TextContext*> texts = {&prompt, &negative};
  AttentionSetting setting = transformer.Setting(spec.attention);
  setting.map.block_q = setting.map.block_k = block;
  transformer.Forward(backend, {.latent = latent,
                                .timesteps = times,
                                .text = texts,
                                .rope = &rope,
                                .attention = &setting,
                                .velocity = backend.Allocate(batch, DType::kF32)});
  backend.Synchronize();
  memory.peak = static_cast<double>(backend.Memory().bytes_peak - waiting);
  memory.predicted_peak =
      static_cast<double>(StepBytes(config, spec, setting, dtype, backend.device()));
  return memory;
}

}  // namespace slalom
