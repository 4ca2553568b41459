// The C ABI through the shared library: values against the reference on the CPU, errors as codes
// and messages, older callers. The kernels themselves are tested elsewhere.
#include "kernels/c_api/slalom_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/reference/attention_backward.h"
#include "tests/unit/kernels/c_api/c_api_test.h"

namespace slalom {
namespace {

using reference::Array;
using reference::Classes;
using reference::Exact;

class CApi : public CApiTest {
 protected:
  void SetUp() override { CreateContext("cpu"); }
};

constexpr std::int64_t kLength = 50, kHeads = 2, kSize = 16;

// Everything that an SLA call needs, as floats.
struct SlaData {
  Array q, k, v, weight, bias, d_out;
  Classes map;
  std::vector<float> fq, fk, fv, fweight, fbias, fd_out, out, lse, d_q, d_k, d_v, d_weight, d_bias;

  slalom_sla_args Args() {
    for (auto [floats, array] : {std::pair{&fq, &q},
                                 {&fk, &k},
                                 {&fv, &v},
                                 {&fweight, &weight},
                                 {&fbias, &bias},
                                 {&fd_out, &d_out}}) {
      floats->assign(array->values.begin(), array->values.end());
    }
    for (auto* x : {&out, &d_q, &d_k, &d_v}) x->assign(fq.size(), NAN);
    lse.assign(kHeads * kLength, NAN);
    d_weight.assign(fweight.size(), NAN);
    d_bias.assign(fbias.size(), NAN);
    slalom_sla_args args{};
    args.size = sizeof(args);
    args.batch = 1;
    args.length = kLength;
    args.heads = kHeads;
    args.head_size = kSize;
    args.dtype = SLALOM_F32;
    args.block_q = map.block_q;
    args.block_k = map.block_k;
    args.scope = SLALOM_SCOPE_NONCRITICAL;
    args.feature_map = SLALOM_FEATURE_ELU;
    args.q = fq.data();
    args.k = fk.data();
    args.v = fv.data();
    args.map = map.values.data();
    args.proj_weight = fweight.data();
    args.proj_bias = fbias.data();
    args.out = out.data();
    args.lse = lse.data();
    args.d_out = fd_out.data();
    args.d_q = d_q.data();
    args.d_k = d_k.data();
    args.d_v = d_v.data();
    args.d_proj_weight = d_weight.data();
    args.d_proj_bias = d_bias.data();
    return args;
  }
};

class SlaCApi : public CApi {
 protected:
  void SetUp() override {
    CApi::SetUp();
    const Shape shape{1, kLength, kHeads, kSize};
    data_.q = Random(shape);
    data_.k = Random(shape);
    data_.v = Random(shape);
    data_.d_out = Random(shape);
    data_.weight = Random(Shape{kSize, kSize}, 0.3);
    data_.bias = Random(Shape{kSize});
    data_.map = RandomMap(kHeads, kLength, 16, 8);
  }
  SlaData data_;
};

TEST_F(CApi, AbiOfTheLibraryIsTheHeaders) {
  EXPECT_EQ(slalom_attention_abi(), SLALOM_ATTENTION_ABI);
}

TEST_F(SlaCApi, ForwardAndBackwardAgreeWithTheReference) {
  const slalom_sla_args args = data_.Args();
  ASSERT_EQ(slalom_sla_forward(context_, &args), SLALOM_OK) << slalom_context_error(context_);
  ExpectNear(data_.out,
             reference::Sla<Exact>(data_.q, data_.k, data_.v, data_.map, LinearScope::kNonCritical,
                                   FeatureMap::kElu, data_.weight, data_.bias),
             "out");
  ASSERT_EQ(slalom_sla_backward(context_, &args), SLALOM_OK) << slalom_context_error(context_);
  const auto exact =
      reference::SlaBackward<Exact>(data_.q, data_.k, data_.v, data_.map, LinearScope::kNonCritical,
                                    FeatureMap::kElu, data_.weight, data_.bias, data_.d_out);
  ExpectNear(data_.d_q, exact.q, "d_q");
  ExpectNear(data_.d_k, exact.k, "d_k");
  ExpectNear(data_.d_v, exact.v, "d_v");
  ExpectNear(data_.d_weight, exact.proj_weight, "d_proj_weight");
  ExpectNear(data_.d_bias, exact.proj_bias, "d_proj_bias");
}

// A caller that was compiled when the struct ended behind lse can still go forwards.
TEST_F(SlaCApi, OlderCallersAreUnderstood) {
  slalom_sla_args args = data_.Args();
  args.size = offsetof(slalom_sla_args, d_out);
  ASSERT_EQ(slalom_sla_forward(context_, &args), SLALOM_OK) << slalom_context_error(context_);
  for (const float x : data_.out) EXPECT_TRUE(std::isfinite(x));
  EXPECT_EQ(slalom_sla_backward(context_, &args), SLALOM_INVALID_ARGUMENT);
  EXPECT_NE(std::string(slalom_context_error(context_)).find("d_out"), std::string::npos);
}

TEST_F(SlaCApi, MapsAreMadeAndUsed) {
  const slalom_sla_args sla = data_.Args();
  slalom_map_args args{};
  args.size = sizeof(args);
  args.batch = 1;
  args.length = kLength;
  args.heads = kHeads;
  args.head_size = kSize;
  args.dtype = SLALOM_F32;
  args.kind = SLALOM_MAP_TOPK;
  args.topk = 0.3;
  args.negligible = 0.2;
  args.block_q = 16;
  args.block_k = 8;
  args.q = sla.q;
  args.k = sla.k;
  args.map = data_.map.values.data();
  ASSERT_EQ(slalom_make_map(context_, &args), SLALOM_OK) << slalom_context_error(context_);
  // 7 key blocks: 2 critical, 1 negligible in every row.
  for (std::size_t row = 0; row < data_.map.values.size(); row += 7) {
    const auto begin = data_.map.values.begin() + static_cast<std::ptrdiff_t>(row);
    EXPECT_EQ(std::count(begin, begin + 7, SLALOM_CRITICAL), 2);
    EXPECT_EQ(std::count(begin, begin + 7, SLALOM_NEGLIGIBLE), 1);
  }
}

TEST_F(SlaCApi, ErrorsAreCodesAndNameTheArgument) {
  const auto expect = [&](const slalom_sla_args& args, const char* word) {
    EXPECT_EQ(slalom_sla_forward(context_, &args), SLALOM_INVALID_ARGUMENT) << word;
    EXPECT_NE(std::string(slalom_context_error(context_)).find(word), std::string::npos)
        << slalom_context_error(context_);
  };
  slalom_sla_args args = data_.Args();
  args.q = nullptr;
  expect(args, "q is NULL");
  args = data_.Args();
  args.head_size = 12;
  expect(args, "head_size");
  args = data_.Args();
  args.scope = 3;
  expect(args, "scope");
  args = data_.Args();
  args.dtype = 7;
  expect(args, "dtype");
  args = data_.Args();
  args.size = 0;
  expect(args, "size");
  args = data_.Args();
  args.batch = 0;
  expect(args, "batch");
  EXPECT_EQ(slalom_sla_forward(context_, nullptr), SLALOM_INVALID_ARGUMENT);
  EXPECT_EQ(slalom_sla_forward(nullptr, &args), SLALOM_INVALID_ARGUMENT);
  args = data_.Args();
  EXPECT_EQ(slalom_sla_forward(context_, &args), SLALOM_OK) << "the context stays usable";
}

TEST_F(CApi, ContextsThatCannotBe) {
  slalom_context* context = nullptr;
  char error[64] = "";
  EXPECT_EQ(slalom_context_create("cuda:99", 0, &context, error, sizeof(error)),
            SLALOM_FAILED_PRECONDITION);
  EXPECT_EQ(context, nullptr);
  EXPECT_GT(std::strlen(error), 0u);
  EXPECT_NE(slalom_context_create("toaster", 0, &context, nullptr, 0), SLALOM_OK);
  EXPECT_NE(slalom_context_create(nullptr, 0, &context, nullptr, 0), SLALOM_OK);
  slalom_context_destroy(nullptr);
}

// Autograd calls backward from another thread than forward.
TEST_F(SlaCApi, ThreadsTakeTurns) {
  std::vector<SlaData> data(4, data_);
  std::vector<std::thread> threads;
  std::vector<int> codes(4, -1);
  for (std::size_t i = 0; i < data.size(); ++i) {
    threads.emplace_back([&, i] {
      const slalom_sla_args args = data[i].Args();
      codes[i] = slalom_sla_forward(context_, &args);
      if (codes[i] == SLALOM_OK) codes[i] = slalom_sla_backward(context_, &args);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (std::size_t i = 0; i < data.size(); ++i) {
    EXPECT_EQ(codes[i], SLALOM_OK);
    EXPECT_EQ(data[i].d_q, data[0].d_q);
    EXPECT_EQ(data[i].d_weight, data[0].d_weight);
  }
}

TEST_F(CApi, SaladForwardAndBackwardAgreeWithTheReference) {
  const TokenGrid grid{2, 5, 5};
  const std::int64_t d = kHeads * kSize;
  const Shape by_head{1, kLength, kHeads, kSize};
  reference::SaladInputs in;
  for (Array* x : {&in.q, &in.k, &in.v, &in.q_normed, &in.k_normed}) *x = Random(by_head);
  in.SetAngles(Random(Shape{kLength, kSize / 2}));
  in.x = Random(Shape{1, kLength, d});
  in.proj_weight = Random(Shape{d, d}, 0.2);
  in.proj_bias = Random(Shape{d});
  in.gate_weight = Random(Shape{1, d}, 0.2);
  in.gate_bias = Random(Shape{1});
  Classes map = RandomMap(kHeads, kLength, 8, 8);
  map.grid = grid;
  const Array d_out = Random(in.x.shape);
  const auto q = Floats(in.q), k = Floats(in.k), v = Floats(in.v), cos = Floats(in.cos);
  const auto q_normed = Floats(in.q_normed), k_normed = Floats(in.k_normed), sin = Floats(in.sin);
  const auto x = Floats(in.x), weight = Floats(in.proj_weight), bias = Floats(in.proj_bias);
  const auto gate_weight = Floats(in.gate_weight), gate_bias = Floats(in.gate_bias);
  const auto slopes = Floats(d_out);
  const std::size_t count = q.size(), square = weight.size();
  std::vector<float> out(count, NAN), lse(kHeads * kLength, NAN), gate(kLength, NAN);
  std::vector<float> d_q = out, d_k = out, d_v = out, d_qn = out, d_kn = out, d_x = out;
  std::vector<float> d_weight(square, NAN), d_bias(bias.size(), NAN), d_gw = d_bias, d_gb(1, NAN);
  slalom_salad_args args{};
  args.size = sizeof(args);
  args.batch = 1;
  args.length = kLength;
  args.heads = kHeads;
  args.head_size = kSize;
  args.dtype = SLALOM_F32;
  args.block_q = args.block_k = 8;
  args.map_kind = SLALOM_MAP_WINDOW;
  args.gate = SLALOM_GATE_TOKEN;
  args.grid_frames = grid.frames;
  args.grid_height = grid.height;
  args.grid_width = grid.width;
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  args.q_normed = q_normed.data();
  args.k_normed = k_normed.data();
  args.cos = cos.data();
  args.sin = sin.data();
  args.x = x.data();
  args.map = map.values.data();
  args.proj_weight = weight.data();
  args.proj_bias = bias.data();
  args.gate_weight = gate_weight.data();
  args.gate_bias = gate_bias.data();
  args.out = out.data();
  args.lse = lse.data();
  args.gate_out = gate.data();
  ASSERT_EQ(slalom_salad_forward(context_, &args), SLALOM_OK) << slalom_context_error(context_);
  ExpectNear(out, reference::Salad<Exact>(in, map), "out");
  ExpectNear(gate, reference::SaladGateValues<Exact>(in), "gate");
  args.d_out = slopes.data();
  args.d_q = d_q.data();
  args.d_k = d_k.data();
  args.d_v = d_v.data();
  args.d_q_normed = d_qn.data();
  args.d_k_normed = d_kn.data();
  args.d_x = d_x.data();
  args.d_proj_weight = d_weight.data();
  args.d_proj_bias = d_bias.data();
  args.d_gate_weight = d_gw.data();
  args.d_gate_bias = d_gb.data();
  ASSERT_EQ(slalom_salad_backward(context_, &args), SLALOM_OK) << slalom_context_error(context_);
  const auto exact = reference::SaladBackward<Exact>(in, map, d_out);
  ExpectNear(d_q, exact.q, "d_q");
  ExpectNear(d_k, exact.k, "d_k");
  ExpectNear(d_v, exact.v, "d_v");
  ExpectNear(d_qn, exact.q_normed, "d_q_normed");
  ExpectNear(d_kn, exact.k_normed, "d_k_normed");
  ExpectNear(d_x, exact.x, "d_x");
  ExpectNear(d_weight, exact.proj_weight, "d_proj_weight");
  ExpectNear(d_bias, exact.proj_bias, "d_proj_bias");
  ExpectNear(d_gw, exact.gate_weight, "d_gate_weight");
  ExpectNear(d_gb, exact.gate_bias, "d_gate_bias");
}

}  // namespace
}  // namespace slalom
