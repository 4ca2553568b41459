#include "kernels/backend.h"

#include "kernels/device_factories.h"

namespace slalom {

std::unique_ptr<Backend> MakeBackend(Device device, const BackendOptions& options) {
  return device.is_cpu() ? MakeCpuBackend(options) : MakeCudaBackend(device.index, options);
}

std::int64_t CountNonFinite(Backend& backend, const Tensor& x) {
  const Tensor counter = backend.Allocate({1}, DType::kI64);
  backend.Zero(counter);
  backend.CountNonFinite(x, counter);
  const Tensor count = Tensor::Host({1}, DType::kI64);
  backend.Copy(counter, count);
  return *count.data<std::int64_t>();
}

}  // namespace slalom
