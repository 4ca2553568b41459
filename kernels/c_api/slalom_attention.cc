// The C ABI: pointers become tensors that own nothing, errors become codes.
#include "kernels/c_api/slalom_attention.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>

#include "kernels/backend.h"
#include "kernels/core/error.h"
#include "kernels/foreign_stream.h"

struct slalom_context {
  std::mutex mutex;  // calls take turns: a backend serves one thread at a time
  std::unique_ptr<slalom::Backend> backend;
  std::string error;
};

namespace slalom {
namespace {

[[noreturn]] void Invalid(const std::string& message) {
  throw Error(ErrorCode::kInvalidArgument, message);
}

// The caller's struct, with zeros where it is older than ours.
template <typename Args>
Args Known(const Args* args) {
  if (args == nullptr) Invalid("args is NULL");
  if (args->size < sizeof(std::size_t) + sizeof(void*)) Invalid("args->size is not set");
  Args own{};
  std::memcpy(&own, args, std::min(args->size, sizeof(Args)));
  return own;
}

DType TypeOf(std::int32_t dtype) {
  if (dtype == SLALOM_F32) return DType::kF32;
  if (dtype == SLALOM_BF16) return DType::kBF16;
  Invalid("dtype is neither SLALOM_F32 nor SLALOM_BF16");
}

template <typename Enum>
Enum Choice(std::int32_t value, std::int32_t count, const char* name) {
  if (value < 0 || value >= count) Invalid(std::string(name) + " has no such value");
  return static_cast<Enum>(value);
}

// What all argument structs have in common, and tensors over their pointers.
class Problem {
 public:
  template <typename Args>
  Problem(Backend& backend, const Args& args)
      : backend_(backend),
        batch_(args.batch),
        length_(args.length),
        heads_(args.heads),
        size_(args.head_size),
        block_q_(args.block_q),
        block_k_(args.block_k),
        type_(TypeOf(args.dtype)) {
    if (batch_ < 1 || length_ < 1 || heads_ < 1 || size_ < 1) {
      Invalid("batch, length, heads and head_size must be positive");
    }
    if (size_ % 8 != 0 || size_ > 384) Invalid("head_size must be a multiple of 8 up to 384");
    if (block_q_ < 1 || block_k_ < 1) Invalid("block_q and block_k must be positive");
  }

  DType type() const { return type_; }
  Shape by_head() const { return {batch_, length_, heads_, size_}; }
  Shape rows() const { return {batch_, length_, heads_ * size_}; }
  Shape per_row() const { return {batch_, heads_, length_}; }
  Shape map() const {
    return {batch_, heads_, (length_ + block_q_ - 1) / block_q_,
            (length_ + block_k_ - 1) / block_k_};
  }
  std::int64_t batch() const { return batch_; }
  std::int64_t length() const { return length_; }
  std::int64_t head_size() const { return size_; }
  std::int64_t width() const { return heads_ * size_; }
  int block_q() const { return block_q_; }
  int block_k() const { return block_k_; }

  // Throws when the pointer is null.
  Tensor Wrap(const void* pointer, const Shape& shape, DType type, const char* name) const {
    if (pointer == nullptr) Invalid(std::string(name) + " is NULL");
    if (reinterpret_cast<std::uintptr_t>(pointer) % 16 != 0 && shape.NumElements() > 1) {
      Invalid(std::string(name) + " is not aligned to 16 bytes");
    }
    auto* bytes = static_cast<std::byte*>(const_cast<void*>(pointer));
    return {std::shared_ptr<std::byte>(std::shared_ptr<void>(), bytes), shape, type,
            backend_.device()};
  }
  Tensor WrapIf(const void* pointer, const Shape& shape, DType type, const char* name) const {
    return pointer == nullptr ? Tensor() : Wrap(pointer, shape, type, name);
  }
  BlockMap Map(const std::uint8_t* classes) const {
    return backend_.BlockMapFromClasses(Wrap(classes, map(), DType::kU8, "map"), block_q_,
                                        block_k_);
  }

