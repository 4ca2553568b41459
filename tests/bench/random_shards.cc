#include "tests/bench/random_shards.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <numbers>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels/core/error.h"

namespace slalom {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kPieceBytes = std::int64_t{4} << 20;
constexpr std::int64_t kHeaderAlignment = 8;

// N(0, 1) as a table of equally likely values, small enough for the first-level cache: a lookup
// costs less than the arithmetic of any exact method, and a sum of products sees no difference.
constexpr std::size_t kLevels = 4096;
using Levels = std::array<float, kLevels>;

Levels NormalLevels() {
  // The inverse of the cumulative distribution, by Newton's method, from the middle outwards.
  std::array<double, kLevels> z{};
  double at = 0;
  double square_sum = 0;
  for (std::size_t i = kLevels / 2; i < kLevels; ++i) {
    const double target = (static_cast<double>(i) + 0.5) / kLevels;
    for (int round = 0; round < 20; ++round) {
      const double below = 0.5 * std::erfc(-at / std::numbers::sqrt2);
      const double density =
          std::exp(-0.5 * at * at) * std::numbers::inv_sqrtpi / std::numbers::sqrt2;
      at -= (below - target) / density;
    }
    z[i] = at;
    z[kLevels - 1 - i] = -at;
    square_sum += 2 * at * at;
  }
  const double scale = 1.0 / std::sqrt(square_sum / kLevels);  // the cut tails' share
  Levels levels;
  std::ranges::transform(z, levels.begin(),
                         [&](double v) { return static_cast<float>(v * scale); });
  return levels;
}

// SplitMix64's finaliser: the counter is the state.
std::uint64_t Mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

std::uint64_t KeyOf(std::uint64_t seed, const std::string& name) {
  std::uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return Mix(hash ^ Mix(seed));
}

// Elements [begin, begin + n) of a tensor; begin is a multiple of 4, because a draw makes four.
template <typename T>
void Fill(const TensorSpec& spec, std::uint64_t key, const Levels& normal, std::int64_t begin,
          std::int64_t n, T* out) {
  std::array<T, kLevels> table;
  for (std::size_t i = 0; i < kLevels; ++i) {
    table[i] = T(static_cast<float>(spec.mean + spec.deviation * normal[i]));
  }
  constexpr std::uint64_t kStep = 0x9e3779b97f4a7c15u;
  std::uint64_t counter = key + kStep * static_cast<std::uint64_t>(begin / 4);
  std::int64_t i = 0;
  for (; i + 4 <= n; i += 4, counter += kStep) {
    const std::uint64_t draw = Mix(counter);
    for (int j = 0; j < 4; ++j) out[i + j] = table[(draw >> (16 * j)) % kLevels];
  }
  const std::uint64_t draw = Mix(counter);
  for (int j = 0; i < n; ++i, ++j) out[i] = table[(draw >> (16 * j)) % kLevels];
}

[[noreturn]] void ThrowErrno(const std::string& path, const char* what) {
  throw Error(ErrorCode::kUnavailable,
              path + ": cannot " + what + ": " + std::generic_category().message(errno));
}

class OutputFile {
 public:
  explicit OutputFile(const std::string& path)
      : path_(path), fd_(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644)) {
    if (fd_ < 0) ThrowErrno(path_, "create");
  }
  ~OutputFile() { close(fd_); }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  // Thread-safe.
  void WriteAt(std::int64_t offset, const void* data, std::int64_t bytes) const {
    const auto* from = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t written = pwrite(fd_, from, static_cast<std::size_t>(bytes), offset);
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) ThrowErrno(path_, "write");
      from += written;
      offset += written;
      bytes -= written;
    }
  }

 private:
  std::string path_;
  int fd_;
};

