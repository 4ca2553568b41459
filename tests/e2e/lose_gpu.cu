// Loses a GPU on purpose: a library that the CUDA driver loads into the process that is to lose it.
//
//   CUDA_INJECTION64_PATH=liblose_gpu.so LOSE_GPU=1 LOSE_GPU_WHEN=FILE slalomd ...
//
// Once FILE exists a kernel traps in the process's context on device LOSE_GPU, after which every
// call there fails, and with it those on the process's other CUDA devices. Other processes notice
// nothing.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <thread>

namespace {

__global__ void TrapKernel() { __trap(); }

void LoseWhenAsked(int device, const std::string& file) {
  while (!std::filesystem::exists(file)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  cudaSetDevice(device);
  TrapKernel<<<1, 1>>>();
  std::fprintf(stderr, "lose_gpu: device %d: %s\n", device,
               cudaGetErrorName(cudaDeviceSynchronize()));
}

}  // namespace

extern "C" int InitializeInjection() {
  const char* device = std::getenv("LOSE_GPU");
  const char* file = std::getenv("LOSE_GPU_WHEN");
  if (device == nullptr || file == nullptr) return 0;
  std::thread(LoseWhenAsked, std::atoi(device), std::string(file)).detach();
  return 1;
}
