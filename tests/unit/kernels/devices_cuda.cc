// The first CUDA device, if there is one.
#include "tests/unit/kernels/device_test.h"

namespace slalom {

std::vector<DeviceCase> DeviceCases() {
  if (CudaDeviceCount() == 0) return {{"cuda", nullptr}};
  return {{"cuda", [] { return MakeBackend(Device{Device::Kind::kCuda, 0}); }}};
}

}  // namespace slalom
