#include "kernels/cpu/onednn.h"

#include <oneapi/dnnl/dnnl.hpp>
#include <string>
#include <unordered_map>

#include "kernels/core/error.h"
#include "kernels/cpu/parallel.h"

namespace slalom {
namespace {

using dnnl::algorithm;
using dnnl::memory;

memory::data_type TypeOf(DType type) {
  return type == DType::kBF16 ? memory::data_type::bf16 : memory::data_type::f32;
}

[[noreturn]] void Rethrow(const char* what, const dnnl::error& error) {
  const ErrorCode code =
      error.status == dnnl_out_of_memory ? ErrorCode::kResourceExhausted : ErrorCode::kInternal;
  throw Error(code, std::string(what) + ": oneDNN: " + error.what());
}

using MatmulKey = std::tuple<std::int64_t, std::int64_t, std::int64_t, int, int, int, int>;
using ConvolutionKey = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                  std::int64_t, std::int64_t, std::int64_t, std::int64_t, int>;

enum Fusion : int { kBias = 1, kResidual = 2, kGate = 4, kInPlace = 8 };

int FusionOf(const MatmulCall& call) {
  int fusion = 0;
  if (call.bias != nullptr) fusion |= kBias;
  if (call.residual != nullptr) fusion |= kResidual;
  if (call.gate != nullptr) fusion |= kGate;
  if (call.residual == call.out) fusion |= kInPlace;
  return fusion;
}

memory::desc RowDesc(std::int64_t n) {
  return {{1, n}, memory::data_type::f32, memory::format_tag::ab};
}

}  // namespace

struct OneDnn::State {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};

  struct Matmul {
    dnnl::matmul::primitive_desc desc;
    dnnl::matmul primitive;
    int gate_index = -1;
    int residual_index = -1;
  };
  struct Convolution {
    dnnl::convolution_forward::primitive_desc desc;
    dnnl::convolution_forward primitive;
    memory::desc plain_weight;
    dnnl::reorder weight_reorder;
  };
  std::map<MatmulKey, Matmul> matmuls;
  std::map<ConvolutionKey, Convolution> convolutions;

  Matmul BuildMatmul(const MatmulCall& call) const;
  Convolution BuildConvolution(const ConvolutionCall& call) const;
};

OneDnn::State::Matmul OneDnn::State::BuildMatmul(const MatmulCall& call) const {
  const auto type = TypeOf(call.type);
  const auto out_type = TypeOf(call.out_type);
  const memory::desc x({call.m, call.k}, type, memory::format_tag::ab);
  // The weight is stored [N, K]: its transpose, without moving anything.
  const memory::desc weight({call.k, call.n}, type, memory::format_tag::ba);
  const memory::desc out({call.m, call.n}, out_type, memory::format_tag::ab);

  Matmul plan;
  dnnl::post_ops ops;
  if (call.activation == Activation::kGeluTanh) {
    ops.append_eltwise(1.0f, algorithm::eltwise_gelu_tanh, 0.0f, 0.0f);
  } else if (call.activation == Activation::kSilu) {
    ops.append_eltwise(1.0f, algorithm::eltwise_swish, 1.0f, 0.0f);
  }
  if (call.gate != nullptr) {
    plan.gate_index = ops.len();
    ops.append_binary(algorithm::binary_mul, RowDesc(call.n));
  }
  if (call.residual != nullptr && call.residual == call.out) {
    ops.append_sum(1.0f);
  } else if (call.residual != nullptr) {
    plan.residual_index = ops.len();
    ops.append_binary(algorithm::binary_add, out);
  }
  dnnl::primitive_attr attr;
  attr.set_post_ops(ops);
  const auto desc = call.bias != nullptr ? dnnl::matmul::desc(x, weight, RowDesc(call.n), out)
                                         : dnnl::matmul::desc(x, weight, out);
  plan.desc = dnnl::matmul::primitive_desc(desc, attr, engine);
  plan.primitive = dnnl::matmul(plan.desc);
  return plan;
}