 private:
  Backend& backend_;
  std::int64_t batch_, length_, heads_, size_;
  int block_q_, block_k_;
  DType type_;
};

TokenGrid GridOf(std::int64_t frames, std::int64_t height, std::int64_t width, bool window,
                 std::int64_t length) {
  if (!window) return {};
  const TokenGrid grid{frames, height, width};
  if (frames < 1 || height < 1 || width < 1 || grid.size() != length) {
    Invalid("grid_frames * grid_height * grid_width is not length");
  }
  return grid;
}

void MakeMap(Backend& backend, const slalom_map_args& a) {
  const Problem p(backend, a);
  const auto kind = Choice<BlockMapKind>(a.kind, 2, "kind");
  if (!(a.topk > 0 && a.topk <= 1)) Invalid("topk is not in (0, 1]");
  if (!(a.negligible >= 0 && a.negligible < 1)) Invalid("negligible is not in [0, 1)");
  BlockMapArgs args;
  args.q = p.Wrap(a.q, p.by_head(), p.type(), "q");
  args.k = p.Wrap(a.k, p.by_head(), p.type(), "k");
  args.grid =
      GridOf(a.grid_frames, a.grid_height, a.grid_width, kind == BlockMapKind::kWindow, p.length());
  args.options = {kind, a.topk, a.negligible, p.block_q(), p.block_k()};
  const Tensor out = p.Wrap(a.map, p.map(), DType::kU8, "map");
  const BlockMap map = backend.MakeBlockMap(args);
  backend.Copy(map.classes, out);
}

// What every attention reads first. Args is the backend's struct of either direction.
template <typename Args, typename Given>
void WrapInputs(const Problem& p, const Given& a, Args& args) {
  args.q = p.Wrap(a.q, p.by_head(), p.type(), "q");
  args.k = p.Wrap(a.k, p.by_head(), p.type(), "k");
  args.v = p.Wrap(a.v, p.by_head(), p.type(), "v");
}

// What every gradient reads and writes; `out` is the shape of the attention's output.
template <typename Args, typename Given>
void WrapGradients(const Problem& p, const Given& a, const Shape& out, Args& args) {
  args.lse = p.Wrap(a.lse, p.per_row(), DType::kF32, "lse");
  args.d_out = p.Wrap(a.d_out, out, p.type(), "d_out");
  args.d_q = p.Wrap(a.d_q, p.by_head(), p.type(), "d_q");
  args.d_k = p.Wrap(a.d_k, p.by_head(), p.type(), "d_k");
  args.d_v = p.Wrap(a.d_v, p.by_head(), p.type(), "d_v");
}

template <typename Args>
Args WrapSla(const Problem& p, const slalom_sla_args& a) {
  Args args;
  WrapInputs(p, a, args);
  args.scope = Choice<LinearScope>(a.scope, 3, "scope");
  args.feature_map = Choice<FeatureMap>(a.feature_map, 3, "feature_map");
  args.out = p.Wrap(a.out, p.by_head(), p.type(), "out");
  if (a.proj_weight != nullptr) {
    const std::int64_t d = p.head_size();
    args.proj_weight = p.Wrap(a.proj_weight, {d, d}, DType::kF32, "proj_weight");
    args.proj_bias = p.Wrap(a.proj_bias, {d}, DType::kF32, "proj_bias");
  }
  return args;
}

void SlaForward(Backend& backend, const slalom_sla_args& a) {
  const Problem p(backend, a);
  auto args = WrapSla<SlaArgs>(p, a);
  args.lse = p.WrapIf(a.lse, p.per_row(), DType::kF32, "lse");
  const BlockMap map = p.Map(a.map);
  args.map = &map;
  backend.SlaAttention(args);
}

void SlaBackward(Backend& backend, const slalom_sla_args& a) {
  const Problem p(backend, a);
  auto args = WrapSla<SlaBackwardArgs>(p, a);
  WrapGradients(p, a, p.by_head(), args);
  if (args.proj_weight.defined()) {
    args.d_proj_weight =
        p.Wrap(a.d_proj_weight, args.proj_weight.shape(), DType::kF32, "d_proj_weight");
    args.d_proj_bias = p.Wrap(a.d_proj_bias, args.proj_bias.shape(), DType::kF32, "d_proj_bias");
  }
  const BlockMap map = p.Map(a.map);
  args.map = &map;
  backend.SlaAttentionBackward(args);
}

template <typename Args>
Args WrapSalad(const Problem& p, const slalom_salad_args& a) {
  const std::int64_t d = p.width();
  Args args;
  WrapInputs(p, a, args);
  args.map_kind = Choice<BlockMapKind>(a.map_kind, 2, "map_kind");
  args.grid = GridOf(a.grid_frames, a.grid_height, a.grid_width,
                     args.map_kind == BlockMapKind::kWindow, p.length());
  args.gate = Choice<SaladGate>(a.gate, 2, "gate");
  args.out = p.Wrap(a.out, p.rows(), p.type(), "out");
  if (a.proj_weight == nullptr) return args;
  const Shape angles{p.length(), p.head_size() / 2};
  args.q_normed = p.Wrap(a.q_normed, p.by_head(), p.type(), "q_normed");
  args.k_normed = p.Wrap(a.k_normed, p.by_head(), p.type(), "k_normed");
  args.cos = p.Wrap(a.cos, angles, DType::kF32, "cos");
  args.sin = p.Wrap(a.sin, angles, DType::kF32, "sin");
  args.x = p.Wrap(a.x, p.rows(), p.type(), "x");
  args.proj_weight = p.Wrap(a.proj_weight, {d, d}, p.type(), "proj_weight");
  args.proj_bias = p.Wrap(a.proj_bias, {d}, DType::kF32, "proj_bias");
  args.gate_weight = p.Wrap(a.gate_weight, {1, d}, DType::kF32, "gate_weight");
  args.gate_bias = p.Wrap(a.gate_bias, {1}, DType::kF32, "gate_bias");
  return args;
}

void SaladForward(Backend& backend, const slalom_salad_args& a) {
  const Problem p(backend, a);
  auto args = WrapSalad<SaladArgs>(p, a);
  args.lse = p.WrapIf(a.lse, p.per_row(), DType::kF32, "lse");
  args.gate_out = p.WrapIf(a.gate_out, {p.batch(), p.length()}, DType::kF32, "gate_out");
  BlockMap map = p.Map(a.map);
  map.grid = args.grid;
  args.map = &map;
  backend.SaladAttention(args);
}

void SaladBackward(Backend& backend, const slalom_salad_args& a) {
  const Problem p(backend, a);
  auto args = WrapSalad<SaladBackwardArgs>(p, a);
  WrapGradients(p, a, p.rows(), args);
  if (args.proj_weight.defined()) {
    args.d_q_normed = p.Wrap(a.d_q_normed, p.by_head(), p.type(), "d_q_normed");
    args.d_k_normed = p.Wrap(a.d_k_normed, p.by_head(), p.type(), "d_k_normed");
    args.d_x = p.Wrap(a.d_x, p.rows(), p.type(), "d_x");
    args.d_proj_weight =
        p.Wrap(a.d_proj_weight, args.proj_weight.shape(), DType::kF32, "d_proj_weight");
    args.d_proj_bias = p.Wrap(a.d_proj_bias, args.proj_bias.shape(), DType::kF32, "d_proj_bias");
    args.d_gate_weight =
        p.Wrap(a.d_gate_weight, args.gate_weight.shape(), DType::kF32, "d_gate_weight");
    args.d_gate_bias = p.Wrap(a.d_gate_bias, args.gate_bias.shape(), DType::kF32, "d_gate_bias");
  }
  BlockMap map = p.Map(a.map);
  map.grid = args.grid;
  args.map = &map;
  backend.SaladAttentionBackward(args);
}

// Runs `body` and turns what it throws into a code; `error` gets the message.
template <typename Body>
std::int32_t Guard(std::string& error, const Body& body) {
  try {
    body();
    return SLALOM_OK;
  } catch (const Error& e) {
    error = e.what();
    return static_cast<std::int32_t>(e.code());
  } catch (const std::bad_alloc&) {
    error = "out of memory on the host";
    return SLALOM_RESOURCE_EXHAUSTED;
  } catch (const std::exception& e) {
    error = e.what();
    return SLALOM_INTERNAL;
  }
}

// One operation on the caller's stream.
template <typename Args, typename Run>
std::int32_t Call(slalom_context* context, const Args* args, const Run& run) {
  if (context == nullptr) return SLALOM_INVALID_ARGUMENT;
  const std::lock_guard lock(context->mutex);
  return Guard(context->error, [&] {
    const Args known = Known(args);
    FollowStream(*context->backend, known.stream);
    run(*context->backend, known);
    LeadStream(*context->backend, known.stream);
  });
}

}  // namespace
}  // namespace slalom

