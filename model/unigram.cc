#include "model/unigram.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace slalom {
namespace {

// What SentencePiece calls kUnkPenalty.
constexpr double kUnknownPenalty = 10.0;

// Bytes of the UTF-8 character that starts at `position`.
std::size_t CharacterBytes(std::string_view text, std::size_t position) {
  const auto lead = static_cast<unsigned char>(text[position]);
  std::size_t bytes = 1;
  if (lead >= 0xf0) {
    bytes = 4;
  } else if (lead >= 0xe0) {
    bytes = 3;
  } else if (lead >= 0xc0) {
    bytes = 2;
  }
  return std::min(bytes, text.size() - position);
}

}  // namespace

Unigram::Unigram(std::vector<Piece> pieces, std::int32_t unknown_id)
    : pieces_(std::move(pieces)), unknown_id_(unknown_id) {
  std::erase_if(pieces_, [](const Piece& piece) { return piece.text.empty(); });
  std::ranges::sort(pieces_, {}, &Piece::text);
  double worst = 0;
  for (const Piece& piece : pieces_) worst = std::min(worst, piece.score);
  unknown_score_ = worst - kUnknownPenalty;
}

void Unigram::Segment(std::string_view word, std::vector<std::int32_t>& ids) const {
  // The best way to reach a byte position: its score, and the piece that ends there.
  struct Node {
    bool reached = false;
    double score = 0;
    std::size_t from = 0;
    std::int32_t id = 0;
  };
  std::vector<Node> nodes(word.size() + 1);
  nodes[0].reached = true;
  const auto relax = [&](std::size_t from, std::size_t to, double score, std::int32_t id) {
    const double total = nodes[from].score + score;
    if (!nodes[to].reached || total > nodes[to].score) nodes[to] = {true, total, from, id};
  };

  for (std::size_t from = 0; from < word.size(); from += CharacterBytes(word, from)) {
    // The pieces that begin with word[from, from + length) are neighbours; each further byte
    // narrows the range, and the piece that ends here is its first.
    auto begin = pieces_.begin();
    auto end = pieces_.end();
    const std::size_t one = CharacterBytes(word, from);
    bool covered = false;
    for (std::size_t length = 1; from + length <= word.size(); ++length) {
      const auto next = static_cast<unsigned char>(word[from + length - 1]);
      const auto byte = [length](const Piece& piece) {
        return static_cast<unsigned char>(piece.text[length - 1]);
      };
      // A piece that ended at the length before sorts ahead of its extensions.
      if (begin != end && begin->text.size() < length) ++begin;
      begin = std::partition_point(begin, end, [&](const Piece& p) { return byte(p) < next; });
      end = std::partition_point(begin, end, [&](const Piece& p) { return byte(p) == next; });
      if (begin == end) break;
      if (begin->text.size() != length) continue;
      relax(from, from + length, begin->score, begin->id);
      covered = covered || length == one;
    }
    if (!covered) relax(from, from + one, unknown_score_, unknown_id_);
  }

  std::vector<std::int32_t> reversed;
  for (std::size_t at = word.size(); at > 0; at = nodes[at].from) {
    const std::int32_t id = nodes[at].id;
    if (id == unknown_id_ && !reversed.empty() && reversed.back() == unknown_id_) continue;
    reversed.push_back(id);
  }
  ids.insert(ids.end(), reversed.rbegin(), reversed.rend());
}

}  // namespace slalom