// body(i) for i in [0, n) on several threads; the first exception is thrown when all have stopped.
template <typename Body>
void ForEach(std::size_t n, int threads, const Body& body) {
  std::atomic<std::size_t> next = 0;
  std::exception_ptr failure;
  std::mutex mutex;
  const auto work = [&] {
    try {
      for (std::size_t i = next++; i < n; i = next++) body(i);
    } catch (...) {
      next = n;
      const std::lock_guard lock(mutex);
      if (failure == nullptr) failure = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> pool;
    for (int i = 1; i < threads; ++i) pool.emplace_back(work);
    work();
  }
  if (failure != nullptr) std::rethrow_exception(failure);
}

std::int64_t BytesOf(const TensorSpec& spec, DType dtype) {
  return spec.shape.NumElements() * static_cast<std::int64_t>(ByteSize(dtype));
}

// Tensors in their order, as many in each shard as fit.
std::vector<NetworkLayout> CutIntoShards(const NetworkLayout& layout, DType dtype,
                                         std::int64_t most) {
  std::vector<NetworkLayout> shards;
  std::int64_t bytes = 0;
  for (const TensorSpec& spec : layout) {
    const std::int64_t more = BytesOf(spec, dtype);
    if (shards.empty() || bytes + more > most) {
      shards.emplace_back();
      bytes = 0;
    }
    shards.back().push_back(spec);
    bytes += more;
  }
  return shards;
}

std::string Header(const NetworkLayout& shard, DType dtype) {
  nlohmann::json header = {{"__metadata__", {{"format", "pt"}}}};
  std::int64_t offset = 0;
  for (const TensorSpec& spec : shard) {
    const auto dims = spec.shape.dims();
    const std::int64_t end = offset + BytesOf(spec, dtype);
    header[spec.name] = {{"dtype", DTypeName(dtype)},
                         {"shape", std::vector<std::int64_t>(dims.begin(), dims.end())},
                         {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + kHeaderAlignment - 1) / kHeaderAlignment * kHeaderAlignment, ' ');
  const std::uint64_t size = text.size();
  return std::string(reinterpret_cast<const char*>(&size), sizeof(size)) + text;
}

void WriteShard(const std::string& path, const NetworkLayout& shard,
                const RandomShardsOptions& options, const Levels& normal, int threads) {
  struct Piece {
    const TensorSpec* spec;
    std::int64_t begin;
    std::int64_t count;
    std::int64_t offset;
  };
  const auto element = static_cast<std::int64_t>(ByteSize(options.dtype));
  const OutputFile file(path);
  const std::string header = Header(shard, options.dtype);
  file.WriteAt(0, header.data(), static_cast<std::int64_t>(header.size()));
  std::vector<Piece> pieces;
  auto offset = static_cast<std::int64_t>(header.size());
  for (const TensorSpec& spec : shard) {
    const std::int64_t n = spec.shape.NumElements();
    for (std::int64_t begin = 0; begin < n; begin += kPieceBytes / element) {
      const std::int64_t count = std::min(kPieceBytes / element, n - begin);
      pieces.push_back({&spec, begin, count, offset});
      offset += count * element;
    }
  }
  ForEach(pieces.size(), threads, [&](std::size_t i) {
    const Piece& piece = pieces[i];
    const std::uint64_t key = KeyOf(options.seed, piece.spec->name);
    std::vector<std::byte> bytes(static_cast<std::size_t>(piece.count * element));
    if (options.dtype == DType::kBF16) {
      Fill(*piece.spec, key, normal, piece.begin, piece.count,
           reinterpret_cast<BFloat16*>(bytes.data()));
    } else {
      Fill(*piece.spec, key, normal, piece.begin, piece.count,
           reinterpret_cast<float*>(bytes.data()));
    }
    file.WriteAt(piece.offset, bytes.data(), piece.count * element);
  });
}

std::string ShardName(const std::string& stem, std::size_t index, std::size_t count) {
  std::array<char, 32> numbers{};
  std::snprintf(numbers.data(), numbers.size(), "-%05zu-of-%05zu", index + 1, count);
  return stem + numbers.data() + ".safetensors";
}

}  // namespace

void WriteRandomShards(const std::string& folder, const std::string& stem,
                       const NetworkLayout& layout, const RandomShardsOptions& options) {
  if (options.dtype != DType::kF32 && options.dtype != DType::kBF16) {
    throw Error(ErrorCode::kInvalidArgument, "random weights are f32 or bf16");
  }
  static const Levels normal = NormalLevels();
  const int threads = options.threads > 0
                          ? options.threads
                          : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  fs::create_directories(folder);
  const std::vector<NetworkLayout> shards =
      CutIntoShards(layout, options.dtype, options.shard_bytes);
  if (shards.size() == 1) {
    WriteShard((fs::path(folder) / (stem + ".safetensors")).string(), shards.front(), options,
               normal, threads);
    return;
  }
  nlohmann::json weight_map = nlohmann::json::object();
  std::int64_t total = 0;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::string name = ShardName(stem, i, shards.size());
    WriteShard((fs::path(folder) / name).string(), shards[i], options, normal, threads);
    for (const TensorSpec& spec : shards[i]) {
      weight_map[spec.name] = name;
      total += BytesOf(spec, options.dtype);
    }
  }
  const std::string index = (fs::path(folder) / (stem + ".safetensors.index.json")).string();
  std::ofstream stream(index);
  stream << nlohmann::json{{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}}.dump(
                2)
         << "\n";
  if (!stream.flush()) ThrowErrno(index, "write");
}

}  // namespace slalom