extern "C" {

int32_t slalom_attention_abi(void) { return SLALOM_ATTENTION_ABI; }

int32_t slalom_context_create(const char* device, int32_t cpu_threads, slalom_context** context,
                              char* error, size_t error_size) {
  if (context == nullptr) return SLALOM_INVALID_ARGUMENT;
  *context = nullptr;
  std::string message;
  const std::int32_t status = slalom::Guard(message, [&] {
    if (device == nullptr) slalom::Invalid("device is NULL");
    if (cpu_threads < 0) slalom::Invalid("cpu_threads is negative");
    auto made = std::make_unique<slalom_context>();
    slalom::BackendOptions options;
    options.cpu_threads = cpu_threads;
    made->backend = slalom::MakeBackend(slalom::ParseDevice(device), options);
    *context = made.release();
  });
  if (status != SLALOM_OK && error != nullptr && error_size > 0) {
    const std::size_t count = std::min(error_size - 1, message.size());
    std::memcpy(error, message.data(), count);
    error[count] = '\0';
  }
  return status;
}

void slalom_context_destroy(slalom_context* context) { delete context; }

const char* slalom_context_error(const slalom_context* context) {
  return context == nullptr ? "the context is NULL" : context->error.c_str();
}

int32_t slalom_make_map(slalom_context* context, const slalom_map_args* args) {
  return slalom::Call(context, args, slalom::MakeMap);
}
int32_t slalom_sla_forward(slalom_context* context, const slalom_sla_args* args) {
  return slalom::Call(context, args, slalom::SlaForward);
}
int32_t slalom_sla_backward(slalom_context* context, const slalom_sla_args* args) {
  return slalom::Call(context, args, slalom::SlaBackward);
}
int32_t slalom_salad_forward(slalom_context* context, const slalom_salad_args* args) {
  return slalom::Call(context, args, slalom::SaladForward);
}
int32_t slalom_salad_backward(slalom_context* context, const slalom_salad_args* args) {
  return slalom::Call(context, args, slalom::SaladBackward);
}

}  // extern "C"
