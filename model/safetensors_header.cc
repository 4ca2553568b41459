#include "model/safetensors_header.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/core/error.h"
#include "nlohmann/json.hpp"

namespace slalom {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

// The limit of the reference implementation.
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;
// A hundred times the largest model's; it bounds the memory that a hostile header can take.
constexpr std::size_t kMaxTensors = 200'000;

struct RawEntry {
  std::string name;
  std::optional<std::string> dtype;
  std::optional<std::vector<std::uint64_t>> shape;
  std::optional<std::vector<std::uint64_t>> offsets;
};

// Receives the parser's events and accepts only what a header may hold, so that hostile nesting or
// size never becomes a tree in memory. Each member returns false to stop, with error() set.
class HeaderSax {
 public:
  using json = nlohmann::json;

  std::vector<RawEntry> entries;
  std::map<std::string, std::string> metadata;

  const std::string& error() const { return error_; }

  bool null() { return Unexpected("null"); }
  bool boolean(bool) { return Unexpected("a boolean"); }
  bool number_integer(json::number_integer_t) { return Unexpected("a negative number"); }
  bool number_float(json::number_float_t, const std::string&) {
    return Unexpected("a number that is no 64-bit integer");
  }
  bool binary(json::binary_t&) { return Unexpected("binary data"); }

  bool number_unsigned(json::number_unsigned_t value) {
    if (numbers_ == nullptr) return Unexpected("a number");
    // Longer lists are never right; the bound keeps a hostile one from filling the memory.
    if (numbers_->size() > Shape::kMaxRank) return Fail(Where() + " has too many elements");
    numbers_->push_back(value);
    return true;
  }

  bool string(std::string& value) {
    if (depth_ == 2 && in_metadata_) {
      if (!metadata.emplace(key_, std::move(value)).second) return Duplicate();
      return true;
    }
    if (depth_ == 2 && key_ == "dtype") {
      if (entries.back().dtype) return Duplicate();
      entries.back().dtype = std::move(value);
      return true;
    }
    return Unexpected("a string");
  }

  bool start_object(std::size_t) {
    if (numbers_ != nullptr || depth_ >= 2) return Unexpected("an object");
    ++depth_;
    if (depth_ == 2) {
      in_metadata_ = key_ == "__metadata__";
      if (!in_metadata_) {
        if (entries.size() == kMaxTensors) return Fail("more than 200000 tensors");
        entries.emplace_back();
        entries.back().name = key_;
      }
    }
    return true;
  }

  bool end_object() {
    --depth_;
    return true;
  }

  bool key(std::string& value) {
    key_ = std::move(value);
    return true;
  }

  bool start_array(std::size_t) {
    if (depth_ != 2 || in_metadata_ || numbers_ != nullptr) return Unexpected("a list");
    RawEntry& entry = entries.back();
    std::optional<std::vector<std::uint64_t>>* field = nullptr;
    if (key_ == "shape") field = &entry.shape;
    if (key_ == "data_offsets") field = &entry.offsets;
    if (field == nullptr) return Unexpected("a list");
    if (field->has_value()) return Duplicate();
    numbers_ = &field->emplace();
    return true;
  }

  bool end_array() {
    numbers_ = nullptr;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const json::exception&) {
    return Fail("not valid JSON at byte " + std::to_string(position));
  }

 private:
  std::string Where() const {
    if (depth_ == 2 && !in_metadata_) return "tensor '" + entries.back().name + "': " + key_;
    return depth_ == 0 ? "the top level" : "'" + key_ + "'";
  }
  bool Unexpected(const char* what) { return Fail(Where() + " holds " + what); }
  bool Duplicate() { return Fail(Where() + " appears twice"); }
  bool Fail(std::string message) {
    if (error_.empty()) error_ = std::move(message);
    return false;
  }

  int depth_ = 0;
  bool in_metadata_ = false;
  std::string key_;
  std::vector<std::uint64_t>* numbers_ = nullptr;
  std::string error_;
};

// Turns one raw entry into a checked one. `data_begin` and `data_bytes` describe the file's data.
class EntryChecker {
 public:
  EntryChecker(const std::string& path, std::uint64_t data_begin, std::uint64_t data_bytes)
      : path_(path), data_begin_(data_begin), data_bytes_(data_bytes) {}

  SafetensorsEntry Check(const RawEntry& raw) const {
    if (!raw.dtype) Damaged(raw, "has no dtype");
    if (!raw.shape) Damaged(raw, "has no shape");
    if (!raw.offsets || raw.offsets->size() != 2) Damaged(raw, "needs two data_offsets");
    SafetensorsEntry entry;
    entry.dtype = ParseDType(raw);
    const std::uint64_t bytes = CheckedBytes(raw, ByteSize(entry.dtype), entry.shape);
    const auto [begin, end] = std::pair((*raw.offsets)[0], (*raw.offsets)[1]);
    if (begin > end || end > data_bytes_) {
      Damaged(raw, "has data_offsets [" + std::to_string(begin) + ", " + std::to_string(end) +
                       "] outside the " + std::to_string(data_bytes_) + " bytes of data");
    }
    if (end - begin != bytes) {
      Damaged(raw, "has " + std::to_string(end - begin) + " bytes of data, its shape needs " +
                       std::to_string(bytes));
    }
    if ((data_begin_ + begin) % ByteSize(entry.dtype) != 0) {
      Damaged(raw, "is not aligned to its element size");
    }
    entry.offset = data_begin_ + begin;
    return entry;
  }

