#include "kernels/cpu/cpu_features.h"

#include <cpuid.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

namespace slalom {
namespace {

struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Leaf Cpuid(unsigned leaf, unsigned subleaf) {
  Leaf r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

// Which register states the operating system saves (XCR0).
std::uint64_t EnabledStates() {
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

std::string BrandName() {
  std::array<char, 49> text{};
  for (unsigned i = 0; i < 3; ++i) {
    Leaf r;
    if (__get_cpuid(0x80000002u + i, &r.a, &r.b, &r.c, &r.d) == 0) return "x86-64";
    std::memcpy(text.data() + 16 * i, &r, 16);
  }
  std::string name(text.data());
  name.erase(0, std::min(name.find_first_not_of(' '), name.size()));
  while (!name.empty() && name.back() == ' ') name.pop_back();
  return name;
}

}  // namespace

CpuFeatures DetectCpuFeatures() {
  CpuFeatures features;
  features.name = BrandName();
  const auto bit = [](unsigned word, int index) { return ((word >> index) & 1u) != 0; };
  const Leaf basic = Cpuid(1, 0);
  if (!bit(basic.c, 27)) return features;  // no OSXSAVE: no vector state beyond SSE
  const std::uint64_t states = EnabledStates();
  const auto enabled = [&](std::uint64_t mask) { return (states & mask) == mask; };
  const Leaf extended = Cpuid(7, 0);
  const Leaf extended1 = Cpuid(7, 1);
  features.avx2 = enabled(0x6) && bit(basic.c, 12) && bit(basic.c, 29) && bit(extended.b, 5);
  features.avx512 = features.avx2 && enabled(0xE6) && bit(extended.b, 16) && bit(extended.b, 30) &&
                    bit(extended.b, 17) && bit(extended.b, 31);
  features.avx512_bf16 = features.avx512 && bit(extended1.a, 5);
  features.fast_bf16_dot = features.avx512_bf16 && features.name.starts_with("AMD");
  features.amx_bf16 =
      features.avx512 && enabled(0x60000) && bit(extended.d, 24) && bit(extended.d, 22);
  return features;
}

int UsableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

}  // namespace slalom
