#include "tests/bench/load_mix.h"

#include <map>
#include <regex>
#include <sstream>
#include <stdexcept>

namespace slalom::bench {

std::vector<LoadClass> ParseMix(const std::string& text) {
  static const std::regex kClass(
      "([A-Za-z0-9_-]+):([0-9.]+):([0-9]+)x([0-9]+)x([0-9]+):([0-9]+)(:(low|normal|high))?");
  static const std::map<std::string, v1::Priority> kPriorities = {{"", v1::PRIORITY_NORMAL},
                                                                  {"low", v1::PRIORITY_LOW},
                                                                  {"normal", v1::PRIORITY_NORMAL},
                                                                  {"high", v1::PRIORITY_HIGH}};
  std::vector<LoadClass> mix;
  std::istringstream list(text);
  for (std::string part; std::getline(list, part, ',');) {
    std::smatch match;
    if (!std::regex_match(part, match, kClass)) {
      throw std::invalid_argument("'" + part + "' is not NAME:SHARE:WxHxFRAMES:STEPS[:PRIORITY]");
    }
    LoadClass load_class;
    load_class.name = match[1];
    load_class.share = std::stod(match[2]);
    v1::GenerateVideoRequest& request = load_class.request;
    request.set_prompt("a red ball rolls over a table, " + load_class.name);
    request.set_width(std::stoi(match[3]));
    request.set_height(std::stoi(match[4]));
    request.set_num_frames(std::stoi(match[5]));
    request.set_steps(std::stoi(match[6]));
    request.set_priority(kPriorities.at(match[8]));
    mix.push_back(std::move(load_class));
  }
  if (mix.empty()) throw std::invalid_argument("the mix is empty");
  return mix;
}

std::size_t Draw(const std::vector<LoadClass>& mix, std::mt19937_64& random) {
  std::vector<double> shares;
  for (const LoadClass& load_class : mix) shares.push_back(load_class.share);
  return std::discrete_distribution<std::size_t>(shares.begin(), shares.end())(random);
}

}  // namespace slalom::bench
