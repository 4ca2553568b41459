#include "model/weights.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <numeric>
#include <optional>
#include <ostream>
#include <span>
#include <thread>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/random.h"
#include "model/safetensors_header.h"
#include "model/safetensors_writer.h"
#include "tests/unit/model/expect_error.h"
#include "tests/unit/model/temp_folder.h"

namespace slalom {
namespace {

// A file of a header, written as given, and so many bytes of data.
std::string RawFile(const std::string& header, std::size_t data_bytes,
                    std::optional<std::uint64_t> claimed = std::nullopt) {
  const std::uint64_t length = claimed.value_or(header.size());
  std::string file(sizeof(length), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  return file + header + std::string(data_bytes, '\x11');
}

Tensor Iota(const Shape& shape) {
  Tensor tensor = Tensor::Host(shape, DType::kF32);
  std::iota(tensor.data<float>(), tensor.data<float>() + tensor.NumElements(), 1.0f);
  return tensor;
}

std::string ReadFile(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

TEST(WeightsTest, ReadsBackWhatTheWriterWrote) {
  const TempFolder folder;
  Tensor bytes = Tensor::Host({3}, DType::kU8);
  std::memcpy(bytes.raw(), "abc", 3);
  Tensor half = Tensor::Host({1, 2}, DType::kBF16);
  half.data<BFloat16>()[0] = BFloat16(1.5f);
  half.data<BFloat16>()[1] = BFloat16(-2.0f);
  const std::string path = folder / "a.safetensors";
  WriteSafetensors(path,
                   {{"z", Iota({2, 3})},
                    {"bytes", bytes},
                    {"half", half},
                    {"scalar", Iota({})},
                    {"none", Tensor::Host({0, 4}, DType::kF32)}},
                   {{"format", "pt"}, {"note", "\"quoted\" \u00e9"}});

  const Weights weights = Weights::OpenFile(path);
  EXPECT_EQ(weights.Names(), (std::vector<std::string>{"bytes", "half", "none", "scalar", "z"}));
  EXPECT_EQ(weights.NumParameters(), 6 + 3 + 2 + 1);
  EXPECT_EQ(weights.metadata().at("note"), "\"quoted\" \u00e9");
  EXPECT_TRUE(weights.Has("z"));
  EXPECT_FALSE(weights.Has("y"));
  EXPECT_EQ(weights.Get("z").shape(), (Shape{2, 3}));
  EXPECT_EQ(weights.Get("z").data<float>()[5], 6.0f);
  EXPECT_EQ(weights.Get("scalar").shape().rank(), 0);
  EXPECT_EQ(weights.Get("none").NumElements(), 0);
  EXPECT_EQ(weights.Get("half").dtype(), DType::kBF16);
  EXPECT_EQ(static_cast<float>(weights.Get("half").data<BFloat16>()[1]), -2.0f);
  EXPECT_EQ(std::memcmp(weights.Get("bytes").raw(), "abc", 3), 0);
  EXPECT_FALSE(std::filesystem::exists(path + ".partial"));
}

TEST(WeightsTest, TensorsOutliveTheWeights) {
  const TempFolder folder;
  WriteSafetensors(folder / "a.safetensors", {{"x", Iota({5})}});
  Tensor kept;
  {
    const Weights weights = Weights::OpenFile(folder / "a.safetensors");
    kept = weights.Get("x");
  }
  EXPECT_EQ(kept.data<float>()[4], 5.0f);
}

TEST(WeightsTest, LoadConvertsAndChecksTheShape) {
  const TempFolder folder;
  const std::string path = folder / "a.safetensors";
  Tensor integers = Tensor::Host({2}, DType::kI64);
  integers.data<std::int64_t>()[0] = integers.data<std::int64_t>()[1] = 7;
  WriteSafetensors(path, {{"x", Iota({2, 2})}, {"ids", integers}});
  const Weights weights = Weights::OpenFile(path);
  const auto backend = MakeBackend(Device{}, {.cpu_threads = 1});

  const Tensor x = weights.Load(*backend, "x", {2, 2}, DType::kBF16);
  EXPECT_EQ(x.dtype(), DType::kBF16);
  EXPECT_EQ(static_cast<float>(x.data<BFloat16>()[3]), 4.0f);
  Tensor into = backend->Allocate({2, 2}, DType::kF32);
  weights.LoadInto(*backend, "x", into);
  EXPECT_EQ(into.data<float>()[2], 3.0f);

  ExpectError(ErrorCode::kInvalidArgument, {path, "'x'", "[2, 2]", "[4]"},
              [&] { weights.Load(*backend, "x", {4}, DType::kF32); });
  ExpectError(ErrorCode::kInvalidArgument, {path, "'ids'", "I64", "F32"},
              [&] { weights.Load(*backend, "ids", {2}, DType::kF32); });
  ExpectError(ErrorCode::kNotFound, {path, "'y'"},
              [&] { weights.Load(*backend, "y", {4}, DType::kF32); });
}

TEST(WeightsTest, ConcurrentReads) {
  const TempFolder folder;
  WriteSafetensors(folder / "a.safetensors", {{"x", Iota({64})}, {"y", Iota({32})}});
  const Weights weights = Weights::OpenFile(folder / "a.safetensors");
  std::vector<std::thread> threads;
  std::vector<float> sums(4);
  for (std::size_t t = 0; t < sums.size(); ++t) {
    threads.emplace_back([&, t] {
      const Tensor x = weights.Get(t % 2 == 0 ? "x" : "y");
      sums[t] = std::accumulate(x.data<float>(), x.data<float>() + x.NumElements(), 0.0f);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(sums, (std::vector<float>{2080, 528, 2080, 528}));
}

struct Damage {
  std::string name;
  std::string file;
  ErrorCode code;
  std::string word;  // in the message
};

void PrintTo(const Damage& damage, std::ostream* out) { *out << damage.name; }

// One tensor's header with the given fields.
std::string OneTensor(const std::string& fields) { return "{\"x\":{" + fields + "}}"; }

std::string Nested(const char* open, int depth) {
  std::string text;
  for (int i = 0; i < depth; ++i) text += open;
  return text;
}

std::vector<Damage> DamagedFiles() {
  const auto damaged = [](const char* name, std::string file, const char* word,
                          ErrorCode code = ErrorCode::kDataLoss) {
    return Damage{name, std::move(file), code, word};
  };
  const auto one = [](const std::string& fields) { return RawFile(OneTensor(fields), 16); };
  const std::string f32 = "\"dtype\":\"F32\",";
  std::string misaligned = OneTensor(f32 + "\"shape\":[4],\"data_offsets\":[0,16]");
  if (misaligned.size() % 4 == 0) misaligned += ' ';
  return {
      damaged("Empty", "", "0 bytes"),
      damaged("TooShort", "1234567", "7 bytes"),
      damaged("HeaderBeyondTheFile", RawFile("{}", 0, 3), "claims 3 bytes"),
      damaged("HeaderLengthOverflows", RawFile("{}", 0, ~0ull), "claims 18446744073709551615"),
      damaged("HeaderAboveTheLimit", RawFile("{}", 0, 100'000'001), "limit"),
      damaged("NotJson", RawFile("{\"x\":", 0), "not valid JSON"),
      damaged("NotUtf8", RawFile("{\"\xff\xfe\":{}}", 0), "not valid JSON"),
      damaged("TrailingGarbage", RawFile("{} x", 0), "not valid JSON"),
      damaged("TopLevelList", RawFile("[]", 0), "holds a list"),
      damaged("TopLevelNumber", RawFile("12", 0), "holds a number"),
      damaged("DeepLists", RawFile(Nested("[", 200'000), 0), "holds a list"),
      damaged("DeepObjects", RawFile(Nested("{\"a\":", 200'000), 0), "holds an object"),
      damaged("DeepShape", RawFile("{\"x\":{\"shape\":" + Nested("[", 100'000), 0), "a list"),
      damaged("TensorIsNull", RawFile("{\"x\":null}", 0), "holds null"),
      damaged("TensorIsAList", RawFile("{\"x\":[1]}", 0), "holds a list"),
      damaged("UnknownField", one(f32 + "\"shape\":[4],\"data_offsets\":[0,16],\"y\":\"z\""), "y"),
      damaged("NoDtype", one("\"shape\":[4],\"data_offsets\":[0,16]"), "no dtype"),
      damaged("NoShape", one(f32 + "\"data_offsets\":[0,16]"), "no shape"),
      damaged("NoOffsets", one(f32 + "\"shape\":[4]"), "data_offsets"),
      damaged("OneOffset", one(f32 + "\"shape\":[4],\"data_offsets\":[0]"), "two data_offsets"),
      damaged("ThreeOffsets", one(f32 + "\"shape\":[4],\"data_offsets\":[0,8,16]"), "two"),
      damaged("UnknownDtype", one("\"dtype\":\"F7\",\"shape\":[4],\"data_offsets\":[0,16]"), "F7",
              ErrorCode::kInvalidArgument),
      damaged("UnsupportedDtype", one("\"dtype\":\"I8\",\"shape\":[16],\"data_offsets\":[0,16]"),
              "I8", ErrorCode::kInvalidArgument),
      damaged("SevenDimensions", one(f32 + "\"shape\":[1,1,1,1,1,1,4],\"data_offsets\":[0,16]"),
              "more than 6", ErrorCode::kInvalidArgument),
      damaged("ThousandDimensions", one(f32 + "\"shape\":[1,1,1,1,1,1,1,1,1,1,1]"), "too many"),
      damaged("NegativeDimension", one(f32 + "\"shape\":[-4],\"data_offsets\":[0,16]"), "negative"),
      damaged("FractionalDimension", one(f32 + "\"shape\":[4.0],\"data_offsets\":[0,16]"),
              "integer"),
      damaged("DimensionAboveInt64",
              one(f32 + "\"shape\":[9223372036854775808],\"data_offsets\":[0,16]"), "overflows"),
      damaged("DimensionAboveUint64",
              one(f32 + "\"shape\":[99999999999999999999],\"data_offsets\":[0,16]"), "integer"),
      damaged("ProductWrapsToTheRightSize",
              one(f32 + "\"shape\":[4294967296,4294967296,4],\"data_offsets\":[0,0]"), "overflows"),
      damaged("OverflowBehindAZero",
              one(f32 + "\"shape\":[0,4294967296,4294967296,4294967296],\"data_offsets\":[0,0]"),
              "overflows"),
      damaged("OffsetsBeyondTheFile", one(f32 + "\"shape\":[5],\"data_offsets\":[0,20]"),
              "outside the 16 bytes"),
      damaged("HugeOffsets",
              one(f32 + "\"shape\":[4],"
                        "\"data_offsets\":[18446744073709551600,18446744073709551615]"),
              "outside"),
      damaged("OffsetsReversed", one(f32 + "\"shape\":[4],\"data_offsets\":[16,0]"), "outside"),
      damaged("NegativeOffset", one(f32 + "\"shape\":[4],\"data_offsets\":[-16,0]"), "negative"),
      damaged("ShapeAndOffsetsDiffer", one(f32 + "\"shape\":[3],\"data_offsets\":[0,16]"),
              "needs 12"),
      damaged("Misaligned", RawFile(misaligned, 16), "aligned"),
      damaged("Overlap",
              RawFile("{\"x\":{\"dtype\":\"U8\",\"shape\":[10],\"data_offsets\":[0,10]},"
                      "\"y\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[8,16]}}",
                      16),
              "overlaps"),
      damaged("SameBytesTwice",
              RawFile("{\"x\":{\"dtype\":\"U8\",\"shape\":[16],\"data_offsets\":[0,16]},"
                      "\"y\":{\"dtype\":\"U8\",\"shape\":[16],\"data_offsets\":[0,16]}}",
                      16),
              "overlaps"),
      damaged("Hole",
              RawFile("{\"x\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
                      "\"y\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[12,16]}}",
                      16),
              "gap"),
      damaged("BytesLeftOver",
              RawFile("{\"x\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 16),
              "12 bytes at the end"),
      damaged("NameTwice",
              RawFile("{\"x\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]},"
                      "\"x\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[8,16]}}",
                      16),
              "appears twice"),
      damaged("FieldTwice", one(f32 + f32 + "\"shape\":[4],\"data_offsets\":[0,16]"),
              "appears twice"),
      damaged("MetadataKeyTwice", RawFile("{\"__metadata__\":{\"a\":\"b\",\"a\":\"c\"}}", 0),
              "appears twice"),
      damaged("MetadataIsANumber", RawFile("{\"__metadata__\":{\"a\":1}}", 0), "holds a number"),
      damaged("MetadataHoldsAnObject", RawFile("{\"__metadata__\":{\"a\":{}}}", 0), "an object"),
      damaged("MetadataIsAString", RawFile("{\"__metadata__\":\"a\"}", 0), "holds a string"),
  };
}

class DamagedFileTest : public testing::TestWithParam<Damage> {};

TEST_P(DamagedFileTest, IsRefusedWithAClearError) {
  const TempFolder folder;
  const std::string path = folder.Write("a.safetensors", GetParam().file);
  ExpectError(GetParam().code, {path, GetParam().word}, [&] { Weights::OpenFile(path); });
}

INSTANTIATE_TEST_SUITE_P(Weights, DamagedFileTest, testing::ValuesIn(DamagedFiles()),
                         [](const auto& info) { return info.param.name; });

// Reads every byte that a header promises, so that a wrong bound shows as a fault.
void TouchEverything(std::span<const std::byte> file) {
  unsigned sum = 0;
  for (const auto& [name, entry] : ParseSafetensorsHeader(file, "bad.safetensors").tensors) {
    const std::size_t bytes =
        static_cast<std::size_t>(entry.shape.NumElements()) * ByteSize(entry.dtype);
    ASSERT_LE(entry.offset + bytes, file.size()) << name;
    for (std::byte b : file.subspan(entry.offset, bytes)) sum += std::to_integer<unsigned>(b);
  }
  volatile unsigned keep = sum;
  static_cast<void>(keep);
}

// Damages a good file at random; no outcome may be a crash or another kind of exception.
TEST(WeightsTest, SurvivesFlippedBytesAndTruncation) {
  const TempFolder folder;
  WriteSafetensors(folder / "good.safetensors",
                   {{"blocks.0.w", Iota({3, 4})}, {"blocks.1.w", Iota({7})}, {"b", Iota({1})}},
                   {{"slalom.attention", "{\"kind\":\"sla\"}"}});
  const std::string good = ReadFile(folder / "good.safetensors");
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, good.data(), sizeof(header_bytes));
  const std::size_t interesting = sizeof(header_bytes) + header_bytes;  // data bytes are all valid

  constexpr int kRounds = 20'000;
  int refused = 0;
  for (int round = 0; round < kRounds; ++round) {
    const auto random = Philox4x32(2026, 0, static_cast<std::uint64_t>(round));
    const std::size_t size = round % 4 == 0 ? random[3] % good.size() : good.size();
    // Exactly as long as the file, so that a sanitizer sees a read beyond it.
    std::vector<char> bytes(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size));
    const int flips = 1 + static_cast<int>(random[0] % 3);
    for (int i = 0; i < flips; ++i) {
      const std::size_t at = random[static_cast<std::size_t>(i) + 1] % interesting;
      if (at < size) bytes[at] ^= static_cast<char>(1 + (random[0] >> (8 * i)) % 255);
    }
    try {
      TouchEverything(std::as_bytes(std::span(bytes)));
    } catch (const Error& error) {
      ++refused;
      EXPECT_TRUE(error.code() == ErrorCode::kDataLoss ||
                  error.code() == ErrorCode::kInvalidArgument)
          << error.what();
    }
  }
  EXPECT_GT(refused, kRounds / 2);
}

TEST(WeightsTest, MissingFiles) {
  const TempFolder folder;
  ExpectError(ErrorCode::kNotFound, {"gone.safetensors"},
              [&] { Weights::OpenFile(folder / "gone.safetensors"); });
  ExpectError(ErrorCode::kNotFound, {folder.path(), "model.safetensors"},
              [&] { Weights::Open(folder.path(), "model"); });
  ExpectError(ErrorCode::kInvalidArgument, {"not a regular file"},
              [&] { Weights::OpenFile(folder.path()); });
}

class ShardedWeightsTest : public testing::Test {
 protected:
  ShardedWeightsTest() {
    WriteSafetensors(folder_ / "model-00001-of-00002.safetensors", {{"a", Iota({2})}},
                     {{"format", "pt"}});
    WriteSafetensors(folder_ / "model-00002-of-00002.safetensors",
                     {{"b", Iota({3})}, {"c", Iota({4})}});
  }

  void WriteIndex(const std::string& text) {
    index_ = folder_.Write("model.safetensors.index.json", text);
  }
  Weights Open() const { return Weights::Open(folder_.path(), "model"); }

  TempFolder folder_;
  std::string index_;
};

constexpr char kGoodIndex[] = R"({"metadata": {"total_size": 36}, "weight_map": {
  "a": "model-00001-of-00002.safetensors",
  "b": "model-00002-of-00002.safetensors",
  "c": "model-00002-of-00002.safetensors"}})";

TEST_F(ShardedWeightsTest, JoinsTheShards) {
  WriteIndex(kGoodIndex);
  const Weights weights = Open();
  EXPECT_EQ(weights.Names(), (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(weights.NumParameters(), 9);
  EXPECT_EQ(weights.Get("c").data<float>()[3], 4.0f);
  EXPECT_EQ(weights.metadata().at("format"), "pt");
  EXPECT_EQ(weights.path(), index_);
}

TEST_F(ShardedWeightsTest, ASingleFileComesFirst) {
  WriteIndex(kGoodIndex);
  WriteSafetensors(folder_ / "model.safetensors", {{"only", Iota({1})}});
  EXPECT_EQ(Open().Names(), std::vector<std::string>{"only"});
}

TEST_F(ShardedWeightsTest, MissingShardOrTensor) {
  WriteIndex(R"({"weight_map": {"a": "model-00003-of-00002.safetensors"}})");
  ExpectError(ErrorCode::kNotFound, {"model-00003-of-00002"}, [&] { Open(); });
  WriteIndex(R"({"weight_map": {"a": "model-00002-of-00002.safetensors"}})");
  ExpectError(ErrorCode::kDataLoss, {"model-00002-of-00002", "'a'"}, [&] { Open(); });
}

TEST_F(ShardedWeightsTest, DamagedIndex) {
  for (const char* text : {"", "[]", "{", "{}", R"({"weight_map": []})", R"({"weight_map": {}})",
                           R"({"weight_map": {"a": 1}})", R"({"weight_map": {"a": null}})",
                           R"({"weight_map": {"a": "x"}, "weight_map": {"a": "y"}})"}) {
    SCOPED_TRACE(text);
    WriteIndex(text);
    ExpectError(ErrorCode::kDataLoss, {index_}, [&] { Open(); });
  }
  WriteIndex(Nested("{\"a\":", 50'000));
  ExpectError(ErrorCode::kDataLoss, {index_, "nested"}, [&] { Open(); });
}

TEST_F(ShardedWeightsTest, IndexMayNotLeaveItsFolder) {
  std::filesystem::create_directory(folder_ / "sub");
  for (const std::string& name :
       {std::string("../x.safetensors"), std::string("/etc/passwd"), std::string("sub/x"),
        std::string(".."), std::string("."), std::string(""), std::string("a\\\\b"),
        std::string("a\\u0000b")}) {
    SCOPED_TRACE(name);
    WriteIndex("{\"weight_map\": {\"a\": \"" + name + "\"}}");
    ExpectError(ErrorCode::kInvalidArgument, {index_, "plain name"}, [&] { Open(); });
  }
}

TEST(SafetensorsWriterTest, RefusesWhatItCannotWrite) {
  const TempFolder folder;
  const std::string path = folder / "a.safetensors";
  ExpectError(ErrorCode::kInvalidArgument, {"'x'"}, [&] { WriteSafetensors(path, {{"x", {}}}); });
  for (const char* name : {"", "__metadata__"}) {
    ExpectError(ErrorCode::kInvalidArgument, {name}, [&] {
      WriteSafetensors(path, {{name, Iota({1})}});
    });
  }
  ExpectError(ErrorCode::kInvalidArgument, {"UTF-8"}, [&] {
    WriteSafetensors(path, {{"\xff", Iota({1})}});
  });
  ExpectError(ErrorCode::kUnavailable, {"no/such/folder"}, [&] {
    WriteSafetensors(folder / "no/such/folder/a.safetensors", {{"x", Iota({1})}});
  });
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

}  // namespace
}  // namespace slalom
