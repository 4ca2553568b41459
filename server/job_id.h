// How jobs are named; files in a state folder bear these names, too.
#pragma once

#include <string>
#include <string_view>

namespace slalom {

// Not to be guessed: 120 random bits in 24 digits of base 32.
std::string NewJobId();

// Whether NewJobId could have made it.
bool IsJobId(std::string_view text);

}  // namespace slalom
