// Stands in for kernels/cuda in a build without CUDA.
#include "kernels/core/error.h"
#include "kernels/device_factories.h"
#include "kernels/foreign_stream.h"

namespace slalom {

std::unique_ptr<Backend> MakeCudaBackend(int /*index*/, const BackendOptions& /*options*/) {
  throw Error(ErrorCode::kFailedPrecondition,
              "device: this build has no CUDA back end; build with the cuda preset or use cpu");
}

int CudaDeviceCount() { return 0; }

void FollowStream(Backend& /*backend*/, void* /*stream*/) {}
void LeadStream(Backend& /*backend*/, void* /*stream*/) {}

}  // namespace slalom
