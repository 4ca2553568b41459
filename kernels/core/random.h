// Counter-based noise: element i of a stream depends on (seed, stream, i) alone, so that a clip's
// noise is the same on every device, in any order and for any number of threads.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace slalom {

// Philox 4x32 with 10 rounds (Salmon et al., SC 2011).
std::array<std::uint32_t, 4> Philox4x32(std::uint64_t key, std::uint64_t counter_high,
                                        std::uint64_t counter_low);

// Fills `out` with N(0, 1), elements [offset, offset + out.size()) of the stream. It uses only
// IEEE additions, multiplications, divisions and square roots, so that every machine gives the
// same bits. The noise is made on the host and uploaded: once per clip, a few MB.
void FillNormal(std::uint64_t seed, std::uint64_t stream, std::uint64_t offset,
                std::span<float> out);

}  // namespace slalom
