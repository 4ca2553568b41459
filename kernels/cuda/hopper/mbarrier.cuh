// mbarrier: barriers in shared memory that threads and TMA copies arrive at; and the plain named
// barriers and register hand-over of warp-specialised kernels.
#pragma once

#include <cstdint>

#include "kernels/cuda/shared_address.cuh"

namespace slalom::cuda::hopper {

// A phase ends when `arrivals` threads have arrived and all announced bytes are there.
__device__ inline void BarrierInit(std::uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}
// After the inits and before a __syncthreads: TMA sees them too.
__device__ inline void BarrierInitFence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
// What this thread wrote to shared memory is seen by TMA and wgmma, once a barrier has ordered it.
__device__ inline void AsyncProxyFence() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
__device__ inline void BarrierArrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(SharedAddress(barrier))
               : "memory");
}
// Arrives, and announces bytes that TMA copies will bring.
__device__ inline void BarrierExpect(std::uint64_t* barrier, std::uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}
// Waits for the end of the phase with this parity. A fresh barrier is in phase 0; waiting for
// parity 1 on it returns at once.
__device__ inline void BarrierWait(std::uint64_t* barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}

// Named barriers (1 to 15; 0 is __syncthreads) over `threads` threads, some of which only arrive.
__device__ inline void NamedBarrierSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void NamedBarrierArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// The warpgroup's registers per thread from here on; multiples of 8.
template <int kRegisters>
__device__ inline void RaiseRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void LowerRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

}  // namespace slalom::cuda::hopper
