// The version of this build, from CMake.
#pragma once

namespace slalom {

inline constexpr const char* kVersion = SLALOM_VERSION;

}  // namespace slalom
