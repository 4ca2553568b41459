#include "server/job_id.h"

#include <random>

namespace slalom {
namespace {

constexpr std::string_view kDigits = "0123456789abcdefghijklmnopqrstuv";
constexpr std::size_t kLength = 24;

}  // namespace

std::string NewJobId() {
  std::random_device random;
  std::string id;
  while (id.size() < kLength) id += kDigits[random() % kDigits.size()];
  return id;
}

bool IsJobId(std::string_view text) {
  return text.size() == kLength && text.find_first_not_of(kDigits) == std::string_view::npos;
}

}  // namespace slalom
