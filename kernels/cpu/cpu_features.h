// What this processor can do, asked at run time.
#pragma once

#include <string>

namespace slalom {

struct CpuFeatures {
  bool avx2 = false;         // with FMA and F16C
  bool avx512 = false;       // F, BW, DQ, VL
  bool avx512_bf16 = false;  // dot products of bf16 pairs
  bool amx_bf16 = false;     // tiles, usable under this kernel
  // bf16 dot products beat f32 FMAs: AMD's run at full width, Intel's cores without AMX issue one
  // a cycle beside two FMAs and came out at half the rate (78 against 158 GFLOP/s per core).
  bool fast_bf16_dot = false;
  std::string name;  // "Intel(R) Xeon(R) Processor"
};

CpuFeatures DetectCpuFeatures();

// The cores that this process may run on (its affinity mask), at least 1.
int UsableCores();

}  // namespace slalom
