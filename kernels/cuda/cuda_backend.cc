#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <string>
#include <thread>

#include "kernels/core/error.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/ops.h"
#include "kernels/device_factories.h"

namespace slalom {

std::unique_ptr<Backend> MakeCudaBackend(int index, const BackendOptions& options) {
  const int count = CudaDeviceCount();
  if (index >= count) {
    throw Error(ErrorCode::kFailedPrecondition, "device: cuda:" + std::to_string(index) +
                                                    " is not there; this machine has " +
                                                    std::to_string(count) + " usable CUDA devices");
  }
  return std::make_unique<cuda::CudaBackend>(index, options);
}

int CudaDeviceCount() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver is an answer, not an error of the next call
    return 0;
  }
  return count;
}

}  // namespace slalom

namespace slalom::cuda {
namespace {

constexpr std::size_t kGemmWorkspace = std::size_t{32} << 20;  // what cuBLAS advises for Hopper
// From here on pinned staging and its threads beat the driver's own staging.
constexpr std::size_t kLeastUpload = std::size_t{4} << 20;
constexpr int kMostUploadThreads = 8;
constexpr int kOldestMajor = 8;  // the kernels need mma.sync bf16

std::shared_ptr<Arena> MakeArena(int device) {
  const auto allocate = [device](std::size_t bytes) -> void* {
    void* memory = nullptr;
    Check(cudaSetDevice(device), "cudaSetDevice");
    const cudaError_t status = cudaMalloc(&memory, bytes);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    Check(status, "cudaMalloc");
    return memory;
  };
  // A failure to free has nobody to go to: the context is lost, and its memory with it.
  const auto release = [device](void* memory) {
    cudaSetDevice(device);
    cudaFree(memory);
  };
  return std::make_shared<Arena>(Arena::Source{allocate, release});
}

bool IsFloat(DType type) {
  return type == DType::kF32 || type == DType::kBF16 || type == DType::kF16 || type == DType::kF64;
}

}  // namespace

Tensor Context::Allocate(const Shape& shape, DType dtype) const {
  const std::size_t bytes = static_cast<std::size_t>(shape.NumElements()) * ByteSize(dtype);
  void* memory = arena->Allocate(bytes);
  if (memory == nullptr) {
    throw Error(ErrorCode::kResourceExhausted,
                "out of memory on " + slalom::ToString(device) + ": " + std::to_string(bytes) +
                    " bytes wanted, " + std::to_string(arena->stats().in_use) + " in use");
  }
  std::shared_ptr<std::byte> data(static_cast<std::byte*>(memory),
                                  [keep = arena](std::byte* p) { keep->Free(p); });
  return {std::move(data), shape, dtype, device};
}

CudaBackend::CudaBackend(int index, const BackendOptions& options) {
  Check(cudaSetDevice(index), "cudaSetDevice");
  cudaDeviceProp properties{};
  Check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  if (properties.major < kOldestMajor) {
    throw Error(ErrorCode::kFailedPrecondition,
                std::string("device: ") + properties.name + " has compute capability " +
                    std::to_string(properties.major) + "." + std::to_string(properties.minor) +
                    "; 8.0 or newer is needed");
  }
  int runtime = 0;
  Check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  description_ = std::string(properties.name) + ", CUDA " + std::to_string(runtime / 1000) + "." +
                 std::to_string(runtime % 1000 / 10);
  total_bytes_ = properties.totalGlobalMem;
  preferred_ = options.force_f32 ? DType::kF32 : DType::kBF16;

  context_.device = Device{Device::Kind::kCuda, index};
  context_.sm_count = properties.multiProcessorCount;
  context_.compute_major = properties.major;
  context_.arena = MakeArena(index);
  const Tensor workspace =
      context_.Allocate({static_cast<std::int64_t>(kGemmWorkspace)}, DType::kU8);
  Check(cudaStreamCreateWithFlags(&context_.stream, cudaStreamNonBlocking), "cudaStreamCreate");
  gemm_ = std::make_unique<Gemm>(context_.stream, workspace);
  context_.gemm = gemm_.get();
}

CudaBackend::~CudaBackend() {
  cudaSetDevice(context_.device.index);
  cudaStreamSynchronize(context_.stream);
  uploader_.reset();
  gemm_.reset();
  cudaStreamDestroy(context_.stream);
}

const Context& CudaBackend::Enter() const {
  Check(cudaSetDevice(context_.device.index), "cudaSetDevice");
  return context_;
}

Tensor CudaBackend::Allocate(const Shape& shape, DType dtype) {
  return Enter().Allocate(shape, dtype);
}

MemoryStats CudaBackend::Memory() const {
  const Arena::Stats stats = context_.arena->stats();
  return {stats.in_use, stats.reserved, stats.peak, total_bytes_};
}

void CudaBackend::ResetPeak() { context_.arena->ResetPeak(); }

void CudaBackend::Copy(const Tensor& from, const Tensor& to) {
  const Context& context = Enter();
  Require(from.defined() && to.defined() && from.NumElements() == to.NumElements(),
          "Copy: from and to do not hold as many elements");
  Require(!from.device().is_cpu() || !to.device().is_cpu(), "Copy: both tensors are on the host");
  if (from.NumElements() == 0) return;
  const bool convert = from.dtype() != to.dtype();
  Require(!convert || (IsFloat(from.dtype()) && IsComputeType(to.dtype())),
          "Copy: only floats are converted, into f32 or bf16");

  Tensor source = from;
  if (from.device().is_cpu()) {
    if (Upload(from, to)) return;
    source = convert ? context.Allocate(from.shape(), from.dtype()) : to;
    // From pageable memory the call returns once the driver has taken the bytes.
    Check(cudaMemcpyAsync(source.raw(), from.raw(), from.NumBytes(), cudaMemcpyHostToDevice,
                          context.stream),
          "copy to the device");
    if (!convert) return;
  }
  if (convert) {
    const Tensor converted = to.device().is_cpu() ? context.Allocate(to.shape(), to.dtype()) : to;
    Convert(context, source, converted);
    source = converted;
    if (!to.device().is_cpu()) return;
  }
  const auto kind = to.device().is_cpu() ? cudaMemcpyDeviceToHost : cudaMemcpyDeviceToDevice;
  Check(cudaMemcpyAsync(to.raw(), source.raw(), to.NumBytes(), kind, context.stream), "copy");
  if (to.device().is_cpu()) Synchronize();
}

bool CudaBackend::Upload(const Tensor& from, const Tensor& to) {
  const bool narrow = from.dtype() == DType::kF32 && to.dtype() == DType::kBF16;
  if (from.NumBytes() < kLeastUpload || (from.dtype() != to.dtype() && !narrow)) return false;
  if (uploader_ == nullptr) {
    const auto cores = static_cast<int>(std::thread::hardware_concurrency());
    const int threads = std::clamp(cores, 1, kMostUploadThreads);
    uploader_ = std::make_unique<Uploader>(
        MakeUploadLink(context_.device.index, context_.stream, threads), threads);
  }
  if (!uploader_->ready()) return false;
  uploader_->Copy(from.raw(), from.dtype(), to.raw(), to.dtype(), from.NumElements());
  return true;
}

void CudaBackend::Zero(const Tensor& tensor) {
  const Context& context = Enter();
  Check(cudaMemsetAsync(tensor.raw(), 0, tensor.NumBytes(), context.stream), "Zero");
}

void CudaBackend::Synchronize() { Check(cudaStreamSynchronize(Enter().stream), "Synchronize"); }

void CudaBackend::Linear(const LinearArgs& args) { cuda::Linear(Enter(), args); }
void CudaBackend::LayerNorm(const LayerNormArgs& args) { cuda::LayerNorm(Enter(), args); }
void CudaBackend::RmsNorm(const RmsNormArgs& args) { cuda::RmsNorm(Enter(), args); }
void CudaBackend::QkNormRope(const QkNormRopeArgs& args) { cuda::QkNormRope(Enter(), args); }
void CudaBackend::Modulation(const ModulationArgs& args) { cuda::Modulation(Enter(), args); }
void CudaBackend::Activate(Activation activation, const Tensor& x, const Tensor& out) {
  cuda::Activate(Enter(), activation, x, out);
}
void CudaBackend::GatedGelu(const Tensor& x, const Tensor& out) {
  cuda::GatedGelu(Enter(), x, out);
}
void CudaBackend::Embedding(const Tensor& ids, const Tensor& table, const Tensor& out) {
  cuda::Embedding(Enter(), ids, table, out);
}
void CudaBackend::TimestepEmbedding(const Tensor& timesteps, const Tensor& out) {
  cuda::TimestepEmbedding(Enter(), timesteps, out);
}

void CudaBackend::Attention(const AttentionArgs& args) { cuda::Attention(Enter(), args); }
BlockMap CudaBackend::MakeBlockMap(const BlockMapArgs& args) {
  return cuda::MakeBlockMap(Enter(), args);
}
BlockMap CudaBackend::BlockMapFromClasses(const Tensor& classes, int block_q, int block_k) {
  return cuda::BlockMapFromClasses(Enter(), classes, block_q, block_k);
}
void CudaBackend::SlaAttention(const SlaArgs& args) { cuda::SlaAttention(Enter(), args); }
void CudaBackend::SaladAttention(const SaladArgs& args) { cuda::SaladAttention(Enter(), args); }
void CudaBackend::SlaAttentionBackward(const SlaBackwardArgs& args) {
  cuda::SlaAttentionBackward(Enter(), args);
}
void CudaBackend::SaladAttentionBackward(const SaladBackwardArgs& args) {
  cuda::SaladAttentionBackward(Enter(), args);
}
void CudaBackend::CountPairs(const BlockMap& map, const Tensor& counter) {
  cuda::CountPairs(Enter(), map, counter);
}
void CudaBackend::AttentionMassKept(const Tensor& q, const Tensor& k, float scale,
                                    const BlockMap& map, int rows, const Tensor& out) {
  cuda::AttentionMassKept(Enter(), q, k, scale, map, rows, out);
}

void CudaBackend::Patchify(const PatchifyArgs& args) { cuda::Patchify(Enter(), args); }
void CudaBackend::Unpatchify(const UnpatchifyArgs& args) { cuda::Unpatchify(Enter(), args); }
void CudaBackend::Conv(const ConvArgs& args) { cuda::Conv(Enter(), args); }
void CudaBackend::ChannelNorm(const ChannelNormArgs& args) { cuda::ChannelNorm(Enter(), args); }
void CudaBackend::InterleaveFrames(const InterleaveFramesArgs& args) {
  cuda::InterleaveFrames(Enter(), args);
}
void CudaBackend::ToPixels(const ToPixelsArgs& args) { cuda::ToPixels(Enter(), args); }
void CudaBackend::Combine(const CombineArgs& args) { cuda::Combine(Enter(), args); }
void CudaBackend::CountNonFinite(const Tensor& x, const Tensor& counter) {
  cuda::CountNonFinite(Enter(), x, counter);
}

}  // namespace slalom::cuda
