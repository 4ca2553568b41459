#include "model/prompt_cleaning.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <utility>

#include "kernels/core/error.h"
#include "model/html_entities.h"

namespace slalom {
namespace {

constexpr char32_t kReplacement = 0xfffd;
constexpr char32_t kMaxCodePoint = 0x10ffff;

// --- UTF-8 ---

std::u32string Decode(std::string_view text) {
  std::u32string result;
  result.reserve(text.size());
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  for (std::size_t at = 0; at < text.size();) {
    utf8proc_int32_t code = -1;
    const utf8proc_ssize_t used =
        utf8proc_iterate(bytes + at, static_cast<utf8proc_ssize_t>(text.size() - at), &code);
    if (used <= 0 || code < 0) {
      throw Error(ErrorCode::kInvalidArgument,
                  "the prompt is not UTF-8: invalid byte at offset " + std::to_string(at));
    }
    result.push_back(static_cast<char32_t>(code));
    at += static_cast<std::size_t>(used);
  }
  return result;
}

std::string Encode(std::u32string_view text) {
  std::string result;
  result.reserve(text.size());
  for (char32_t code : text) {
    std::array<utf8proc_uint8_t, 4> bytes{};
    const auto count = utf8proc_encode_char(static_cast<utf8proc_int32_t>(code), bytes.data());
    result.append(reinterpret_cast<const char*>(bytes.data()), static_cast<std::size_t>(count));
  }
  return result;
}

std::u32string Normalize(std::u32string_view text, int options) {
  const std::string utf8 = Encode(text);
  utf8proc_uint8_t* mapped = nullptr;
  const utf8proc_ssize_t size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(utf8.data()),
                   static_cast<utf8proc_ssize_t>(utf8.size()), &mapped,
                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE | options));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(mapped, &std::free);
  if (size == UTF8PROC_ERROR_NOMEM) throw std::bad_alloc();
  if (size < 0) {
    throw Error(ErrorCode::kInvalidArgument,
                std::string("the prompt cannot be normalised: ") + utf8proc_errmsg(size));
  }
  return Decode({reinterpret_cast<const char*>(mapped), static_cast<std::size_t>(size)});
}

// --- HTML ---

bool IsDigit(char32_t c) { return c >= '0' && c <= '9'; }
bool IsLetter(char32_t c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool IsHexDigit(char32_t c) {
  return IsDigit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

// What Windows-1252 has in the place of the C1 controls; zero where it has nothing.
constexpr std::array<char32_t, 32> kWindows1252 = {
    0x20ac, 0,      0x201a, 0x0192, 0x201e, 0x2026, 0x2020, 0x2021, 0x02c6, 0x2030, 0x0160,
    0x2039, 0x0152, 0,      0x017d, 0,      0,      0x2018, 0x2019, 0x201c, 0x201d, 0x2022,
    0x2013, 0x2014, 0x02dc, 0x2122, 0x0161, 0x203a, 0x0153, 0,      0x017e, 0x0178};

char32_t FixC1Control(char32_t c) {
  if (c < 0x80 || c > 0x9f) return c;
  const char32_t fixed = kWindows1252[c - 0x80];
  return fixed != 0 ? fixed : c;
}

// The text of a numeric reference, by the rules of HTML 5's tokeniser.
std::u32string NumericCharacter(char32_t code) {
  if (code == 0 || code > kMaxCodePoint || (code >= 0xd800 && code <= 0xdfff)) {
    return {kReplacement};
  }
  if (code >= 0x80 && code <= 0x9f) return {FixC1Control(code)};
  const bool control =
      (code <= 0x8) || code == 0xb || (code >= 0xe && code <= 0x1f) || code == 0x7f;
  const bool noncharacter = (code >= 0xfdd0 && code <= 0xfdef) || (code & 0xfffe) == 0xfffe;
  if (control || noncharacter) return {};
  return {code};
}

// "#123;", "#x1F600" at the start of the text (what follows an "&"): characters read, and the code
// point, which stays above kMaxCodePoint once it is there. Zero characters: no match.
std::pair<std::size_t, char32_t> ReadNumeric(std::u32string_view text) {
  if (text.size() < 2 || text[0] != '#') return {0, 0};
  const bool hex = text[1] == 'x' || text[1] == 'X';
  std::size_t at = hex ? 2 : 1;
  const std::size_t first = at;
  char32_t code = 0;
  for (; at < text.size() && (hex ? IsHexDigit(text[at]) : IsDigit(text[at])); ++at) {
    const char32_t c = text[at];
    const char32_t digit = IsDigit(c) ? c - '0' : (c | 0x20) - 'a' + 10;
    code = std::min<char32_t>(code * (hex ? 16 : 10) + digit, kMaxCodePoint + 1);
  }
  if (at == first) return {0, 0};
  if (at < text.size() && text[at] == ';') ++at;
  return {at, code};
}

const HtmlEntity* FindEntity(std::u32string_view name) {
  std::string ascii;
  for (char32_t c : name) {
    if (!IsDigit(c) && !IsLetter(c)) return nullptr;
    ascii.push_back(static_cast<char>(c));
  }
  return FindHtmlEntity(ascii);
}

// A named reference at the start of the text (what follows an "&"), as Python's html.unescape reads
// it: with its ";", or else the longest name that may stand bare. Characters read and the result.
std::pair<std::size_t, char32_t> ReadNamed(std::u32string_view text) {
  constexpr std::size_t kLongest = 32;
  std::size_t length = 0;
  while (length < std::min(text.size(), kLongest) &&
         std::u32string_view(U"\t\n\f <&#;").find(text[length]) == std::u32string_view::npos) {
    ++length;
  }
  const std::u32string_view name = text.substr(0, length);
  if (length < text.size() && text[length] == ';') {
    if (const HtmlEntity* entity = FindEntity(name)) return {length + 1, entity->character};
  }
  for (std::size_t prefix = length; prefix > 1; --prefix) {
    const HtmlEntity* entity = FindEntity(name.substr(0, prefix));
    if (entity != nullptr && entity->bare) return {prefix, entity->character};
  }
  return {0, 0};
}

// Python's html.unescape, as far as the table of names reaches.
std::u32string UnescapeHtml(std::u32string_view text) {
  std::u32string result;
  result.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    if (text[at] != '&') {
      result.push_back(text[at++]);
      continue;
    }
    const std::u32string_view rest = text.substr(at + 1);
    if (const auto [length, code] = ReadNumeric(rest); length > 0) {
      result += NumericCharacter(code);
      at += 1 + length;
    } else if (const auto [named_length, character] = ReadNamed(rest); named_length > 0) {
      result.push_back(character);
      at += 1 + named_length;
    } else {
      result.push_back(text[at++]);
    }
  }
  return result;
}

// &EACUTE; and the like: the upper case of a name that is all lower case.
std::optional<std::u32string> UpperCaseEntity(std::u32string_view name) {
  std::u32string lower;
  for (char32_t c : name) {
    if (c >= 'a' && c <= 'z') return std::nullopt;
    lower.push_back(IsLetter(c) ? c | 0x20 : c);
  }
  const HtmlEntity* entity = FindEntity(lower);
  if (entity == nullptr) return std::nullopt;
  if (entity->character == 0xdf) return U"SS";
  return std::u32string{
      static_cast<char32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(entity->character)))};
}

