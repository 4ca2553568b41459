// A strict reader of Prometheus' text format, for tests.
#pragma once

#include <cstdlib>
#include <map>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>

namespace slalom {

// Sample (name and labels, as written) -> value. Throws std::runtime_error on a line that is
// neither a sample, HELP nor TYPE, and on a sample that comes twice.
inline std::map<std::string, double> ParsePrometheus(const std::string& text) {
  static const std::regex kSample(
      R"re(([a-zA-Z_:][a-zA-Z0-9_:]*(\{([a-z]+="[^"]*",?)*\})?) ([^ ]+))re");
  std::map<std::string, double> samples;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line.starts_with("# HELP ") || line.starts_with("# TYPE ")) continue;
    std::smatch match;
    if (!std::regex_match(line, match, kSample)) throw std::runtime_error("no sample: " + line);
    char* end = nullptr;
    const std::string number = match[4];
    const double value = std::strtod(number.c_str(), &end);
    if (*end != '\0') throw std::runtime_error("no number: " + line);
    if (!samples.emplace(match[1], value).second) throw std::runtime_error("twice: " + line);
  }
  return samples;
}

inline bool HasMetric(const std::map<std::string, double>& samples, const std::string& name) {
  const auto at = samples.lower_bound(name);
  return at != samples.end() && (at->first == name || at->first.starts_with(name + "{"));
}

}  // namespace slalom
