#include "model/tokenizer.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <map>
#include <utility>

#include "kernels/core/error.h"
#include "model/mapped_file.h"
#include "model/spiece_file.h"
#include "model/unigram.h"

namespace slalom {
namespace {

constexpr std::string_view kMark = "\u2581";  // stands for the space before a word
constexpr int kExtraIds = 300;                // google/umt5's sentinels

// Spaces become marks, runs of them one; the text gets a mark in front if it has none, and spaces
// at its end go. As transformers' SpmConverter sets up its normaliser and Metaspace.
std::string MarkWords(std::string_view text) {
  while (text.ends_with(' ')) text.remove_suffix(1);
  std::string marked;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != ' ') {
      marked += text[i];
    } else if (i == 0 || text[i - 1] != ' ') {
      marked += kMark;
    }
  }
  if (!marked.empty() && !marked.starts_with(kMark)) marked.insert(0, kMark);
  return marked;
}

// "<extra_id_17>" at the start of the text: its length and number.
std::pair<std::size_t, int> MatchExtraId(std::string_view text) {
  constexpr std::string_view kPrefix = "<extra_id_";
  if (!text.starts_with(kPrefix)) return {0, 0};
  const std::string_view rest = text.substr(kPrefix.size());
  int number = -1;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), number);
  const auto digits = static_cast<std::size_t>(end - rest.data());
  const bool leading_zero = digits > 1 && rest.front() == '0';
  const bool valid = error == std::errc() && number >= 0 && number < kExtraIds && !leading_zero &&
                     digits < rest.size() && rest[digits] == '>' && rest.front() != '-';
  if (!valid) return {0, 0};
  return {kPrefix.size() + digits + 1, number};
}

}  // namespace

struct Tokenizer::State {
  Unigram unigram;
  std::map<std::string, std::int32_t> specials;  // "</s>" -> 1, and the like
  std::int32_t pad_id = 0;
  std::int32_t eos_id = 1;
  int pieces = 0;
  int vocab_size = 0;

  // A special token at the start of the text: its length (0: none) and id.
  std::pair<std::size_t, std::int32_t> MatchSpecial(std::string_view text) const {
    if (const auto [length, number] = MatchExtraId(text); length > 0) {
      const int id = pieces + kExtraIds - 1 - number;
      if (id < vocab_size) return {length, id};
    }
    for (const auto& [token, id] : specials) {
      if (text.starts_with(token)) return {token.size(), id};
    }
    return {0, 0};
  }

  void AppendText(std::string_view text, std::vector<std::int32_t>& ids) const {
    const std::string marked = MarkWords(text);
    const std::string_view view = marked;
    for (std::size_t begin = 0; begin < view.size();) {
      const std::size_t end = std::min(view.find(kMark, begin + 1), view.size());
      unigram.Segment(view.substr(begin, end - begin), ids);
      begin = end;
    }
  }
};

namespace {

SpieceFile LoadSpiece(const std::string& path) {
  const MappedFile file(path);
  SpieceFile spiece = ParseSpieceFile({file.data(), file.size()}, path);
  for (const auto& [id, what] :
       {std::pair(spiece.pad_id, "<pad>"), std::pair(spiece.eos_id, "</s>"),
        std::pair(spiece.unk_id, "<unk>")}) {
    if (id < 0) throw Error(ErrorCode::kInvalidArgument, path + ": has no " + what);
  }
  return spiece;
}

}  // namespace

Tokenizer::Tokenizer(const std::string& folder, int vocab_size) {
  const std::string path = (std::filesystem::path(folder) / "spiece.model").string();
  SpieceFile spiece = LoadSpiece(path);
  const int count = static_cast<int>(spiece.pieces.size());
  if (count > vocab_size) {
    throw Error(ErrorCode::kInvalidArgument, path + ": has " + std::to_string(count) +
                                                 " pieces, but the text encoder embeds " +
                                                 std::to_string(vocab_size));
  }
  using Type = SpieceFile::Type;
  std::vector<Unigram::Piece> pieces;
  std::map<std::string, std::int32_t> specials;
  for (int id = 0; id < count; ++id) {
    SpieceFile::Piece& piece = spiece.pieces[static_cast<std::size_t>(id)];
    if (piece.type == Type::kControl || piece.type == Type::kUnknown) {
      specials.emplace(std::move(piece.text), id);
    } else if (piece.type != Type::kUnused) {
      pieces.push_back({std::move(piece.text), piece.score, id});
    }
  }
  state_ = std::make_unique<const State>(State{Unigram(std::move(pieces), spiece.unk_id),
                                               std::move(specials), spiece.pad_id, spiece.eos_id,
                                               count, vocab_size});
}

Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

TokenIds Tokenizer::Encode(std::string_view text, int max_length) const {
  if (max_length < 1) throw Error(ErrorCode::kInternal, "Encode: max_length is below 1");
  TokenIds result;
  std::size_t begin = 0;  // of the text that is not yet encoded
  for (std::size_t at = 0; at < text.size();) {
    const auto [length, id] =
        text[at] == '<' ? state_->MatchSpecial(text.substr(at)) : std::pair<std::size_t, int>{};
    if (length == 0) {
      ++at;
      continue;
    }
    state_->AppendText(text.substr(begin, at - begin), result.ids);
    result.ids.push_back(id);
    at += length;
    begin = at;
  }
  state_->AppendText(text.substr(begin), result.ids);

  const auto most = static_cast<std::size_t>(max_length);
  if (result.ids.size() > most - 1) result.ids.resize(most - 1);
  result.ids.push_back(state_->eos_id);
  result.length = static_cast<int>(result.ids.size());
  result.ids.resize(most, state_->pad_id);
  return result;
}

int Tokenizer::vocab_size() const { return state_->pieces; }

}  // namespace slalom
