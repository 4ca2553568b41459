#include "model/clip_cost.h"

#include <algorithm>

#include "model/guidance.h"

namespace slalom {
namespace {

// The weight of the newest measurement: recent enough to follow a change of load, calm enough that
// one slow step does not turn an estimate around.
constexpr double kNewest = 0.3;

// x (f32), corrected sample, estimates: latents that UniPC keeps.
constexpr std::int64_t kLatentsKept = 4;
// Made by one step beside those.
constexpr std::int64_t kLatentsMade = 3;

// What the CUDA back end spends at once on the linear branch's sums, and on scores in memory.
constexpr std::int64_t kMostSumBytes = std::int64_t{512} << 20;
constexpr std::int64_t kMostScoreBytes = std::int64_t{256} << 20;
// Sums of chunks of keys that it makes of one sample when every key is in scope, at most: a block
// of threads each, one wave.
constexpr std::int64_t kSumBlocks = 264;

// Whether attention runs in the CUDA back end's kernels of tensor cores.
bool TensorCoresAttend(const TransformerConfig& config, DType dtype) {
  const int head = config.attention_head_dim;
  return dtype == DType::kBF16 && (head == 64 || head == 128);
}

// Scores in memory, where no kernel of the CUDA back end keeps them in registers.
std::int64_t ScoreBytes(const TransformerConfig& config, std::int64_t tokens,
                        std::int64_t samples) {
  return std::min(samples * config.num_attention_heads * tokens * tokens * 4, kMostScoreBytes);
}

std::int64_t Blocks(std::int64_t length, std::int64_t block) {
  return (length + block - 1) / block;
}

// What SLA and SALAD have beside the residual stream and the layer's input in those kernels: rows
// of every token, the map, and what keys and values are reduced to.
std::int64_t SparseBytes(const TransformerConfig& config, const AttentionSetting& attention,
                         std::int64_t tokens, std::int64_t samples) {
  const std::int64_t dim = config.dim(), head = config.attention_head_dim;
  const std::int64_t heads = samples * config.num_attention_heads;
  const std::int64_t nq = Blocks(tokens, attention.map.block_q);
  const std::int64_t nk = Blocks(tokens, attention.map.block_k);
  const std::int64_t all_rows = samples * tokens * dim * 2;  // of one tensor in bf16
  const std::int64_t critical = CriticalBlocks(attention.LargestTopK(), nk);
  const bool scored = attention.map.kind == BlockMapKind::kTopK;
  // Classes, lists, and the means that were scored.
  const std::int64_t map =
      heads * nq * (nk + 4 * critical + 4) + (scored ? samples * (nq + nk) * dim * 4 : 0);
  const std::int64_t sum = head * (head + 1);  // elements, the normaliser among them
  const std::int64_t chunks = samples * kSumBlocks * sum * 4;

  if (attention.kind == AttentionKind::kSalad) {
    // q and k, rotated and not, v and the output; then the features and the folded projection, or
    // before them a window's order of q, k, v and the output.
    const std::int64_t folded = samples * (dim + 8) * dim * 2;
    const std::int64_t branch = std::max(all_rows / dim * (dim + 8) + folded, chunks);
    return 6 * all_rows + std::max(branch, scored ? 0 : 4 * all_rows) + map;
  }
  // q, k, v and the output.
  if (attention.scope == LinearScope::kAll) return 4 * all_rows + map + chunks;
  // Sums of every key block and over every query block's scope, of as many heads as fit, and the
  // scope as a matrix.
  const std::int64_t of_head = (nq + nk) * sum * 2;
  const std::int64_t at_once = std::clamp<std::int64_t>(kMostSumBytes / of_head, 1, heads);
  return 4 * all_rows + map + at_once * (of_head + nq * Blocks(nk, 8) * 8 * 2);
}

// What the CPU back end's SLA works on beside those tensors: packed keys and values in f32, sums of
// every key block (of eight together when all are in scope) and of every query block's scope, of as
// many heads at once as fit a cache.
std::int64_t CpuSlaBytes(const TransformerConfig& config, const AttentionSetting& attention,
                         std::int64_t tokens, std::int64_t heads) {
  constexpr std::int64_t kMostBytes = std::int64_t{32} << 20;
  const std::int64_t head = config.attention_head_dim;
  const std::int64_t nq = Blocks(tokens, attention.map.block_q);
  const std::int64_t nk = Blocks(tokens, attention.map.block_k);
  const std::int64_t sums = attention.scope == LinearScope::kAll ? Blocks(nk, 8) + 1 : nk + nq;
  const std::int64_t of_head = (2 * tokens * head + sums * head * (head + 1)) * 4;
  return of_head * std::clamp<std::int64_t>(kMostBytes / of_head, 1, heads);
}

// As SparseBytes for plain arithmetic, at most: elsewhere than on a CPU every pair of blocks has a
// class, a score and a place in the list, every block its sums.
std::int64_t PlainSparseBytes(const TransformerConfig& config, const AttentionSetting& attention,
                              std::int64_t tokens, std::int64_t samples, const Device& device,
                              std::int64_t element) {
  const std::int64_t head = config.attention_head_dim;
  const std::int64_t heads = samples * config.num_attention_heads;
  const std::int64_t nq = Blocks(tokens, attention.map.block_q);
  const std::int64_t nk = Blocks(tokens, attention.map.block_k);
  const bool salad = attention.kind == AttentionKind::kSalad;
  std::int64_t work = std::min(heads * nk * head * (head + 1) * 4, kMostSumBytes);
  std::int64_t map = heads * nq * nk * (1 + 4 + 4);
  if (device.is_cpu()) {
    map = heads * nq * (nk + 4 * CriticalBlocks(attention.LargestTopK(), nk) + 4);
    // Keys and values, packed; SALAD's sums are of half a thousand keys each.
    work = salad ? 2 * samples * tokens * config.dim() * 4 +
                       heads * Blocks(tokens, 512) * head * (head + 1) * 4
                 : CpuSlaBytes(config, attention, tokens, heads);
  }
  // SALAD also keeps q and k as they were before rotation, and its linear branch.
  const std::int64_t tensors = salad ? 8 : 4;
  return tensors * samples * tokens * config.dim() * element + map + work;
}

double Product(std::int64_t a, std::int64_t b) {
  return static_cast<double>(a) * static_cast<double>(b);
}

}  // namespace

ClipShape ShapeOf(const ModelConfig& config, const ClipSpec& spec) {
  const int space = config.vae.spatial_scale();
  const int time = config.vae.temporal_scale();
  ClipShape shape = {.channels = config.vae.z_dim,
                     .frames = (spec.num_frames - 1) / time + 1,
                     .height = spec.height / space,
                     .width = spec.width / space};
  shape.grid = {.frames = shape.frames, .height = shape.height / 2, .width = shape.width / 2};
  return shape;
}

int SamplesPerStep(const ClipSpec& spec) { return UsesGuidance(spec.guidance_scale) ? 2 : 1; }

double TransformerFlops(const TransformerConfig& config, std::int64_t tokens, AttentionKind kind,
                        double topk) {
  const std::int64_t dim = config.dim();
  const double l = static_cast<double>(tokens);
  // Per layer: q, k, v, o; the cross-attention's q and o; the MLP; attention to the text.
  double layer = 2.0 * 6.0 * l * Product(dim, dim) + 4.0 * l * Product(dim, config.ffn_dim) +
                 4.0 * l * Product(config.text_len, dim);
  const double core = 4.0 * l * l * static_cast<double>(dim);
  layer += kind == AttentionKind::kDense ? core : core * topk;
  if (kind != AttentionKind::kDense) layer += 4.0 * l * Product(config.attention_head_dim, dim);
  if (kind == AttentionKind::kSalad) layer += 2.0 * l * Product(dim, dim);
  const double ends = 2.0 * l * Product(4 * (config.in_channels + config.out_channels), dim);
  return config.num_layers * layer + ends;
}

double TextFlops(const ModelConfig& config, std::int64_t text_tokens) {
  const TextEncoderConfig& text = config.text_encoder;
  const std::int64_t inner = std::int64_t{text.num_heads} * text.d_kv;
  const double per_token =
      2.0 * text.num_layers *
      (4.0 * Product(text.d_model, inner) + 3.0 * Product(text.d_model, text.d_ff));
  const TransformerConfig& transformer = config.transformer;
  const double per_row =
      2.0 * (Product(transformer.text_dim, transformer.dim()) +
             (1.0 + 2.0 * transformer.num_layers) * Product(transformer.dim(), transformer.dim()));
  return per_token * static_cast<double>(text_tokens) + per_row * transformer.text_len;
}

std::size_t WaitingBytes(const ModelConfig& config, const ClipSpec& spec, DType dtype) {
  const ClipShape shape = ShapeOf(config, spec);
  const TransformerConfig& transformer = config.transformer;
  const std::int64_t latents = kLatentsKept * shape.latent().NumElements() * 4;
  const std::int64_t text = std::int64_t{SamplesPerStep(spec)} * 2 * transformer.num_layers *
                            transformer.text_len * transformer.dim() *
                            static_cast<std::int64_t>(ByteSize(dtype));
  const std::int64_t angles = shape.grid.size() * transformer.attention_head_dim * 4;
  return static_cast<std::size_t>(latents + text + angles);
}

std::size_t StepBytes(const ModelConfig& config, const ClipSpec& spec,
                      const AttentionSetting& attention, DType dtype, const Device& device) {
  const ClipShape shape = ShapeOf(config, spec);
  const TransformerConfig& transformer = config.transformer;
  const std::int64_t dim = transformer.dim();
  const auto element = static_cast<std::int64_t>(ByteSize(dtype));
  const std::int64_t samples = SamplesPerStep(spec);
  const std::int64_t tokens = shape.grid.size(), rows = samples * tokens;
  const bool fast = !device.is_cpu() && TensorCoresAttend(transformer, dtype);

  // The f32 residual stream and a layer's input in T are there always. Beside them: attention, or
  // the MLP's hidden rows.
  const std::int64_t always = rows * (4 + element) * dim;
  std::int64_t attending = 0;
  std::int64_t mlp = rows * element * transformer.ffn_dim;
  if (attention.kind == AttentionKind::kDense) {
    attending = 4 * rows * element * dim;                  // q, k, v and the output
    if (device.is_cpu()) attending += rows * 4 * 2 * dim;  // keys and values, packed
  } else {
    attending = fast ? SparseBytes(transformer, attention, tokens, samples)
                     : PlainSparseBytes(transformer, attention, tokens, samples, device, element);
  }
  if (!device.is_cpu()) {
    // A gate goes into the weight, or in f32 meets the product in a tensor of its own.
    mlp += dtype == DType::kF32 ? rows * 4 * dim : element * dim * transformer.ffn_dim;
    if (!fast) attending += ScoreBytes(transformer, tokens, samples);
  }
  const std::int64_t latents = (2 * samples + kLatentsMade) * shape.latent().NumElements() * 4;
  return static_cast<std::size_t>(always + std::max(attending, mlp) + latents);
}

void RateMeter::Add(double flops, double seconds) {
  if (!(seconds > 0) || !(flops > 0)) return;
  const double latest = flops / seconds;
  const double old = rate_.load(std::memory_order_relaxed);
  const int runs = runs_.load(std::memory_order_relaxed);
  const bool replaces = runs == 0 || (runs == 1 && latest > old);
  rate_.store(replaces ? latest : old + kNewest * (latest - old), std::memory_order_relaxed);
  runs_.store(std::min(runs + 1, 2), std::memory_order_relaxed);
}

}  // namespace slalom
