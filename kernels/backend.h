// Backend: the catalogue of operations that the networks are made of, on one device.
//
// Conventions for every operation:
//   * Outputs are allocated by the caller (Backend::Allocate) and written completely.
//   * All tensors live on this backend's device unless a comment says "host".
//   * "T" is the compute type, f32 or bf16; the inputs of one call marked T share it. Accumulation,
//     softmax and norm statistics are f32. Results are rounded once, when they are stored.
//   * A shape or type that does not fit throws Error(kInternal) naming the argument; running out of
//     memory throws Error(kResourceExhausted); a lost device throws Error(kUnavailable).
//   * An undefined Tensor means "not there" where a comment says "optional".
//   * In-place use (out shares memory with an input) is allowed only where a comment says so.
//   * One thread at a time. On an asynchronous device the calls return before the work is done.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "kernels/attention.h"
#include "kernels/core/tensor.h"

namespace slalom {

enum class Activation { kNone, kGeluTanh, kSilu };

// y = act(x w^T + bias); out = y, or residual + y, or residual + gate * y.
// A row of out has the same bits whatever M is and whatever the other rows hold: a clip's
// result must not depend on who shares its batch. So the order of the sum over K follows from
// (N, K) alone.
struct LinearArgs {
  Tensor x;       // [M, K] T (leading dimensions may be split, as in every row-wise operation)
  Tensor weight;  // [N, K] T
  Tensor bias;    // [N] f32, or T when out is T; optional
  Activation activation = Activation::kNone;
  Tensor residual;  // [M, N] out's type, optional; may share memory with out
  Tensor gate;      // [B, N] f32 with M divisible by B, optional, needs residual
  Tensor out;       // [M, N] T or f32
};

// out = LN(x) * weight + bias, then * (1 + scale) + shift. Biased variance over the last dimension.
struct LayerNormArgs {
  Tensor x;       // [B, L, d] T or f32 (the residual stream is f32 in every compute type)
  Tensor weight;  // [d] f32, optional (with bias)
  Tensor bias;    // [d] f32, optional
  Tensor scale;   // [B, d] f32, optional (with shift)
  Tensor shift;   // [B, d] f32, optional
  float eps = 1e-6f;
  Tensor out;  // [B, L, d] T
};

// out = x * rsqrt(mean(x^2) + eps) * weight over the last dimension (T5's and Wan's RMSNorm).
struct RmsNormArgs {
  Tensor x;       // [M, d] T or f32
  Tensor weight;  // [d] f32
  float eps = 1e-6f;
  Tensor out;  // [M, d] T; may be x when the types agree
};

// The step before attention: RMSNorm over all heads together, split into heads, rotate.
struct QkNormRopeArgs {
  Tensor x;       // [B, L, H * D] T
  Tensor weight;  // [H * D] f32, RMSNorm; optional (then x is taken as it is)
  float eps = 1e-6f;
  Tensor cos;  // [L, D / 2] f32, optional (with sin): interleaved pairs (2p, 2p + 1) are rotated
  Tensor sin;  // [L, D / 2] f32
  bool relu_before_rotation = false;  // SALAD's linear branch
  Tensor out;                         // [B, L, H, D] T; may share memory with x
  // [B, ceil(L / pool), H * D] f32, optional: the means of out's rows, `pool` at a time, as
  // BlockMapArgs takes them.
  Tensor means;
  int pool = 0;
};

// out = softmax(scale * q k^T + relative bias) v, dense.
struct AttentionArgs {
  Tensor q;  // [B, Lq, H, D] T
  Tensor k;  // [B, Lk, H, D] T
  Tensor v;  // [B, Lk, H, D] T
  float scale = 1.0f;
  Tensor relative_bias;  // [H, Lq + Lk - 1] f32, optional: entry (key - query) + Lq - 1
  Tensor out;            // [B, Lq, H, D] T
  Tensor lse;            // [B, H, Lq] f32, optional: log of the row's sum of exp
};

// Scores mean(q block) . mean(k block), or windows, then classes. Ties go to the lower index.
struct BlockMapArgs {
  Tensor q;        // [B, L, H, D] T, after rotation (kTopK)
  Tensor k;        // [B, L, H, D] T
  TokenGrid grid;  // kWindow: the clip's token grid, grid.size() == L
  BlockMapOptions options;
  // What q and k are pooled to, where that is known: [B, Nq, H * D] and [B, Nk, H * D] f32,
  // optional.
  Tensor q_means;
  Tensor k_means;
};

// SLA: o = softmax over critical blocks + (linear attention over the scope) W^T + b.
struct SlaArgs {
  Tensor q;  // [B, L, H, D] T, after rotation
  Tensor k;  // [B, L, H, D] T
  Tensor v;  // [B, L, H, D] T
  const BlockMap* map = nullptr;
  LinearScope scope = LinearScope::kMarginal;
  FeatureMap feature_map = FeatureMap::kSoftmax;
  Tensor proj_weight;  // [D, D] f32, optional: absent means no linear branch
  Tensor proj_bias;    // [D] f32, with proj_weight
  Tensor out;          // [B, L, H, D] T
  // [B, H, L] f32, optional: log of the sum of exp over the critical keys, -infinity where a row
  // has none. SlaAttentionBackward wants it.
  Tensor lse;
};

// The gradients of SlaAttention, given d_out = d loss / d out. The map is held.
struct SlaBackwardArgs {
  Tensor q;  // [B, L, H, D] T, all as they were given to SlaAttention
  Tensor k;  // [B, L, H, D] T
  Tensor v;  // [B, L, H, D] T
  const BlockMap* map = nullptr;
  LinearScope scope = LinearScope::kMarginal;
  FeatureMap feature_map = FeatureMap::kSoftmax;
  Tensor proj_weight;    // [D, D] f32, optional
  Tensor proj_bias;      // [D] f32, with proj_weight
  Tensor out;            // [B, L, H, D] T, as SlaAttention wrote it
  Tensor lse;            // [B, H, L] f32, likewise
  Tensor d_out;          // [B, L, H, D] T
  Tensor d_q;            // [B, L, H, D] T
  Tensor d_k;            // [B, L, H, D] T
  Tensor d_v;            // [B, L, H, D] T
  Tensor d_proj_weight;  // [D, D] f32, with proj_weight
  Tensor d_proj_bias;    // [D] f32, with proj_weight
};

// SALAD: o = sparse + gate(x) * (linear W_p^T + b_p), heads side by side, before the o projection.
struct SaladArgs {
  Tensor q;         // [B, L, H, D] T, after rotation: the sparse branch
  Tensor k;         // [B, L, H, D] T
  Tensor v;         // [B, L, H, D] T
  Tensor q_normed;  // [B, L, H, D] T, after RMSNorm, before rotation: the linear branch
  Tensor k_normed;  // [B, L, H, D] T
  Tensor cos;       // [L, D / 2] f32
  Tensor sin;       // [L, D / 2] f32
  Tensor x;         // [B, L, H * D] T: the attention layer's input, for the gate
  const BlockMap* map = nullptr;
  // With kWindow maps the second half of the heads orders its tokens (y, x, t); see BlockMapArgs.
  BlockMapKind map_kind = BlockMapKind::kTopK;
  TokenGrid grid;
  SaladGate gate = SaladGate::kToken;
  Tensor proj_weight;  // [d, d] T, optional: absent means that this layer dropped its linear branch
  Tensor proj_bias;    // [d] f32
  Tensor gate_weight;  // [1, d] f32
  Tensor gate_bias;    // [1] f32
  Tensor out;          // [B, L, H * D] T
  Tensor gate_out;     // [B, L] f32, optional: the gate's values
  // [B, H, L] f32, optional, as SlaArgs.lse, by position in the head's own order of tokens.
  Tensor lse;
};

// The gradients of SaladAttention, given d_out. q and q_normed count as separate inputs, as do k
// and k_normed; who rotated one into the other adds their gradients up. The map is held.
struct SaladBackwardArgs {
  Tensor q;         // [B, L, H, D] T, all as they were given to SaladAttention
  Tensor k;         // [B, L, H, D] T
  Tensor v;         // [B, L, H, D] T
  Tensor q_normed;  // [B, L, H, D] T
  Tensor k_normed;  // [B, L, H, D] T
  Tensor cos;       // [L, D / 2] f32
  Tensor sin;       // [L, D / 2] f32
  Tensor x;         // [B, L, d] T
  const BlockMap* map = nullptr;
  BlockMapKind map_kind = BlockMapKind::kTopK;
  TokenGrid grid;
  SaladGate gate = SaladGate::kToken;
  Tensor proj_weight;  // [d, d] T, optional: then so is all that is not of the sparse branch
  Tensor proj_bias;    // [d] f32
  Tensor gate_weight;  // [1, d] f32
  Tensor gate_bias;    // [1] f32
  Tensor out;          // [B, L, d] T, as SaladAttention wrote it
  Tensor lse;          // [B, H, L] f32, likewise
  Tensor d_out;        // [B, L, d] T
  Tensor d_q;          // [B, L, H, D] T, of the sparse branch
  Tensor d_k;          // [B, L, H, D] T
  Tensor d_v;          // [B, L, H, D] T, of both branches
  // Of the linear branch and the gate; all of them with proj_weight.
  Tensor d_q_normed;     // [B, L, H, D] T
  Tensor d_k_normed;     // [B, L, H, D] T
  Tensor d_x;            // [B, L, d] T
  Tensor d_proj_weight;  // [d, d] f32
  Tensor d_proj_bias;    // [d] f32
  Tensor d_gate_weight;  // [1, d] f32
  Tensor d_gate_bias;    // [1] f32
};

// out[i, b, :] = table[i, :] + t[b, i, :]: Wan's modulation rows. One row of all samples is one
// piece of memory, as LayerNorm's scale and Linear's gate want it.
struct ModulationArgs {
  Tensor table;  // [n, d] f32
  Tensor t;      // [B, n, d] f32, or [B, d] which is then used for every row
  Tensor out;    // [n, B, d] f32
};

// Latent patches <-> tokens. Token index (f * h + y) * w + x; the patch is 1 x 2 x 2.
struct PatchifyArgs {
  Tensor latent;  // [B, C, F, 2h, 2w] f32
  Tensor tokens;  // [B, L, C * 4] T, channel order c * 4 + ky * 2 + kx
};
struct UnpatchifyArgs {
  Tensor tokens;  // [B, L, 4 * C] T or f32, channel order (ky * 2 + kx) * C + c
  Tensor latent;  // [B, C, F, 2h, 2w] f32
};

// A causal convolution over channels-last frames, stride 1, zero padding in space; in time
// `history` stands in front of x, and zeros in front of that.
struct ConvArgs {
  Tensor x;         // [T, H, W, Ci] T
  Tensor history;   // [n <= kt - 1, H, W, Ci] T, optional
  Tensor weight;    // [Co, kt, kh, kw, Ci] T; kt, kh, kw odd
  Tensor bias;      // [Co] f32, optional
  Tensor residual;  // [T, H', W', Co] T, optional, added to the result; may share memory with out
  bool upsample = false;  // x is doubled in H and W (nearest) first; kt must be 1
  Tensor out;             // [T, H', W', Co] T
};

// out = x / max(|x|_2, 1e-12) * sqrt(C) * gamma over the last dimension, then SiLU if asked.
struct ChannelNormArgs {
  Tensor x;      // [T, H, W, C] T
  Tensor gamma;  // [C] f32
  bool silu = false;
  Tensor out;  // [T, H, W, C] T; may be x
};

// out[2t + p] = x[t][..., p * C : (p + 1) * C]: channels become pairs of frames.
struct InterleaveFramesArgs {
  Tensor x;    // [T, H, W, 2 * C] T
  Tensor out;  // [2 * T, H, W, C] T
};

// [-1, 1] floats to 8-bit RGB: floor(255 * (clamp(x) + 1) / 2), as the references' export does.
struct ToPixelsArgs {
  Tensor x;    // [T, H, W, 3] T
  Tensor out;  // [T, H, W, 3] u8
};

// out = sum of coefficients[i] * inputs[i]; out may be one of the inputs.
struct CombineArgs {
  std::span<const Tensor> inputs;  // f32, one shape; at most 8
  std::span<const float> coefficients;
  Tensor out;  // f32
};

struct MemoryStats {
  std::size_t bytes_in_use = 0;    // handed out now
  std::size_t bytes_reserved = 0;  // held by the arena, free blocks included
  std::size_t bytes_peak = 0;      // the most that were in use at once since ResetPeak
  std::size_t bytes_total = 0;     // the device's memory
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual Device device() const = 0;
  // The type T that runs fastest here with full-model quality: bf16 where the hardware multiplies
  // it, f32 elsewhere. Networks convert their weights to it unless told otherwise.
  virtual DType preferred_dtype() const = 0;
  // For people: "Intel Xeon (AVX-512 BF16), oneDNN 2.6" or "NVIDIA H200, CUDA 13.0".
  virtual std::string Describe() const = 0;