 private:
  [[noreturn]] void Damaged(const RawEntry& raw, const std::string& what) const {
    throw Error(ErrorCode::kDataLoss, path_ + ": tensor '" + raw.name + "' " + what);
  }

  DType ParseDType(const RawEntry& raw) const {
    for (DType type : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64, DType::kI32,
                       DType::kI64, DType::kU8}) {
      if (*raw.dtype == DTypeName(type)) return type;
    }
    throw Error(ErrorCode::kInvalidArgument, path_ + ": tensor '" + raw.name +
                                                 "' has the element type '" + *raw.dtype +
                                                 "', which is not supported");
  }

  std::uint64_t CheckedBytes(const RawEntry& raw, std::uint64_t element_bytes, Shape& shape) const {
    if (raw.shape->size() > Shape::kMaxRank) {
      throw Error(ErrorCode::kInvalidArgument, path_ + ": tensor '" + raw.name +
                                                   "' has more than " +
                                                   std::to_string(Shape::kMaxRank) + " dimensions");
    }
    constexpr auto kMax = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    std::uint64_t bytes = element_bytes;
    std::vector<std::int64_t> dims;
    // A zero makes the product zero but must not hide an overflow of the other dimensions.
    for (std::uint64_t dim : *raw.shape) {
      if (dim > kMax || (dim != 0 && bytes > kMax / dim)) {
        Damaged(raw, "has a shape whose size overflows");
      }
      if (dim != 0) bytes *= dim;
      dims.push_back(static_cast<std::int64_t>(dim));
    }
    if (std::ranges::count(dims, 0) > 0) bytes = 0;
    shape = Shape(std::span<const std::int64_t>(dims));
    return bytes;
  }

  const std::string& path_;
  std::uint64_t data_begin_;
  std::uint64_t data_bytes_;
};

// The format allows neither overlaps nor holes: each tensor begins where the one before ends.
void CheckCoverage(const SafetensorsHeader& header, std::uint64_t data_begin,
                   std::uint64_t file_bytes, const std::string& path) {
  struct Span {
    std::uint64_t begin;
    std::uint64_t end;
    const std::string* name;
  };
  std::vector<Span> spans;
  spans.reserve(header.tensors.size());
  for (const auto& [name, entry] : header.tensors) {
    const std::uint64_t bytes =
        static_cast<std::uint64_t>(entry.shape.NumElements()) * ByteSize(entry.dtype);
    spans.push_back({entry.offset, entry.offset + bytes, &name});
  }
  std::ranges::sort(spans, {}, [](const Span& s) { return std::pair(s.begin, s.end); });
  std::uint64_t expected = data_begin;
  for (const Span& span : spans) {
    if (span.begin != expected) {
      throw Error(ErrorCode::kDataLoss, path + ": tensor '" + *span.name + "' " +
                                            (span.begin < expected ? "overlaps another tensor"
                                                                   : "follows a gap in the data"));
    }
    expected = span.end;
  }
  if (expected != file_bytes) {
    throw Error(ErrorCode::kDataLoss, path + ": " + std::to_string(file_bytes - expected) +
                                          " bytes at the end belong to no tensor");
  }
}

}  // namespace

SafetensorsHeader ParseSafetensorsHeader(std::span<const std::byte> file, const std::string& path) {
  std::uint64_t header_bytes = 0;
  if (file.size() < sizeof(header_bytes)) {
    throw Error(ErrorCode::kDataLoss,
                path + ": " + std::to_string(file.size()) + " bytes are no safetensors file");
  }
  std::memcpy(&header_bytes, file.data(), sizeof(header_bytes));
  const std::uint64_t rest = file.size() - sizeof(header_bytes);
  if (header_bytes > kMaxHeaderBytes || header_bytes > rest) {
    throw Error(ErrorCode::kDataLoss, path + ": the header claims " + std::to_string(header_bytes) +
                                          " bytes, but the file has " + std::to_string(rest) +
                                          " after its length (and " +
                                          std::to_string(kMaxHeaderBytes) + " are the limit)");
  }
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + sizeof(header_bytes),
                              header_bytes);
  HeaderSax sax;
  if (!nlohmann::json::sax_parse(text.begin(), text.end(), &sax)) {
    throw Error(ErrorCode::kDataLoss, path + ": damaged header: " + sax.error());
  }

  SafetensorsHeader header;
  header.metadata = std::move(sax.metadata);
  const std::uint64_t data_begin = sizeof(header_bytes) + header_bytes;
  const EntryChecker checker(path, data_begin, file.size() - data_begin);
  for (const RawEntry& raw : sax.entries) {
    if (!header.tensors.emplace(raw.name, checker.Check(raw)).second) {
      throw Error(ErrorCode::kDataLoss, path + ": tensor '" + raw.name + "' appears twice");
    }
  }
  CheckCoverage(header, data_begin, file.size(), path);
  return header;
}

}  // namespace slalom
