#include "model/config_reader.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/core/error.h"

namespace slalom {

using nlohmann::json;

void ConfigReader::Fail(std::string_view key, const std::string& what) const {
  throw Error(ErrorCode::kInvalidArgument, source_ + ": " + std::string(key) + " " + what);
}

const json* ConfigReader::Find(Keys keys) const {
  for (const char* key : keys) {
    const auto it = object_.find(key);
    if (it != object_.end() && !it->is_null()) return &*it;
  }
  return nullptr;
}

std::int64_t ConfigReader::Integer(Keys keys, std::int64_t fallback, std::int64_t min,
                                   std::int64_t max) const {
  const json* value = Find(keys);
  return value == nullptr ? fallback : CheckedInteger(*keys.begin(), *value, min, max);
}

std::int64_t ConfigReader::CheckedInteger(const char* key, const json& value, std::int64_t min,
                                          std::int64_t max) const {
  constexpr auto kMax = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  // is_number_integer() is true for unsigned ones too; those beyond int64 would wrap.
  const bool fits = value.is_number_integer() &&
                    (!value.is_number_unsigned() || value.get<std::uint64_t>() <= kMax) &&
                    value.get<std::int64_t>() >= min && value.get<std::int64_t>() <= max;
  if (!fits) {
    Fail(key, "is " + value.dump() + ", expected an integer from " + std::to_string(min) + " to " +
                  std::to_string(max));
  }
  return value.get<std::int64_t>();
}

double ConfigReader::Double(Keys keys, double fallback, double min, double max) const {
  const json* value = Find(keys);
  if (value == nullptr) return fallback;
  const double number = value->is_number() ? value->get<double>() : std::nan("");
  if (!(number >= min && number <= max)) {
    Fail(*keys.begin(), "is " + value->dump() + ", expected a number from " + json(min).dump() +
                            " to " + json(max).dump());
  }
  return number;
}

bool ConfigReader::Bool(Keys keys, bool fallback) const {
  const json* value = Find(keys);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) Fail(*keys.begin(), "is " + value->dump() + ", expected a boolean");
  return value->get<bool>();
}

std::string ConfigReader::String(Keys keys, const std::string& fallback) const {
  const json* value = Find(keys);
  if (value == nullptr) return fallback;
  if (!value->is_string()) Fail(*keys.begin(), "is " + value->dump() + ", expected a string");
  return value->get<std::string>();
}

const json* ConfigReader::List(const char* key) const {
  const json* value = Find({key});
  if (value != nullptr && !value->is_array()) {
    Fail(key, "is " + value->dump() + ", expected a list");
  }
  return value;
}

std::vector<int> ConfigReader::Ints(const char* key, const std::vector<int>& fallback, int min,
                                    int max) const {
  const json* value = List(key);
  if (value == nullptr) return fallback;
  std::vector<int> result;
  for (const json& item : *value) {
    result.push_back(static_cast<int>(CheckedInteger(key, item, min, max)));
  }
  return result;
}

std::vector<bool> ConfigReader::Bools(const char* key, const std::vector<bool>& fallback) const {
  const json* value = List(key);
  if (value == nullptr) return fallback;
  std::vector<bool> result;
  for (const json& item : *value) {
    if (!item.is_boolean()) Fail(key, "holds " + item.dump() + ", expected booleans");
    result.push_back(item.get<bool>());
  }
  return result;
}

std::vector<double> ConfigReader::Doubles(const char* key) const {
  const json* value = List(key);
  std::vector<double> result;
  if (value == nullptr) return result;
  for (const json& item : *value) {
    if (!item.is_number()) Fail(key, "holds " + item.dump() + ", expected numbers");
    result.push_back(item.get<double>());
  }
  return result;
}

std::vector<float> ConfigReader::Floats(const char* key, const std::vector<float>& fallback) const {
  if (List(key) == nullptr) return fallback;
  const std::vector<double> numbers = Doubles(key);
  return {numbers.begin(), numbers.end()};
}

void ConfigReader::Require(const char* key, std::initializer_list<json> allowed) const {
  const json* value = Find({key});
  if (value == nullptr || std::ranges::find(allowed, *value) != allowed.end()) return;
  std::string list;
  for (const json& item : allowed) list += (list.empty() ? "" : " or ") + item.dump();
  Fail(key, "is " + value->dump() + "; only " + list + " is supported");
}

void ConfigReader::RequireAbsent(Keys keys, const std::string& why) const {
  for (const char* key : keys) {
    if (const json* value = Find({key})) Fail(key, "is " + value->dump() + ": " + why);
  }
}

void ConfigReader::RequireKnown(const std::set<std::string>& known) const {
  for (const auto& [key, value] : object_.items()) {
    if (!known.contains(key)) Fail("'" + key + "'", "is not a known key");
  }
}

}  // namespace slalom