// --- ftfy's fixers ---

// ftfy.fixes.unescape_html: references that end in ";" alone, for they are not ambiguous.
std::u32string UnescapeClosedHtml(std::u32string_view text) {
  constexpr std::size_t kLongest = 24;
  std::u32string result;
  result.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = at + 1;
    const bool numeric = end < text.size() && text[end] == '#';
    const std::size_t first = numeric ? at + 2 : at + 1;
    end = first;
    while (end < text.size() && end - first < kLongest &&
           (IsDigit(text[end]) || IsLetter(text[end]))) {
      ++end;
    }
    if (text[at] != '&' || end == first || end >= text.size() || text[end] != ';') {
      result.push_back(text[at++]);
      continue;
    }
    const std::u32string_view inside = text.substr(at + 1, end - at);  // with the ";"
    const std::u32string_view name = inside.substr(0, inside.size() - 1);
    const auto [length, code] = ReadNumeric(inside);
    if (length == inside.size() && code != ';') {
      result += NumericCharacter(code);
    } else if (const HtmlEntity* entity = FindEntity(name)) {
      result.push_back(entity->character);
    } else if (const auto upper = UpperCaseEntity(name)) {
      result += *upper;
    } else {
      result += text.substr(at, end + 1 - at);
    }
    at = end + 1;
  }
  return result;
}

// Latin digraphs and ligatures that stand for two letters (ftfy.chardata.LIGATURES).
std::u32string_view SplitLigature(char32_t c) {
  switch (c) {
    case 0x0132:
      return U"IJ";
    case 0x0133:
      return U"ij";
    case 0x0149:
      return U"\u02bcn";
    case 0x01c4:
      return U"D\u017d";
    case 0x01c5:
      return U"D\u017e";
    case 0x01c6:
      return U"d\u017e";
    case 0x01c7:
      return U"LJ";
    case 0x01c8:
      return U"Lj";
    case 0x01c9:
      return U"lj";
    case 0x01ca:
      return U"NJ";
    case 0x01cb:
      return U"Nj";
    case 0x01cc:
      return U"nj";
    case 0x01f1:
      return U"DZ";
    case 0x01f2:
      return U"Dz";
    case 0x01f3:
      return U"dz";
    case 0xfb00:
      return U"ff";
    case 0xfb01:
      return U"fi";
    case 0xfb02:
      return U"fl";
    case 0xfb03:
      return U"ffi";
    case 0xfb04:
      return U"ffl";
    case 0xfb05:
      return U"\u017ft";
    case 0xfb06:
      return U"st";
    default:
      return {};
  }
}

