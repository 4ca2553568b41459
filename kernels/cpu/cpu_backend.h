// The Backend on the CPU. Private to kernels/cpu: the rest of the house sees kernels/backend.h.
#pragma once

#include <memory>
#include <string>

#include "kernels/backend.h"
#include "kernels/cpu/arena.h"
#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/onednn.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd/kernels.h"

namespace slalom {

// Owns the arena, oneDNN's engine and stream, and the primitives already built, by shape. Every
// call has finished when it returns. One thread at a time; tensors may be dropped on any thread.
//
// Each operation is defined in the file of its family: memory, linear, norm, elementwise,
// attention_dense, attention_map, attention_sparse, attention_salad, latents, conv.
class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const BackendOptions& options);
  // With the instruction sets of `features` instead of the processor's own, which must hold them.
  CpuBackend(const BackendOptions& options, const CpuFeatures& features);

  Device device() const override { return Device{}; }
  DType preferred_dtype() const override;
  std::string Describe() const override;

  Tensor Allocate(const Shape& shape, DType dtype) override;
  MemoryStats Memory() const override { return arena_->Stats(); }
  void ResetPeak() override { arena_->ResetPeak(); }
  void Copy(const Tensor& from, const Tensor& to) override;
  void Zero(const Tensor& tensor) override;
  void Synchronize() override {}

  void Linear(const LinearArgs& args) override;
  void LayerNorm(const LayerNormArgs& args) override;
  void RmsNorm(const RmsNormArgs& args) override;
  void QkNormRope(const QkNormRopeArgs& args) override;
  void Modulation(const ModulationArgs& args) override;
  void Activate(Activation activation, const Tensor& x, const Tensor& out) override;
  void GatedGelu(const Tensor& x, const Tensor& out) override;
  void Embedding(const Tensor& ids, const Tensor& table, const Tensor& out) override;
  void TimestepEmbedding(const Tensor& timesteps, const Tensor& out) override;

  void Attention(const AttentionArgs& args) override;
  BlockMap MakeBlockMap(const BlockMapArgs& args) override;
  BlockMap BlockMapFromClasses(const Tensor& classes, int block_q, int block_k) override;
  void SlaAttention(const SlaArgs& args) override;
  void SaladAttention(const SaladArgs& args) override;
  void SlaAttentionBackward(const SlaBackwardArgs& args) override;
  void SaladAttentionBackward(const SaladBackwardArgs& args) override;
  void CountPairs(const BlockMap& map, const Tensor& counter) override;
  void AttentionMassKept(const Tensor& q, const Tensor& k, float scale, const BlockMap& map,
                         int rows, const Tensor& out) override;

  void Patchify(const PatchifyArgs& args) override;
  void Unpatchify(const UnpatchifyArgs& args) override;
  void Conv(const ConvArgs& args) override;
  void ChannelNorm(const ChannelNormArgs& args) override;
  void InterleaveFrames(const InterleaveFramesArgs& args) override;
  void ToPixels(const ToPixelsArgs& args) override;
  void Combine(const CombineArgs& args) override;
  void CountNonFinite(const Tensor& x, const Tensor& counter) override;

 private:
  // Attention on bf16 pairs instead of f32.
  bool UsePairs(DType type) const { return type == DType::kBF16 && features_.fast_bf16_dot; }

  CpuFeatures features_;
  const simd::Kernels& kernels_;
  bool force_f32_;
  Parallel parallel_;
  std::shared_ptr<Arena> arena_;
  OneDnn onednn_;
};

}  // namespace slalom
