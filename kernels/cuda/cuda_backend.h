// The Backend of one NVIDIA GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <string>

#include "kernels/backend.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/upload.h"

namespace slalom::cuda {

// Owns the stream, the arena and the matrix library's handle. Operations queue work on the stream
// and return; Synchronize and copies to the host wait. One thread at a time; Tensors may outlive it
// and be dropped on any thread, because they share the arena.
class CudaBackend final : public Backend {
 public:
  CudaBackend(int index, const BackendOptions& options);
  ~CudaBackend() override;

  // For tests and benches that choose a kernel themselves.
  const Context& context() const { return context_; }

  Device device() const override { return context_.device; }
  DType preferred_dtype() const override { return preferred_; }
  std::string Describe() const override { return description_; }

  Tensor Allocate(const Shape& shape, DType dtype) override;
  MemoryStats Memory() const override;
  void ResetPeak() override;
  void Copy(const Tensor& from, const Tensor& to) override;
  void Zero(const Tensor& tensor) override;
  void Synchronize() override;

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
  // Every operation runs with this device current: a thread may serve several.
  const Context& Enter() const;
  // Copies a large host tensor through pinned memory; false when that is not for this one.
  bool Upload(const Tensor& from, const Tensor& to);

  Context context_;
  std::unique_ptr<Gemm> gemm_;
  std::unique_ptr<Uploader> uploader_;  // made by the first large copy
  DType preferred_ = DType::kF32;
  std::string description_;
  std::size_t total_bytes_ = 0;
};

}  // namespace slalom::cuda
