// Prompt cleaning: what Wan does to a prompt before it is tokenised.
#pragma once

#include <string>
#include <string_view>

namespace slalom {

// The prompt as the reference pipelines clean it (diffusers' prompt_clean, Wan2.1's
// whitespace_clean(basic_clean(text))): ftfy.fix_text, HTML entities unescaped twice, whitespace
// collapsed and stripped. Of ftfy it does what changes ordinary text: entities, terminal escapes,
// Latin ligatures, full-width forms, curly quotes, line breaks, control characters, NFC. Left out:
// the repair of mojibake, for a prompt arrives as checked UTF-8. Entities: the numeric ones and the
// 252 named ones of HTML 4, of HTML 5's 2,231.
// Throws Error(kInvalidArgument) when the text is not UTF-8. Thread-safe.
std::string CleanPrompt(std::string_view text);

}  // namespace slalom
