// Reading JSON files that may be damaged or hostile. Internal to model/.
#pragma once

#include <string>
#include <string_view>

#include "nlohmann/json.hpp"

namespace slalom {

// Deeper nesting than this is refused; the files that we read need four levels.
inline constexpr int kMaxJsonDepth = 32;

// Parses `text`; `source` names it in messages. The top level must be an object and no object may
// hold a key twice. Throws Error(kDataLoss).
nlohmann::json ParseJson(std::string_view text, const std::string& source);

// Throws Error: kNotFound when there is no such file, kDataLoss when it is too large or not JSON.
nlohmann::json ReadJsonFile(const std::string& path);

}  // namespace slalom
