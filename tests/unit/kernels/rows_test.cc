// Linear, norms, rotation, activations and look-ups against the reference.
#include "tests/reference/rows.h"

#include "kernels/core/error.h"
#include "tests/unit/kernels/device_test.h"

namespace slalom {
namespace {

using reference::Act;
using reference::Array;
using reference::Exact;

constexpr DType kF32 = DType::kF32;

Act ActOf(Activation activation) {
  return activation == Activation::kGeluTanh ? Act::kGeluTanh
         : activation == Activation::kSilu   ? Act::kSilu
                                             : Act::kNone;
}

class RowsTest : public OpTest {
 protected:
  struct LinearSetup {
    std::int64_t batch, rows, n, k;
    Activation activation = Activation::kNone;
    bool bias = true, residual = false, gate = false, in_place = false, f32_out = false;
    bool narrow_bias = false;  // in x's type
  };

  void RunLinear(const LinearSetup& s) {
    const DType out_type = s.f32_out ? kF32 : type();
    const std::int64_t m = s.batch * s.rows;
    const Array none;
    const Array x = Random(Shape{s.batch, s.rows, s.k}, type());
    const Array weight = Random(Shape{s.n, s.k}, type(), 1.0 / std::sqrt(static_cast<double>(s.k)));
    const DType bias_type = s.narrow_bias ? type() : kF32;
    const Array bias = s.bias ? Random(Shape{s.n}, bias_type) : none;
    const Array residual = s.residual ? Random(Shape{m, s.n}, out_type) : none;
    const Array gate = s.gate ? Random(Shape{s.batch, s.n}, kF32) : none;
    Tensor out = Poisoned(Shape{m, s.n}, out_type);
    Tensor device_residual = UploadIf(residual, out_type);
    if (s.in_place) out = device_residual;
    backend().Linear({.x = Upload(x, type()),
                      .weight = Upload(weight, type()),
                      .bias = UploadIf(bias, bias_type),
                      .activation = s.activation,
                      .residual = device_residual,
                      .gate = UploadIf(gate, kF32),
                      .out = out});
    const auto run = [&](auto policy) {
      return reference::Linear<decltype(policy)>(x, weight, bias, ActOf(s.activation), residual,
                                                 gate);
    };
    ExpectClose(
        out, run(Exact{}), Plain(run),
        "Linear " + std::to_string(m) + "x" + std::to_string(s.n) + "x" + std::to_string(s.k));
  }
};

TEST_P(RowsTest, LinearShapes) {
  RunLinear({1, 1, 1, 1});
  RunLinear({1, 1, 256, 256});
  RunLinear({2, 5, 33, 17});
  RunLinear({1, 100, 96, 64, Activation::kNone, false});
  RunLinear({3, 67, 130, 200});
  RunLinear({1, RandomInt(1, 90), RandomInt(1, 90), RandomInt(1, 90)});
}

TEST_P(RowsTest, LinearFusions) {
  for (const Activation act : {Activation::kNone, Activation::kGeluTanh, Activation::kSilu}) {
    for (const bool f32_out : {false, true}) {
      RunLinear({2, 19, 48, 40, act, true, false, false, false, f32_out});
      RunLinear({2, 19, 48, 40, act, true, true, false, false, f32_out});
      RunLinear({2, 19, 48, 40, act, true, true, false, true, f32_out});
      RunLinear({2, 19, 48, 40, act, true, true, true, false, f32_out});
      RunLinear({3, 33, 64, 72, act, false, true, true, true, f32_out});
    }
    LinearSetup narrow = {2, 19, 48, 40, act};
    narrow.narrow_bias = true;
    RunLinear(narrow);
    narrow.residual = narrow.gate = true;
    RunLinear(narrow);
  }
}

// A row's bits must not depend on how many others there are.
TEST_P(RowsTest, LinearRowsAreIndependent) {
  struct Size {
    std::int64_t n, k;
  };
  for (const Size s : {Size{64, 64}, Size{256, 1024}, Size{1000, 300}, Size{17, 2000}}) {
    const std::int64_t most = 200;
    const Tensor x = Upload(Random(Shape{most, s.k}, type()), type());
    const Tensor weight = Upload(Random(Shape{s.n, s.k}, type()), type());
    const Tensor bias = Upload(Random(Shape{s.n}, kF32), kF32);
    const Tensor all = Poisoned(Shape{most, s.n}, type());
    backend().Linear({.x = x, .weight = weight, .bias = bias, .out = all});
    const auto whole = DownloadBytes(all);
    for (const std::int64_t m : {1, 2, 3, 7, 16, 64, 65, 130}) {
      const std::int64_t first = RandomInt(0, most - m);
      const Tensor out = Poisoned(Shape{m, s.n}, type());
      backend().Linear(
          {.x = x.Slice(first, first + m), .weight = weight, .bias = bias, .out = out});
      const auto part = DownloadBytes(out);
      const auto begin = whole.begin() + first * static_cast<std::int64_t>(part.size()) / m;
      EXPECT_TRUE(std::equal(part.begin(), part.end(), begin))
          << m << " rows of " << s.n << "x" << s.k << " differ from the same rows of " << most;
    }
  }
}

// So many rows that a device may choose its kernel by time: before, then and after, a row is a row.
TEST_P(RowsTest, LinearRowsAreIndependentOfVeryMany) {
  constexpr std::int64_t kMany = 16384 + 40, kFew = 40, kN = 384, kK = 128;
  const Tensor x = Upload(Random(Shape{kMany, kK}, type()), type());
  const Tensor weight = Upload(Random(Shape{kN, kK}, type()), type());
  const Tensor bias = Upload(Random(Shape{kN}, type()), type());
  const auto run = [&](std::int64_t rows, Activation activation) {
    const Tensor out = Poisoned(Shape{rows, kN}, type());
    backend().Linear({.x = x.Slice(0, rows),
                      .weight = weight,
                      .bias = bias,
                      .activation = activation,
                      .out = out});
    return DownloadBytes(out);
  };
  for (const Activation activation : {Activation::kNone, Activation::kGeluTanh}) {
    const auto before = run(kFew, activation);
    const auto many = run(kMany, activation);
    EXPECT_TRUE(std::equal(before.begin(), before.end(), many.begin()));
    EXPECT_EQ(run(kFew, activation), before);
    EXPECT_EQ(run(kMany, activation), many);
  }
}

TEST_P(RowsTest, LinearNamesTheWrongArgument) {
  const Tensor x = Poisoned(Shape{4, 8}, type());
  const Tensor weight = Poisoned(Shape{3, 9}, type());
  try {
    backend().Linear({.x = x, .weight = weight, .out = Poisoned(Shape{4, 3}, type())});
    FAIL() << "K differs and nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInternal);
    EXPECT_NE(std::string(error.what()).find("x"), std::string::npos) << error.what();
  }
}

TEST_P(RowsTest, LayerNorm) {
  for (const std::int64_t d : {1, 7, 64, 100, 256, 1536}) {
    for (const bool f32_in : {false, true}) {
      for (int variant = 0; variant < 4; ++variant) {
        const DType in = f32_in ? kF32 : type();
        const Array none;
        const Array x = Random(Shape{2, 5, d}, in, 2.0, 3.0);
        const Array weight = variant % 2 != 0 ? Random(Shape{d}, kF32) : none;
        const Array bias = variant % 2 != 0 ? Random(Shape{d}, kF32) : none;
        const Array scale = variant / 2 != 0 ? Random(Shape{2, d}, kF32) : none;
        const Array shift = variant / 2 != 0 ? Random(Shape{2, d}, kF32) : none;
        const Tensor out = Poisoned(x.shape, type());
        backend().LayerNorm({.x = Upload(x, in),
                             .weight = UploadIf(weight, kF32),
                             .bias = UploadIf(bias, kF32),
                             .scale = UploadIf(scale, kF32),
                             .shift = UploadIf(shift, kF32),
                             .eps = 1e-3f,
                             .out = out});
        const auto run = [&](auto policy) {
          return reference::LayerNorm<decltype(policy)>(x, weight, bias, scale, shift, 1e-3f);
        };
        ExpectClose(out, run(Exact{}), Plain(run), "LayerNorm " + std::to_string(d));
      }
    }
  }
}

TEST_P(RowsTest, RmsNorm) {
  for (const std::int64_t d : {1, 9, 64, 256, 1000}) {
    for (const bool f32_in : {false, true}) {
      const DType in = f32_in ? kF32 : type();
      const Array x = Random(Shape{13, d}, in);
      const Array weight = Random(Shape{d}, kF32);
      const Tensor device_x = Upload(x, in);
      const Tensor out = in == type() ? device_x : Poisoned(x.shape, type());
      backend().RmsNorm({.x = device_x, .weight = Upload(weight, kF32), .eps = 1e-6f, .out = out});
      const auto run = [&](auto policy) {
        return reference::RmsNorm<decltype(policy)>(x, weight, 1e-6f);
      };
      ExpectClose(out, run(Exact{}), Plain(run), "RmsNorm " + std::to_string(d));
    }
  }
}

TEST_P(RowsTest, QkNormRope) {
  for (const std::int64_t size : {2, 8, 22, 64, 128}) {
    for (int variant = 0; variant < 8; ++variant) {
      const std::int64_t heads = 3, length = 7;
      const Array none;
      const Array x = Random(Shape{2, length, heads * size}, type());
      const Array weight = variant % 2 != 0 ? Random(Shape{heads * size}, kF32) : none;
      Array cos = none, sin = none;
      if (variant / 2 % 2 != 0) {
        const Array angle = Random(Shape{length, size / 2}, kF32, 3.0);
        cos = sin = angle;
        for (std::int64_t i = 0; i < angle.size(); ++i) {
          cos[i] = static_cast<float>(std::cos(angle[i]));
          sin[i] = static_cast<float>(std::sin(angle[i]));
        }
      }
      const bool relu = variant / 4 != 0;
      const Tensor device_x = Upload(x, type());
      const Tensor out = device_x.Reshape(Shape{2, length, heads, size});
      backend().QkNormRope({.x = device_x,
                            .weight = UploadIf(weight, kF32),
                            .eps = 1e-6f,
                            .cos = UploadIf(cos, kF32),
                            .sin = UploadIf(sin, kF32),
                            .relu_before_rotation = relu,
                            .out = out});
      const auto run = [&](auto policy) {
        return reference::QkNormRope<decltype(policy)>(x, weight, 1e-6f, cos, sin, relu, heads);
      };
      ExpectClose(out, run(Exact{}), Plain(run),
                  "QkNormRope " + std::to_string(size) + " variant " + std::to_string(variant));
    }
  }
}

TEST_P(RowsTest, Activations) {
  for (const Activation act : {Activation::kGeluTanh, Activation::kSilu, Activation::kNone}) {
    const Array x = Random(Shape{3, 1001}, type());
    const Tensor out = Poisoned(x.shape, type());
    backend().Activate(act, Upload(x, type()), out);
    const auto run = [&](auto policy) {
      return reference::Activate<decltype(policy)>(ActOf(act), x);
    };
    ExpectClose(out, run(Exact{}), Plain(run), "Activate");
  }
}

// Far tails: no overflow, no NaN.
TEST_P(RowsTest, ActivationTails) {
  Array x(Shape{6});
  x.values = {-1000, -90, -20, 20, 90, 1000};
  for (const Activation act : {Activation::kGeluTanh, Activation::kSilu}) {
    const Tensor out = Poisoned(x.shape, type());
    backend().Activate(act, Upload(x, type()), out);
    const Array y = Download(out);
    for (std::int64_t i = 0; i < 6; ++i) {
      EXPECT_NEAR(y[i], reference::Apply(ActOf(act), x[i]), 1e-6 + std::abs(x[i]) * 0x1p-8);
    }
  }
}

TEST_P(RowsTest, GatedGelu) {
  const Array x = Random(Shape{9, 2 * 203}, type(), 2.0);
  const Tensor out = Poisoned(Shape{9, 203}, type());
  backend().GatedGelu(Upload(x, type()), out);
  const auto run = [&](auto policy) { return reference::GatedGelu<decltype(policy)>(x); };
  ExpectClose(out, run(Exact{}), Plain(run), "GatedGelu");
}

TEST_P(RowsTest, Modulation) {
  for (const bool shared : {false, true}) {
    const Array table = Random(Shape{6, 40}, kF32);
    const Array t = Random(shared ? Shape{3, 40} : Shape{3, 6, 40}, kF32);
    const Tensor out = Poisoned(Shape{6, 3, 40}, kF32);
    backend().Modulation({.table = Upload(table, kF32), .t = Upload(t, kF32), .out = out});
    ExpectClose(out, reference::Modulation<Exact>(table, t),
                reference::Modulation<reference::PlainF32>(table, t), "Modulation");
  }
}

TEST_P(RowsTest, EmbeddingTakesRowZeroForBadIds) {
  const Array table = Random(Shape{11, 37}, type());
  const std::vector<std::int32_t> ids = {3, 10, 0, 11, -1, 3};
  const Tensor host = Tensor::Host(Shape{6}, DType::kI32);
  std::copy(ids.begin(), ids.end(), host.data<std::int32_t>());
  const Tensor device_ids = backend().Allocate(Shape{6}, DType::kI32);
  backend().Copy(host, device_ids);
  const Tensor out = Poisoned(Shape{6, 37}, type());
  backend().Embedding(device_ids, Upload(table, type()), out);
  const Array rows = Download(out);
  for (std::int64_t i = 0; i < 6; ++i) {
    const std::int64_t id = ids[static_cast<std::size_t>(i)];
    const std::int64_t row = id < 0 || id > 10 ? 0 : id;
    for (std::int64_t c = 0; c < 37; ++c) EXPECT_EQ(rows[i * 37 + c], table[row * 37 + c]);
  }
}

TEST_P(RowsTest, TimestepEmbedding) {
  Array t(Shape{4});
  t.values = {0, 1, 499.5, 999};
  const Tensor out = Poisoned(Shape{4, 256}, kF32);
  backend().TimestepEmbedding(Upload(t, kF32), out);
  ExpectClose(out, reference::TimestepEmbedding<Exact>(t, 256),
              reference::TimestepEmbedding<reference::PlainF32>(t, 256), "TimestepEmbedding");
}

TEST_P(RowsTest, Combine) {
  for (const std::size_t count : {1, 3, 8}) {
    std::vector<Array> arrays;
    std::vector<Tensor> inputs;
    std::vector<float> coefficients;
    for (std::size_t i = 0; i < count; ++i) {
      arrays.push_back(Random(Shape{2, 777}, kF32));
      inputs.push_back(Upload(arrays.back(), kF32));
      coefficients.push_back(0.5f + static_cast<float>(i));
    }
    Array exact(Shape{2, 777}), plain(Shape{2, 777});
    for (std::int64_t e = 0; e < exact.size(); ++e) {
      float sum = 0;
      for (std::size_t i = 0; i < count; ++i) {
        exact[e] += static_cast<double>(coefficients[i]) * arrays[i][e];
        sum += coefficients[i] * static_cast<float>(arrays[i][e]);
      }
      plain[e] = sum;
    }
    backend().Combine({.inputs = inputs, .coefficients = coefficients, .out = inputs.back()});
    ExpectClose(inputs.back(), exact, plain, "Combine");
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, RowsTest, testing::ValuesIn(OpCases()), OpCaseName);

}  // namespace
}  // namespace slalom