  // --- memory ---
  // Uninitialised memory from the arena; it returns there when the last Tensor that shares it goes.
  virtual Tensor Allocate(const Shape& shape, DType dtype) = 0;
  virtual MemoryStats Memory() const = 0;  // from any thread
  virtual void ResetPeak() = 0;
  // Copies between host and device or within the device; the types may differ (f32, bf16, f16, f64
  // are converted into f32 or bf16; integers stay as they are). A copy to the host has arrived when
  // the call returns.
  virtual void Copy(const Tensor& from, const Tensor& to) = 0;
  virtual void Zero(const Tensor& tensor) = 0;
  virtual void Synchronize() = 0;

  // --- rows ---
  virtual void Linear(const LinearArgs& args) = 0;
  virtual void LayerNorm(const LayerNormArgs& args) = 0;
  virtual void RmsNorm(const RmsNormArgs& args) = 0;
  virtual void QkNormRope(const QkNormRopeArgs& args) = 0;
  virtual void Modulation(const ModulationArgs& args) = 0;
  virtual void Activate(Activation activation, const Tensor& x,
                        const Tensor& out) = 0;  // any shape
  // out[M, F] = gelu_tanh(x[:, :F]) * x[:, F:], x [M, 2F] T.
  virtual void GatedGelu(const Tensor& x, const Tensor& out) = 0;
  // out[n, d] T = table[ids[n]], ids i32 on the device; an id out of range gives row 0.
  virtual void Embedding(const Tensor& ids, const Tensor& table, const Tensor& out) = 0;
  // out[B, n] f32 = [cos(t w_j), sin(t w_j)], w_j = 10000^(-j / (n / 2)); timesteps [B] f32.
  virtual void TimestepEmbedding(const Tensor& timesteps, const Tensor& out) = 0;

