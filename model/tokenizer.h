// Tokenizer: cleaned prompt -> ids of the UMT5 vocabulary.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace slalom {

struct TokenIds {
  std::vector<std::int32_t> ids;  // padded with the pad id to the length asked for
  int length = 0;                 // ids that count, </s> included: the mask's ones
};

// A SentencePiece unigram model used the way Hugging Face's UMT5 tokenizer (tokenizer.json) uses
// it: each word stands alone behind a U+2581 prefix, a stretch of characters that the vocabulary
// lacks becomes one <unk> (there is no byte fallback), and a literal </s>, <pad>, <s>, <unk> or
// <extra_id_N> in the text becomes that special id. Immutable; concurrent use is safe.
class Tokenizer {
 public:
  // Reads <folder>/spiece.model; the ids of <pad>, </s> and <unk> come from it. 300 sentinels stand
  // above its pieces, <extra_id_0> last; those at or above `vocab_size`, the rows of the embedding,
  // are ordinary text. The model's normaliser is not applied: UMT5's is the identity, and prompts
  // come cleaned. Throws Error: kNotFound, kDataLoss (not a SentencePiece model),
  // kInvalidArgument (a special token is missing, or more pieces than vocab_size).
  Tokenizer(const std::string& folder, int vocab_size);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  // At most max_length - 1 ids, then </s>, then padding up to max_length.
  TokenIds Encode(std::string_view text, int max_length = 512) const;

  int vocab_size() const;  // pieces of the model file, without the extra ids

 private:
  struct State;
  std::unique_ptr<const State> state_;
};

}  // namespace slalom
