// The operations of the CUDA back end, one family per file. Each checks its arguments, queues its
// work on the context's stream and returns; errors are those of kernels/backend.h.
#pragma once

#include "kernels/backend.h"
#include "kernels/cuda/context.h"

namespace slalom::cuda {

// norms.cu
void LayerNorm(const Context& context, const LayerNormArgs& args);
void RmsNorm(const Context& context, const RmsNormArgs& args);
void QkNormRope(const Context& context, const QkNormRopeArgs& args);
void ChannelNorm(const Context& context, const ChannelNormArgs& args);

// linear.cc
void Linear(const Context& context, const LinearArgs& args);

// simple_linear.cu
// The same, for checked arguments of any size; slow for many rows.
void SimpleLinear(const Context& context, const LinearArgs& args);

// gated_weight.cu
// Rows n of weight [N, K] bf16 (K a multiple of 8) and of bias [N] f32 (optional), times gate[n].
void GateWeight(const Context& context, const Tensor& weight, const Tensor& bias, const float* gate,
                const Tensor& out_weight, const Tensor& out_bias);

// elementwise.cu
void Modulation(const Context& context, const ModulationArgs& args);
void Activate(const Context& context, Activation activation, const Tensor& x, const Tensor& out);
void GatedGelu(const Context& context, const Tensor& x, const Tensor& out);
void Embedding(const Context& context, const Tensor& ids, const Tensor& table, const Tensor& out);
void TimestepEmbedding(const Context& context, const Tensor& timesteps, const Tensor& out);
void Combine(const Context& context, const CombineArgs& args);
// Adds to counter: i64 [1] on the device.
void CountNonFinite(const Context& context, const Tensor& x, const Tensor& counter);
// Between f32, bf16, f16, f64 (from) and f32, bf16 (to), both on the device, as many elements.
void Convert(const Context& context, const Tensor& from, const Tensor& to);
// y [M, N] of out's type: out = residual + gate * act(y + bias); bias, residual, gate optional.
struct EpilogueArgs {
  Tensor y;
  Tensor bias;
  Activation activation = Activation::kNone;
  Tensor residual;
  Tensor gate;
  Tensor out;
};
void LinearEpilogue(const Context& context, const EpilogueArgs& args);

// frames.cu
void Patchify(const Context& context, const PatchifyArgs& args);
void Unpatchify(const Context& context, const UnpatchifyArgs& args);
void InterleaveFrames(const Context& context, const InterleaveFramesArgs& args);
void ToPixels(const Context& context, const ToPixelsArgs& args);

// conv.cc
void Conv(const Context& context, const ConvArgs& args);

// attention/
void Attention(const Context& context, const AttentionArgs& args);
BlockMap MakeBlockMap(const Context& context, const BlockMapArgs& args);
BlockMap BlockMapFromClasses(const Context& context, const Tensor& classes, int block_q,
                             int block_k);
void SlaAttention(const Context& context, const SlaArgs& args);
void SaladAttention(const Context& context, const SaladArgs& args);
void SlaAttentionBackward(const Context& context, const SlaBackwardArgs& args);
void SaladAttentionBackward(const Context& context, const SaladBackwardArgs& args);
void CountPairs(const Context& context, const BlockMap& map, const Tensor& counter);
void AttentionMassKept(const Context& context, const Tensor& q, const Tensor& k, float scale,
                       const BlockMap& map, int rows, const Tensor& out);

}  // namespace slalom::cuda