  // --- attention ---
  virtual void Attention(const AttentionArgs& args) = 0;
  virtual BlockMap MakeBlockMap(const BlockMapArgs& args) = 0;
  // A map with these classes (for tests that force one), critical lists filled in.
  virtual BlockMap BlockMapFromClasses(const Tensor& classes, int block_q, int block_k) = 0;
  virtual void SlaAttention(const SlaArgs& args) = 0;
  virtual void SaladAttention(const SaladArgs& args) = 0;
  virtual void SlaAttentionBackward(const SlaBackwardArgs& args) = 0;
  virtual void SaladAttentionBackward(const SaladBackwardArgs& args) = 0;
  // Adds the map's critical pairs to counter[0] and all of its pairs to counter[1] (i64 [2]).
  virtual void CountPairs(const BlockMap& map, const Tensor& counter) = 0;
  // The share of the softmax mass that the critical blocks hold, averaged over `rows` query rows
  // spread evenly over each head; out f32 [1]. A sample for metrics: O(rows * L) work.
  virtual void AttentionMassKept(const Tensor& q, const Tensor& k, float scale, const BlockMap& map,
                                 int rows, const Tensor& out) = 0;

  // --- latents and frames ---
  virtual void Patchify(const PatchifyArgs& args) = 0;
  virtual void Unpatchify(const UnpatchifyArgs& args) = 0;
  virtual void Conv(const ConvArgs& args) = 0;
  virtual void ChannelNorm(const ChannelNormArgs& args) = 0;
  virtual void InterleaveFrames(const InterleaveFramesArgs& args) = 0;
  virtual void ToPixels(const ToPixelsArgs& args) = 0;
  virtual void Combine(const CombineArgs& args) = 0;
  // Adds to `counter` (i64 [1]) how many elements are NaN or infinite.
  virtual void CountNonFinite(const Tensor& x, const Tensor& counter) = 0;
};

struct BackendOptions {
  int cpu_threads = 0;     // 0: one per core that this process may use
  bool force_f32 = false;  // preferred_dtype() is f32 even where bf16 is fast
};

// Throws Error(kFailedPrecondition) when this build or this machine has no such device.
std::unique_ptr<Backend> MakeBackend(Device device, const BackendOptions& options = {});

// How many elements are NaN or infinite. Waits for the device.
std::int64_t CountNonFinite(Backend& backend, const Tensor& x);

// The CUDA devices that can be used now; 0 without a driver or in a build without CUDA.
int CudaDeviceCount();

}  // namespace slalom
