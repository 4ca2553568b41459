// Typed, range-checked access to one JSON object. Internal to model/.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nlohmann/json.hpp"

namespace slalom {

// A key that is absent or null has its default, as in diffusers' own configs. Every failure is an
// Error(kInvalidArgument) that names the source, the key, its value and what is allowed. Borrows
// the object. Where several keys are given, the first that is there counts.
class ConfigReader {
 public:
  using Keys = std::initializer_list<const char*>;

  ConfigReader(const nlohmann::json& object, std::string source)
      : object_(object), source_(std::move(source)) {}

  [[noreturn]] void Fail(std::string_view key, const std::string& what) const;
  // Null when absent.
  const nlohmann::json* Find(Keys keys) const;

  std::int64_t Integer(Keys keys, std::int64_t fallback, std::int64_t min, std::int64_t max) const;
  int Int(Keys keys, int fallback, int min, int max) const {
    return static_cast<int>(Integer(keys, fallback, min, max));
  }
  double Double(Keys keys, double fallback, double min, double max) const;
  bool Bool(Keys keys, bool fallback) const;
  std::string String(Keys keys, const std::string& fallback) const;
  std::vector<int> Ints(const char* key, const std::vector<int>& fallback, int min, int max) const;
  std::vector<bool> Bools(const char* key, const std::vector<bool>& fallback) const;
  std::vector<double> Doubles(const char* key) const;  // empty when it is absent
  std::vector<float> Floats(const char* key, const std::vector<float>& fallback) const;

  // The value that goes with the string at `key`; `fallback` when the key is absent.
  template <typename T>
  T Choice(const char* key, T fallback,
           std::initializer_list<std::pair<const char*, T>> choices) const {
    const nlohmann::json* value = Find({key});
    if (value == nullptr) return fallback;
    std::string names;
    for (const auto& [name, choice] : choices) {
      if (*value == name) return choice;
      names += (names.empty() ? "" : ", ") + std::string(name);
    }
    Fail(key, "is " + value->dump() + ", expected one of " + names);
  }

  // The key is absent, null, or one of these; for features that exist here in one form alone.
  void Require(const char* key, std::initializer_list<nlohmann::json> allowed) const;
  void RequireAbsent(Keys keys, const std::string& why) const;
  // For files of our own format: a misspelt key must not be ignored.
  void RequireKnown(const std::set<std::string>& known) const;

 private:
  const nlohmann::json* List(const char* key) const;
  std::int64_t CheckedInteger(const char* key, const nlohmann::json& value, std::int64_t min,
                              std::int64_t max) const;

  const nlohmann::json& object_;
  std::string source_;
};

}  // namespace slalom
