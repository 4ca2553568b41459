#include "kernels/backend.h"

#include "kernels/device_factories.h"

namespace slalom {

std::unique_ptr<Backend> MakeBackend(Device device, const BackendOptions& options) {
  return device.is_cpu() ? MakeCpuBackend(options) : MakeCudaBackend(device.index, options);
}

}  // namespace slalom
