#include "model/json_file.h"

#include <set>
#include <vector>

#include "kernels/core/error.h"
#include "model/mapped_file.h"

namespace slalom {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxJsonBytes = std::size_t{64} << 20;

}  // namespace

json ParseJson(std::string_view text, const std::string& source) {
  // The keys of every object that is open. JSON allows a key twice and parsers differ in which one
  // wins; a file that does it is not to be trusted.
  std::vector<std::set<std::string>> open_keys;
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth > kMaxJsonDepth) {
      throw Error(ErrorCode::kDataLoss,
                  source + ": nested deeper than " + std::to_string(kMaxJsonDepth) + " levels");
    }
    if (event == json::parse_event_t::object_start) open_keys.emplace_back();
    if (event == json::parse_event_t::object_end) open_keys.pop_back();
    if (event == json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!open_keys.back().insert(key).second) {
        throw Error(ErrorCode::kDataLoss, source + ": key '" + key + "' appears twice");
      }
    }
    return true;
  };
  json value;
  try {
    value = json::parse(text.begin(), text.end(), check);
  } catch (const json::exception& e) {
    throw Error(ErrorCode::kDataLoss, source + ": not valid JSON: " + e.what());
  }
  if (!value.is_object()) {
    throw Error(ErrorCode::kDataLoss, source + ": the top level is not a JSON object");
  }
  return value;
}

json ReadJsonFile(const std::string& path) {
  const MappedFile file(path);
  if (file.size() > kMaxJsonBytes) {
    throw Error(ErrorCode::kDataLoss,
                path + ": " + std::to_string(file.size()) + " bytes is too large for a JSON file");
  }
  return ParseJson({reinterpret_cast<const char*>(file.data()), file.size()}, path);
}

}  // namespace slalom
