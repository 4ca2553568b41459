#include "kernels/foreign_stream.h"

#include <cuda_runtime_api.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"

namespace slalom {
namespace {

// `later` runs after what `earlier` holds now.
void Order(cudaStream_t earlier, cudaStream_t later) {
  cudaEvent_t event = nullptr;
  cuda::Check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  const cudaError_t recorded = cudaEventRecord(event, earlier);
  const cudaError_t waits =
      recorded == cudaSuccess ? cudaStreamWaitEvent(later, event, 0) : recorded;
  cudaEventDestroy(event);  // its resources go once it has happened
  cuda::Check(waits, "ordering two streams");
}

const cuda::Context* ContextOf(Backend& backend) {
  if (backend.device().is_cpu()) return nullptr;
  const cuda::Context& context = dynamic_cast<cuda::CudaBackend&>(backend).context();
  cuda::Check(cudaSetDevice(context.device.index), "cudaSetDevice");
  return &context;
}

}  // namespace

void FollowStream(Backend& backend, void* stream) {
  const cuda::Context* context = ContextOf(backend);
  if (context != nullptr) Order(static_cast<cudaStream_t>(stream), context->stream);
}

void LeadStream(Backend& backend, void* stream) {
  const cuda::Context* context = ContextOf(backend);
  if (context != nullptr) Order(context->stream, static_cast<cudaStream_t>(stream));
}

}  // namespace slalom
