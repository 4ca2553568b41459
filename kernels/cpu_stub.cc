// Stands in for kernels/cpu in a build of the kernels alone.
#include "kernels/core/error.h"
#include "kernels/device_factories.h"

namespace slalom {

std::unique_ptr<Backend> MakeCpuBackend(const BackendOptions& /*options*/) {
  throw Error(ErrorCode::kFailedPrecondition,
              "device: this build has no CPU back end; build with the cpu preset");
}

}  // namespace slalom
