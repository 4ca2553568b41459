// wgmma: one warpgroup multiplies bf16 tiles, accumulating in f32 registers (PTX ISA, section
// "Asynchronous warpgroup level matrix instructions").
//
// Accumulators of a 64 x N product: thread t holds, for j = 0 .. N / 8 - 1, d[4 j + {0, 1}] = row
// r, columns 8 j + c + {0, 1} and d[4 j + {2, 3}] = the same columns of row r + 8, where r = 16 *
// (t / 32) + (t % 32) / 4 and c = 2 * (t % 4).
#pragma once

#include <cstdint>

#include "kernels/cuda/hopper/descriptor.h"

namespace slalom::cuda::hopper {

// --- ordering ---
// Before the first product, and after registers that a product reads or adds to were written.
__device__ inline void WgmmaFence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Until at most kPending committed groups are unfinished.
template <int kPending>
__device__ inline void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of these registers across this point.
template <int kCount>
__device__ inline void HoldRegisters(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// --- products: d = a b, or d += a b when `accumulate` ---
// a is 64 x 16, from registers or from shared memory, its rows along m, or along k when
// kATransposed; b is 16 x N from shared memory, its rows along n, or along k when kBTransposed.
//
// An instruction names each of its registers, so the lists are put together by the preprocessor:
// D<n> are the first n accumulators as operands, R<n> their numbers in the instruction's text. The
// numbers behind them follow from N, and each function says its own.
#define SLALOM_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define SLALOM_D16(i) SLALOM_D4(i), SLALOM_D4((i) + 4), SLALOM_D4((i) + 8), SLALOM_D4((i) + 12)
#define SLALOM_D32 SLALOM_D16(0), SLALOM_D16(16)
#define SLALOM_D48 SLALOM_D32, SLALOM_D16(32)
#define SLALOM_D64 SLALOM_D48, SLALOM_D16(48)
#define SLALOM_D96 SLALOM_D64, SLALOM_D16(64), SLALOM_D16(80)

#define SLALOM_R4 "%0, %1, %2, %3"
#define SLALOM_R32                                           \
  SLALOM_R4                                                  \
  ", %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SLALOM_R48 \
  SLALOM_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SLALOM_R64 \
  SLALOM_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SLALOM_R96                                                                     \
  SLALOM_R64                                                                           \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

// N columns, accumulators and their list, then the operands behind them: a, b, transpositions.
#define SLALOM_WGMMA(columns, registers, predicate, operands)                                \
  "{\n.reg .pred p;\n"                                                                       \
  "setp.ne.b32 p, " predicate                                                                \
  ", 0;\n"                                                                                   \
  "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 {" registers "}, " operands \
  ";\n"                                                                                      \
  "}\n"

template <bool kBTransposed, bool kATransposed = false>
__device__ inline void Wgmma64x8(float (&d)[4], std::uint64_t a, std::uint64_t b, bool accumulate) {
  asm volatile(SLALOM_WGMMA("8", SLALOM_R4, "%6", "%4, %5, p, 1, 1, %7, %8")
               : SLALOM_D4(0)
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kATransposed ? 1 : 0),
                 "n"(kBTransposed ? 1 : 0));
}

template <bool kBTransposed, bool kATransposed = false>
__device__ inline void Wgmma64x64(float (&d)[32], std::uint64_t a, std::uint64_t b,
                                  bool accumulate) {
  asm volatile(SLALOM_WGMMA("64", SLALOM_R32, "%34", "%32, %33, p, 1, 1, %35, %36")
               : SLALOM_D32
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kATransposed ? 1 : 0),
                 "n"(kBTransposed ? 1 : 0));
}

template <bool kBTransposed>
__device__ inline void Wgmma64x64(float (&d)[32], const std::uint32_t (&a)[4], std::uint64_t b,
                                  bool accumulate) {
  asm volatile(SLALOM_WGMMA("64", SLALOM_R32, "%37", "{%32, %33, %34, %35}, %36, p, 1, 1, %38")
               : SLALOM_D32
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),
                 "r"(static_cast<int>(accumulate)), "n"(kBTransposed ? 1 : 0));
}

template <bool kBTransposed>
__device__ inline void Wgmma64x96(float (&d)[48], std::uint64_t a, std::uint64_t b,
                                  bool accumulate) {
  asm volatile(SLALOM_WGMMA("96", SLALOM_R48, "%50", "%48, %49, p, 1, 1, 0, %51")
               : SLALOM_D48
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kBTransposed ? 1 : 0));
}

template <bool kBTransposed, bool kATransposed = false>
__device__ inline void Wgmma64x128(float (&d)[64], std::uint64_t a, std::uint64_t b,
                                   bool accumulate) {
  asm volatile(SLALOM_WGMMA("128", SLALOM_R64, "%66", "%64, %65, p, 1, 1, %67, %68")
               : SLALOM_D64
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kATransposed ? 1 : 0),
                 "n"(kBTransposed ? 1 : 0));
}

template <bool kBTransposed>
__device__ inline void Wgmma64x128(float (&d)[64], const std::uint32_t (&a)[4], std::uint64_t b,
                                   bool accumulate) {
  asm volatile(SLALOM_WGMMA("128", SLALOM_R64, "%69", "{%64, %65, %66, %67}, %68, p, 1, 1, %70")
               : SLALOM_D64
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),
                 "r"(static_cast<int>(accumulate)), "n"(kBTransposed ? 1 : 0));
}

template <bool kBTransposed>
__device__ inline void Wgmma64x192(float (&d)[96], std::uint64_t a, std::uint64_t b,
                                   bool accumulate) {
  asm volatile(SLALOM_WGMMA("192", SLALOM_R96, "%98", "%96, %97, p, 1, 1, 0, %99")
               : SLALOM_D96
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kBTransposed ? 1 : 0));
}

#undef SLALOM_WGMMA
#undef SLALOM_R4
#undef SLALOM_R32
#undef SLALOM_R48
#undef SLALOM_R64
#undef SLALOM_R96
#undef SLALOM_D4
#undef SLALOM_D16
#undef SLALOM_D32
#undef SLALOM_D48
#undef SLALOM_D64
#undef SLALOM_D96

}  // namespace slalom::cuda::hopper
