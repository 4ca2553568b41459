// Where a tensor lives.
#pragma once

#include <string>
#include <string_view>

namespace slalom {

struct Device {
  enum class Kind { kCpu, kCuda };
  Kind kind = Kind::kCpu;
  int index = 0;

  bool is_cpu() const { return kind == Kind::kCpu; }
  friend bool operator==(const Device&, const Device&) = default;
};

// "cpu" or "cuda:0".
std::string ToString(Device device);

// Parses "cpu", "cuda" or "cuda:N". Throws Error(kInvalidArgument) on anything else.
Device ParseDevice(std::string_view text);

}  // namespace slalom