OneDnn::State::Convolution OneDnn::State::BuildConvolution(const ConvolutionCall& call) const {
  using Tag = memory::format_tag;
  const auto type = TypeOf(call.type);
  const std::int64_t frames_in = call.frames_out + call.kt - 1;
  const memory::desc x({1, call.channels_in, frames_in, call.height, call.width}, type, Tag::ndhwc);
  const memory::dims weight_dims = {call.channels_out, call.channels_in, call.kt, call.kh, call.kw};
  const memory::desc out({1, call.channels_out, call.frames_out, call.height, call.width}, type,
                         Tag::ndhwc);
  const memory::dims strides = {1, 1, 1};
  const memory::dims padding = {0, call.kh / 2, call.kw / 2};

  dnnl::primitive_attr attr;
  if (call.add_to_out) {
    dnnl::post_ops ops;
    ops.append_sum(1.0f);
    attr.set_post_ops(ops);
  }
  const memory::desc any_weight(weight_dims, type, Tag::any);
  const memory::desc bias({call.channels_out}, memory::data_type::f32, Tag::x);
  using Conv = dnnl::convolution_forward;
  const auto desc =
      call.bias != nullptr
          ? Conv::desc(dnnl::prop_kind::forward_inference, algorithm::convolution_direct, x,
                       any_weight, bias, out, strides, padding, padding)
          : Conv::desc(dnnl::prop_kind::forward_inference, algorithm::convolution_direct, x,
                       any_weight, out, strides, padding, padding);
  Convolution plan;
  plan.desc = Conv::primitive_desc(desc, attr, engine);
  plan.primitive = Conv(plan.desc);
  plan.plain_weight = memory::desc(weight_dims, type, Tag::odhwi);
  const dnnl::reorder::primitive_desc reorder(engine, plan.plain_weight, engine,
                                              plan.desc.weights_desc());
  plan.weight_reorder = dnnl::reorder(reorder);
  return plan;
}

OneDnn::OneDnn(int threads) : threads_(threads), state_(std::make_unique<State>()) {}

OneDnn::~OneDnn() = default;

void OneDnn::Matmul(const MatmulCall& call) try {
  const ThreadCountScope scope(threads_);
  const MatmulKey key{call.m,
                      call.n,
                      call.k,
                      static_cast<int>(call.type),
                      static_cast<int>(call.out_type),
                      static_cast<int>(call.activation),
                      FusionOf(call)};
  auto found = state_->matmuls.find(key);
  if (found == state_->matmuls.end()) {
    found = state_->matmuls.emplace(key, state_->BuildMatmul(call)).first;
  }
  const State::Matmul& plan = found->second;
  const auto wrap = [&](const memory::desc& desc, const void* data) {
    return memory(desc, state_->engine, const_cast<void*>(data));
  };
  std::unordered_map<int, memory> arguments = {
      {DNNL_ARG_SRC, wrap(plan.desc.src_desc(), call.x)},
      {DNNL_ARG_WEIGHTS, wrap(plan.desc.weights_desc(), call.weight)},
      {DNNL_ARG_DST, wrap(plan.desc.dst_desc(), call.out)}};
  if (call.bias != nullptr) {
    arguments.emplace(DNNL_ARG_BIAS, wrap(RowDesc(call.n), call.bias));
  }
  const auto post_op = [](int index) {
    return DNNL_ARG_ATTR_MULTIPLE_POST_OP(index) | DNNL_ARG_SRC_1;
  };
  if (plan.gate_index >= 0) {
    arguments.emplace(post_op(plan.gate_index), wrap(RowDesc(call.n), call.gate));
  }
  if (plan.residual_index >= 0) {
    arguments.emplace(post_op(plan.residual_index), wrap(plan.desc.dst_desc(), call.residual));
  }
  plan.primitive.execute(state_->stream, arguments);
  state_->stream.wait();
} catch (const dnnl::error& error) {
  Rethrow("Linear", error);
}

void OneDnn::Convolution(const ConvolutionCall& call) try {
  const ThreadCountScope scope(threads_);
  const int flags = (call.bias != nullptr ? 1 : 0) | (call.add_to_out ? 2 : 0) |
                    (call.type == DType::kBF16 ? 4 : 0);
  const ConvolutionKey key{call.frames_out,  call.height,       call.width,
                           call.channels_in, call.channels_out, call.kt,
                           call.kh,          call.kw,           flags};
  auto found = state_->convolutions.find(key);
  if (found == state_->convolutions.end()) {
    found = state_->convolutions.emplace(key, state_->BuildConvolution(call)).first;
  }
  const State::Convolution& plan = found->second;
  const auto wrap = [&](const memory::desc& desc, const void* data) {
    return memory(desc, state_->engine, const_cast<void*>(data));
  };
  memory weight = wrap(plan.plain_weight, call.weight);
  if (plan.plain_weight != plan.desc.weights_desc()) {
    memory blocked(plan.desc.weights_desc(), state_->engine);
    plan.weight_reorder.execute(state_->stream, weight, blocked);
    weight = blocked;
  }
  std::unordered_map<int, memory> arguments = {
      {DNNL_ARG_SRC, wrap(plan.desc.src_desc(), call.x)},
      {DNNL_ARG_WEIGHTS, weight},
      {DNNL_ARG_DST, wrap(plan.desc.dst_desc(), call.out)}};
  if (call.bias != nullptr) {
    arguments.emplace(DNNL_ARG_BIAS, wrap(plan.desc.bias_desc(), call.bias));
  }
  plan.primitive.execute(state_->stream, arguments);
  state_->stream.wait();
} catch (const dnnl::error& error) {
  Rethrow("Conv", error);
}

}  // namespace slalom