bool IsWide(char32_t c) { return c == 0x3000 || (c >= 0xff01 && c < 0xfff0); }

// Half-width and full-width forms in their standard width; the ideographic space as a space.
std::u32string StandardWidth(char32_t c) {
  if (c == 0x3000) return U" ";
  return Normalize({&c, 1}, UTF8PROC_COMPAT);
}

char32_t StraightenQuote(char32_t c) {
  if (c == 0x02bc || (c >= 0x2018 && c <= 0x201b)) return '\'';
  if (c >= 0x201c && c <= 0x201f) return '"';
  return c;
}

bool IsUnwantedControl(char32_t c) {
  return c <= 0x8 || c == 0xb || (c >= 0xe && c <= 0x1f) || c == 0x7f ||
         (c >= 0x206a && c <= 0x206f) || c == 0xfeff || (c >= 0xfff9 && c <= 0xfffc);
}

bool IsLineBreak(char32_t c) { return c == '\r' || c == 0x85 || c == 0x2028 || c == 0x2029; }

// The fixers that look at one character.
std::u32string FixCharacters(std::u32string_view text) {
  std::u32string result;
  result.reserve(text.size());
  for (char32_t c : text) {
    c = FixC1Control(c);
    std::u32string replaced(SplitLigature(c));
    if (replaced.empty()) replaced = IsWide(c) ? StandardWidth(c) : std::u32string{c};
    for (char32_t r : replaced) result.push_back(StraightenQuote(r));
  }
  return result;
}

std::u32string FixLineBreaks(std::u32string_view text) {
  std::u32string result;
  result.reserve(text.size());
  for (std::size_t i = 0; i < text.size(); ++i) {
    const bool crlf = text[i] == '\r' && i + 1 < text.size() && text[i + 1] == '\n';
    if (crlf) continue;
    result.push_back(IsLineBreak(text[i]) ? U'\n' : text[i]);
  }
  return result;
}

// Drops "ESC [ 1;31 m" and the control characters that text has no use for.
std::u32string RemoveControls(std::u32string_view text) {
  constexpr char32_t kEscape = 0x1b;
  std::u32string result;
  result.reserve(text.size());
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == kEscape && i + 1 < text.size() && text[i + 1] == '[') {
      std::size_t end = i + 2;
      while (end < text.size() && (IsDigit(text[end]) || text[end] == ';')) ++end;
      if (end < text.size() && IsLetter(text[end])) {
        i = end;
        continue;
      }
    }
    if (!IsUnwantedControl(text[i])) result.push_back(text[i]);
  }
  return result;
}

// ftfy.fix_and_explain on one line, without the repair of encodings: until nothing changes, for
// one fixer's result can be another's input.
std::u32string FixLine(std::u32string text, bool unescape) {
  for (;;) {
    std::u32string fixed = unescape ? UnescapeClosedHtml(text) : text;
    fixed = RemoveControls(FixLineBreaks(FixCharacters(fixed)));
    const bool ascii = std::ranges::all_of(fixed, [](char32_t c) { return c < 0x80; });
    if (!ascii) fixed = Normalize(fixed, 0);
    if (fixed == text) return fixed;
    text = std::move(fixed);
  }
}

// ftfy.fix_text. From the first line with a "<" on, the text may be HTML that is to stay as it is.
std::u32string FixText(std::u32string_view text) {
  std::u32string result;
  bool unescape = true;
  while (!text.empty()) {
    const std::size_t line = std::min(text.find(U'\n'), text.size() - 1) + 1;
    unescape = unescape && text.substr(0, line).find(U'<') == std::u32string_view::npos;
    result += FixLine(std::u32string(text.substr(0, line)), unescape);
    text.remove_prefix(line);
  }
  return result;
}

// Unicode's White_Space property.
bool IsSpace(char32_t c) {
  return (c >= 0x9 && c <= 0xd) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

// Runs of white space become one space; none at the ends.
std::u32string CollapseSpaces(std::u32string_view text) {
  std::u32string result;
  result.reserve(text.size());
  for (char32_t c : text) {
    if (!IsSpace(c)) {
      result.push_back(c);
    } else if (!result.empty() && result.back() != ' ') {
      result.push_back(' ');
    }
  }
  if (!result.empty() && result.back() == ' ') result.pop_back();
  return result;
}

}  // namespace

std::string CleanPrompt(std::string_view text) {
  const std::u32string fixed = FixText(Decode(text));
  return Encode(CollapseSpaces(UnescapeHtml(UnescapeHtml(fixed))));
}

}  // namespace slalom
