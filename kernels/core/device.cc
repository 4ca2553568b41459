#include "kernels/core/device.h"

#include <charconv>

#include "kernels/core/error.h"

namespace slalom {

std::string ToString(Device device) {
  return device.is_cpu() ? "cpu" : "cuda:" + std::to_string(device.index);
}

Device ParseDevice(std::string_view text) {
  if (text == "cpu") return {Device::Kind::kCpu, 0};
  if (text == "cuda") return {Device::Kind::kCuda, 0};
  constexpr std::string_view kPrefix = "cuda:";
  if (text.starts_with(kPrefix)) {
    const std::string_view digits = text.substr(kPrefix.size());
    int index = -1;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), index);
    if (error == std::errc() && end == digits.data() + digits.size() && index >= 0) {
      return {Device::Kind::kCuda, index};
    }
  }
  throw Error(ErrorCode::kInvalidArgument,
              "device: \"" + std::string(text) + "\" is not one of cpu, cuda, cuda:N");
}

}  // namespace slalom
