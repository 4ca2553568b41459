// The named character references that prompts can hold. Internal to model/.
#pragma once

#include <string_view>

namespace slalom {

struct HtmlEntity {
  std::string_view name;  // without "&" and ";"
  char32_t character = 0;
  bool bare = false;  // HTML also reads it without the ";"
};

// One of HTML 4's 252 names, &apos; or one of HTML 5's upper-case spellings (&AMP; ...), with the
// meaning that HTML 5 gives it; null for any other name. Case matters.
const HtmlEntity* FindHtmlEntity(std::string_view name);

}  // namespace slalom
