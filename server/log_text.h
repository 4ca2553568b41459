// Text for log lines.
#pragma once

#include <string>
#include <string_view>

namespace slalom {

// What clients sent stands in error messages: with this it cannot make a log line of its own, nor
// write to whoever's terminal shows the log. Control characters become \xNN.
std::string OneLine(std::string_view text);

}  // namespace slalom
