// The seam between backend.cc and the devices: each of them, or its stub, defines these.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace slalom {

std::unique_ptr<Backend> MakeCpuBackend(const BackendOptions& options);
std::unique_ptr<Backend> MakeCudaBackend(int index, const BackendOptions& options);

}  // namespace slalom
