#include "model/checkpoint.h"

#include <bit>
#include <cstdint>
#include <cstring>
#include <sstream>

#include "kernels/core/error.h"

namespace slalom {
namespace {

constexpr std::uint64_t kMagic = 0x31304b50434c53;  // "SLCPK01"

// Words at a time: a large clip's checkpoint is a hundred MB, and the device waits for it.
std::uint64_t Checksum(std::span<const std::byte> bytes) {
  std::uint64_t sum = 0x9e3779b97f4a7c15ull ^ bytes.size();
  for (std::size_t i = 0; i < bytes.size(); i += sizeof(std::uint64_t)) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, std::min(sizeof(word), bytes.size() - i));
    sum = (std::rotl(sum, 23) ^ word) * 0xff51afd7ed558ccdull;
  }
  return sum ^ (sum >> 32);
}

// Everything that decides what the clip becomes.
std::string Fingerprint(const std::string& model, const ClipSpec& spec) {
  std::ostringstream text;
  text << std::hexfloat << model << '\n'
       << spec.width << ' ' << spec.height << ' ' << spec.num_frames << ' ' << spec.steps << ' '
       << spec.guidance_scale << ' ' << spec.flow_shift << ' ' << spec.seed << ' '
       << static_cast<int>(spec.sampler) << ' ' << static_cast<int>(spec.attention) << ' '
       << spec.topk << '\n'
       << spec.prompt << '\n'
       << spec.negative_prompt;
  return text.str();
}

class Writer {
 public:
  template <typename T>
  void Put(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    PutBytes(std::as_bytes(std::span(&value, 1)));
  }
  template <typename T>
  void PutArray(std::span<const T> values) {
    Put<std::uint64_t>(values.size());
    PutBytes(std::as_bytes(values));
  }
  // An undefined tensor is an empty array.
  void PutTensor(Backend& backend, const Tensor& tensor) {
    if (!tensor.defined()) return Put<std::uint64_t>(0);
    Put<std::uint64_t>(static_cast<std::uint64_t>(tensor.NumElements()));
    const std::size_t at = bytes.size();
    Tensor host = Tensor::Host(tensor.shape(), DType::kF32);
    backend.Copy(tensor, host);
    backend.Synchronize();
    bytes.resize(at + host.NumBytes());
    std::memcpy(bytes.data() + at, host.raw(), host.NumBytes());
  }

  std::vector<std::byte> bytes;

 private:
  void PutBytes(std::span<const std::byte> more) {
    bytes.insert(bytes.end(), more.begin(), more.end());
  }
};

class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : rest_(bytes) {}

  template <typename T>
  T Get() {
    T value;
    std::memcpy(&value, Take(sizeof(T)).data(), sizeof(T));
    return value;
  }
  template <typename T>
  std::vector<T> GetArray() {
    const auto size = Get<std::uint64_t>();
    if (size > rest_.size() / sizeof(T)) Fail();
    std::vector<T> values(size);
    const auto bytes = Take(size * sizeof(T));
    if (size > 0) std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
  Tensor GetTensor(Backend& backend, const Shape& shape) {
    const std::vector<float> values = GetArray<float>();
    if (values.empty()) return {};
    if (static_cast<std::int64_t>(values.size()) != shape.NumElements()) Fail();
    Tensor tensor = backend.Allocate(shape, DType::kF32);
    backend.Copy(Tensor::FromFloats(shape, values), tensor);
    backend.Synchronize();
    return tensor;
  }

  [[noreturn]] static void Fail() {
    throw Error(ErrorCode::kDataLoss, "checkpoint: the bytes are damaged or of another clip");
  }

 private:
  std::span<const std::byte> Take(std::size_t size) {
    if (size > rest_.size()) Fail();
    const auto taken = rest_.first(size);
    rest_ = rest_.subspan(size);
    return taken;
  }

  std::span<const std::byte> rest_;
};

void PutStatistics(const WanGeneration& clip, Writer& out) {
  const ClipStatistics& stats = clip.stats;
  for (const double seconds : {stats.tokenize_seconds, stats.text_encode_seconds,
                               stats.denoise_seconds, stats.last_step_seconds}) {
    out.Put(seconds);
  }
  out.PutArray<double>(stats.layer_sparsity);
  out.PutArray<double>(stats.layer_mass_kept);
  out.PutArray<WanGeneration::Pairs>(clip.layer_pairs);
}

void GetStatistics(Reader& in, WanGeneration& clip) {
  ClipStatistics& stats = clip.stats;
  stats.tokenize_seconds = in.Get<double>();
  stats.text_encode_seconds = in.Get<double>();
  stats.denoise_seconds = in.Get<double>();
  stats.last_step_seconds = in.Get<double>();
  stats.layer_sparsity = in.GetArray<double>();
  stats.layer_mass_kept = in.GetArray<double>();
  clip.layer_pairs = in.GetArray<WanGeneration::Pairs>();
}

}  // namespace

std::vector<std::byte> SaveClip(Backend& backend, const std::string& model,
                                const WanGeneration& clip) {
  const Sampler::History history = clip.sampler.history();
  Writer out;
  // The history is at most three more latents.
  out.bytes.reserve(4 * clip.latent.NumBytes() + 4096);
  out.Put(kMagic);
  out.PutArray<char>(Fingerprint(model, clip.clip));
  out.Put<std::int32_t>(history.step);
  out.PutTensor(backend, clip.latent);
  out.PutTensor(backend, history.estimate);
  out.PutTensor(backend, history.previous_estimate);
  out.PutTensor(backend, history.sample);
  PutStatistics(clip, out);
  out.Put(Checksum(out.bytes));
  return std::move(out.bytes);
}

void RestoreClip(Backend& backend, const std::string& model, std::span<const std::byte> bytes,
                 WanGeneration& clip) {
  if (bytes.size() < sizeof(std::uint64_t)) Reader::Fail();
  const auto body = bytes.first(bytes.size() - sizeof(std::uint64_t));
  if (Reader(bytes.subspan(body.size())).Get<std::uint64_t>() != Checksum(body)) Reader::Fail();
  Reader in(body);
  if (in.Get<std::uint64_t>() != kMagic) Reader::Fail();
  const std::vector<char> fingerprint = in.GetArray<char>();
  if (std::string(fingerprint.begin(), fingerprint.end()) != Fingerprint(model, clip.clip)) {
    Reader::Fail();
  }
  const Shape shape = clip.shape.latent();
  Sampler::History history;
  history.step = in.Get<std::int32_t>();
  clip.latent = in.GetTensor(backend, shape);
  history.estimate = in.GetTensor(backend, shape);
  history.previous_estimate = in.GetTensor(backend, shape);
  history.sample = in.GetTensor(backend, shape);
  if (!clip.latent.defined() || history.step < 0 || history.step > clip.clip.steps) Reader::Fail();
  clip.sampler.GoOn(std::move(history));
  GetStatistics(in, clip);
}

}  // namespace slalom
