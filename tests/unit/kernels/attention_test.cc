// Dense attention, block maps, SLA and SALAD against the reference.
//
// The choice of blocks is discontinuous: outputs are compared with the map forced, maps on their
// own.
#include "tests/reference/attention.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "kernels/core/error.h"
#include "tests/unit/kernels/sparse_attention_test.h"

namespace slalom {
namespace {

using reference::Array;
using reference::Classes;
using reference::Exact;

constexpr DType kF32 = DType::kF32;

double LargestRow(const Array& x) {
  const std::int64_t size = x.dim(3);
  double largest = 0;
  for (std::int64_t row = 0; row < x.size(); row += size) {
    double sum = 0;
    for (std::int64_t c = 0; c < size; ++c) sum += x[row + c] * x[row + c];
    largest = std::max(largest, sum);
  }
  return std::sqrt(largest);
}

// By how much rounding may move a score and so its logarithm of a sum, however well its products
// cancel: a unit in the last place of the largest score that such rows could have.
double ScoreRounding(const Array& q, const Array& k, double scale) {
  return 0x1p-24 * scale * LargestRow(q) * LargestRow(k);
}

class AttentionTest : public SparseAttentionTest {
 protected:
  // Every query block has a critical block.
  Classes ClassesWithKeys(std::int64_t batch, std::int64_t heads, std::int64_t length, int block_q,
                          int block_k) {
    return RandomClasses(batch, heads, length, block_q, block_k, 1);
  }

  Classes ClassesOf(const BlockMap& map) {
    const Shape& s = map.classes.shape();
    return {map.block_q, map.block_k, s[0], s[1], s[2], s[3], DownloadBytes(map.classes), map.grid};
  }

  // A map that the backend has ranked.
  Classes TopKClasses(std::int64_t batch, std::int64_t length, std::int64_t heads,
                      std::int64_t size, double topk, double negligible, int block) {
    const Qkv in = RandomQkv(batch, length, heads, size);
    return ClassesOf(
        backend().MakeBlockMap({.q = Upload(in.q, type()),
                                .k = Upload(in.k, type()),
                                .options = {BlockMapKind::kTopK, topk, negligible, block, block}}));
  }

  void RunDense(std::int64_t batch, std::int64_t lq, std::int64_t lk, std::int64_t heads,
                std::int64_t size, bool bias) {
    const Array q = Random(Shape{batch, lq, heads, size}, type());
    const Array k = Random(Shape{batch, lk, heads, size}, type());
    const Array v = Random(Shape{batch, lk, heads, size}, type());
    const Array relative = bias ? Random(Shape{heads, lq + lk - 1}, kF32) : Array();
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    const Tensor out = Poisoned(q.shape, type());
    const Tensor lse = Poisoned(Shape{batch, heads, lq}, kF32);
    backend().Attention({.q = Upload(q, type()),
                         .k = Upload(k, type()),
                         .v = Upload(v, type()),
                         .scale = scale,
                         .relative_bias = UploadIf(relative, kF32),
                         .out = out,
                         .lse = lse});
    std::map<bool, Array> lses;
    const auto run = [&](auto policy) {
      using P = decltype(policy);
      Array& rows = lses[std::is_same_v<P, Exact>] = Array(Shape{batch, heads, lq});
      return reference::Attention<P>(q, k, v, scale, relative, &rows);
    };
    const std::string what = "Attention " + std::to_string(lq) + " on " + std::to_string(lk) +
                             ", D " + std::to_string(size);
    const Array exact = run(Exact{});
    ExpectClose(out, exact, Plain(run), what);
    ExpectClose(lse, lses[true], lses[false], what + " lse", 8.0, ScoreRounding(q, k, scale));
  }

  void RunSla(std::int64_t batch, std::int64_t length, std::int64_t heads, std::int64_t size,
              const Classes& map, LinearScope scope, FeatureMap feature_map, bool linear) {
    const Qkv in = RandomQkv(batch, length, heads, size);
    const Projection projection = RandomProjection(size, linear);
    const BlockMap forced = Force(map);
    const SlaArgs args = SlaArguments(in, projection, forced, scope, feature_map);
    backend().SlaAttention(args);
    const auto run = [&](auto policy) {
      return reference::Sla<decltype(policy)>(in.q, in.k, in.v, map, scope, feature_map,
                                              projection.weight, projection.bias);
    };
    ExpectClose(args.out, run(Exact{}), Plain(run),
                "SLA L " + std::to_string(length) + " scope " +
                    std::to_string(static_cast<int>(scope)) + " features " +
                    std::to_string(static_cast<int>(feature_map)));
  }

  void RunSalad(const TokenGrid& grid, bool window, SaladGate gate, bool linear, std::int64_t heads,
                std::int64_t size) {
    Classes map = ClassesWithKeys(2, heads, grid.size(), 16, 16);
    if (window) map.grid = grid;
    RunSalad(grid, map, gate, linear, size);
  }

  void RunSalad(const TokenGrid& grid, const Classes& map, SaladGate gate, bool linear,
                std::int64_t size) {
    reference::SaladInputs in = RandomSalad(map.batch, grid, map.heads, size, linear);
    in.gate = gate;
    const BlockMap forced = Force(map);
    SaladArgs args = SaladArguments(in, forced, grid);
    if (linear) args.gate_out = Poisoned(Shape{map.batch, grid.size()}, kF32);
    backend().SaladAttention(args);
    const auto run = [&](auto policy) { return reference::Salad<decltype(policy)>(in, map); };
    ExpectClose(args.out, run(Exact{}), Plain(run), "SALAD");
    if (!linear) return;
    ExpectClose(args.gate_out, reference::SaladGateValues<Exact>(in),
                reference::SaladGateValues<reference::PlainF32>(in), "SALAD gate");
  }
};

TEST_P(AttentionTest, DenseLengthsAndHeads) {
  RunDense(1, 1, 1, 1, 64, false);
  RunDense(2, 63, 65, 2, 64, false);
  RunDense(1, 65, 63, 1, 128, false);
  RunDense(1, 130, 200, 2, 128, false);
  RunDense(3, 40, 40, 1, 384, false);
  RunDense(1, 70, 129, 3, 40, false);
  RunDense(1, 64, 64, 1, 7, false);
  RunDense(1, RandomInt(1, 150), RandomInt(1, 150), 2, 8 * RandomInt(1, 16), false);
}

// A text's padding: many keys that are all the same, as many as they like in each element.
TEST_P(AttentionTest, DenseWithEqualKeysAtTheEnd) {
  for (const std::int64_t keys : {2, 64, 65, 200}) {
    const Shape shape{3, keys, 2, 64};
    const Array q = Random(Shape{3, 70, 2, 64}, type());
    Array k = Random(shape, type()), v = Random(shape, type());
    const std::int64_t width = 2 * 64;
    // Of element 1 all but one, of element 2 a few; element 0 only its keys, not its values.
    for (const auto& [b, same] : {std::pair{0, keys}, {1, keys - 1}, {2, keys / 3}}) {
      for (std::int64_t row = keys - same; row < keys - 1; ++row) {
        for (std::int64_t c = 0; c < width; ++c) {
          const std::int64_t from = ((b + 1) * keys - 1) * width + c;
          k[(b * keys + row) * width + c] = k[from];
          if (b > 0) v[(b * keys + row) * width + c] = v[from];
        }
      }
    }
    const Tensor out = Poisoned(q.shape, type());
    const Tensor lse = Poisoned(Shape{3, 2, 70}, kF32);
    const AttentionArgs args{.q = Upload(q, type()),
                             .k = Upload(k, type()),
                             .v = Upload(v, type()),
                             .scale = 0.125f,
                             .out = out,
                             .lse = lse};
    backend().Attention(args);
    std::map<bool, Array> lses;
    const auto run = [&](auto policy) {
      using P = decltype(policy);
      Array& rows = lses[std::is_same_v<P, Exact>] = Array(Shape{3, 2, 70});
      return reference::Attention<P>(q, k, v, 0.125, Array(), &rows);
    };
    const std::string what = "equal keys of " + std::to_string(keys);
    ExpectClose(out, run(Exact{}), Plain(run), what);
    ExpectClose(lse, lses[true], lses[false], what + " lse", 8.0, ScoreRounding(q, k, 0.125));
    for (std::int64_t b = 0; b < 3; ++b) {
      AttentionArgs one = args;
      one.q = args.q.Slice(b, b + 1);
      one.k = args.k.Slice(b, b + 1);
      one.v = args.v.Slice(b, b + 1);
      one.out = Poisoned(Shape{1, 70, 2, 64}, type());
      one.lse = Tensor();
      backend().Attention(one);
      EXPECT_EQ(DownloadBytes(one.out), DownloadBytes(out.Slice(b, b + 1))) << what;
    }
  }
}

TEST_P(AttentionTest, DenseWithRelativeBias) {
  RunDense(1, 1, 1, 2, 64, true);
  RunDense(2, 77, 77, 3, 64, true);
  RunDense(1, 65, 130, 2, 32, true);
}

// Scores so far apart that exp would overflow without the running maximum.
TEST_P(AttentionTest, DenseWithLargeScores) {
  const std::int64_t length = 150, size = 64;
  const Array q = Random(Shape{1, length, 1, size}, type(), 6.0);
  const Array k = Random(Shape{1, length, 1, size}, type(), 6.0);
  const Array v = Random(Shape{1, length, 1, size}, type());
  const Tensor out = Poisoned(q.shape, type());
  backend().Attention({.q = Upload(q, type()),
                       .k = Upload(k, type()),
                       .v = Upload(v, type()),
                       .scale = 1.0f,
                       .out = out});
  const auto run = [&](auto policy) {
    return reference::Attention<decltype(policy)>(q, k, v, 1.0, Array(), nullptr);
  };
  // Scores of a thousand carry a rounding error of a thousand units into the exponent.
  ExpectClose(out, run(Exact{}), Plain(run), "large scores", 1024.0);
}

// One element of a batch gives the same bits alone.
TEST_P(AttentionTest, DenseBatchElementsAreIndependent) {
  const Shape shape{3, 100, 2, 64};
  const Tensor q = Upload(Random(shape, type()), type());
  const Tensor k = Upload(Random(shape, type()), type());
  const Tensor v = Upload(Random(shape, type()), type());
  const Tensor all = Poisoned(shape, type());
  backend().Attention({.q = q, .k = k, .v = v, .scale = 0.125f, .out = all});
  for (std::int64_t b = 0; b < 3; ++b) {
    const Tensor one = Poisoned(Shape{1, 100, 2, 64}, type());
    backend().Attention({.q = q.Slice(b, b + 1),
                         .k = k.Slice(b, b + 1),
                         .v = v.Slice(b, b + 1),
                         .scale = 0.125f,
                         .out = one});
    EXPECT_EQ(DownloadBytes(one), DownloadBytes(all.Slice(b, b + 1)));
  }
}

TEST_P(AttentionTest, MapPicksTheLargestScores) {
  struct Setup {
    std::int64_t length;
    int block_q, block_k;
    double topk, negligible;
  };
  for (const Setup& s :
       {Setup{1000, 64, 64, 0.2, 0.3}, Setup{333, 32, 16, 0.01, 0.1}, Setup{130, 128, 64, 1.0, 0.0},
        Setup{1, 64, 64, 0.05, 0.1}, Setup{63, 64, 64, 0.5, 0.5}, Setup{2304, 16, 16, 0.05, 0.1},
        Setup{7488, 16, 16, 0.1, 0.0}}) {
    const std::int64_t batch = 2, heads = 3, size = 32;
    const Qkv in = RandomQkv(batch, s.length, heads, size);
    const BlockMap map = backend().MakeBlockMap(
        {.q = Upload(in.q, type()),
         .k = Upload(in.k, type()),
         .options = {BlockMapKind::kTopK, s.topk, s.negligible, s.block_q, s.block_k}});
    const Classes classes = ClassesOf(map);
    const Array scores = reference::PooledScores<Exact>(in.q, in.k, s.block_q, s.block_k);
    const Array plain =
        reference::PooledScores<reference::PlainF32>(in.q, in.k, s.block_q, s.block_k);
    double slack = 1e-12;
    for (std::int64_t i = 0; i < scores.size(); ++i) {
      slack = std::max(slack, 4 * std::abs(scores[i] - plain[i]));
    }
    const std::int64_t nk = classes.key_blocks;
    const std::int64_t critical = CriticalBlocks(s.topk, nk);
    const std::int64_t negligible = NegligibleBlocks(s.negligible, nk, critical);
    for (std::int64_t row = 0; row < scores.size() / nk; ++row) {
      std::map<int, std::int64_t> counts;
      double least[3] = {1e30, 1e30, 1e30}, most[3] = {-1e30, -1e30, -1e30};
      for (std::int64_t j = 0; j < nk; ++j) {
        const int c = classes.values[static_cast<std::size_t>(row * nk + j)];
        ++counts[c];
        least[c] = std::min(least[c], scores[row * nk + j]);
        most[c] = std::max(most[c], scores[row * nk + j]);
      }
      EXPECT_EQ(counts[1], critical);
      EXPECT_EQ(counts[0], negligible);
      EXPECT_GE(least[1], most[2] - slack);
      EXPECT_GE(least[1], most[0] - slack);
      EXPECT_GE(least[2], most[0] - slack);
    }
  }
}

// Equal scores everywhere: the lower index wins.
TEST_P(AttentionTest, MapTiesGoToTheLowerIndex) {
  const Array zeros(Shape{1, 640, 1, 16});
  const Tensor q = Upload(zeros, type());
  const BlockMap map =
      backend().MakeBlockMap({.q = q, .k = q, .options = {BlockMapKind::kTopK, 0.3, 0.2, 64, 64}});
  const std::vector<std::uint8_t> row = {1, 1, 1, 2, 2, 2, 2, 2, 0, 0};
  const auto classes = DownloadBytes(map.classes);
  for (std::size_t i = 0; i < classes.size(); ++i) EXPECT_EQ(classes[i], row[i % 10]) << i;
}

// Means that the step before attention leaves are those of what it writes, and give the same map.
TEST_P(AttentionTest, MapFromMeans) {
  struct Setup {
    std::int64_t length, heads, size;
  };
  for (const Setup& s : {Setup{1, 1, 8}, Setup{200, 3, 32}, Setup{330, 12, 128}}) {
    const std::int64_t batch = 2, width = s.heads * s.size;
    const Array cos = Random(Shape{s.length, s.size / 2}, kF32);
    const auto rotate = [&](int pool, Tensor& means) {
      const Tensor x = Upload(Random(Shape{batch, s.length, width}, type()), type());
      const Tensor out = Poisoned(Shape{batch, s.length, s.heads, s.size}, type());
      means = Poisoned(Shape{batch, (s.length + pool - 1) / pool, width}, kF32);
      backend().QkNormRope({.x = x,
                            .weight = Upload(Random(Shape{width}, kF32), kF32),
                            .cos = Upload(cos, kF32),
                            .sin = Upload(cos, kF32),
                            .out = out,
                            .means = means,
                            .pool = pool});
      const Array rows = Download(out), got = Download(means);
      for (std::int64_t i = 0; i < got.size(); ++i) {
        const std::int64_t block = i / width % means.dim(1), first = block * pool;
        const std::int64_t count = std::min<std::int64_t>(pool, s.length - first);
        double sum = 0;
        for (std::int64_t r = 0; r < count; ++r) {
          sum += rows[(i / width / means.dim(1) * s.length + first + r) * width + i % width];
        }
        EXPECT_NEAR(got[i], sum / static_cast<double>(count), 1e-4) << i;
      }
      return out;
    };
    BlockMapArgs args;
    args.q = rotate(128, args.q_means);
    args.k = rotate(64, args.k_means);
    args.options = {BlockMapKind::kTopK, 0.3, 0.3, 128, 64};
    const BlockMap from_means = backend().MakeBlockMap(args);
    args.q_means = args.k_means = Tensor();
    EXPECT_EQ(DownloadBytes(from_means.classes),
              DownloadBytes(backend().MakeBlockMap(args).classes));
  }
}

TEST_P(AttentionTest, MapListsMatchTheClasses) {
  const Classes classes = RandomClasses(2, 2, 700, 32, 64);
  const BlockMap map = Force(classes);
  const Tensor lists = Tensor::Host(map.critical.shape(), DType::kI32);
  const Tensor counts = Tensor::Host(map.counts.shape(), DType::kI32);
  backend().Copy(map.critical, lists);
  backend().Copy(map.counts, counts);
  const std::int64_t width = map.critical.dim(3);
  for (std::int64_t row = 0; row < counts.NumElements(); ++row) {
    std::vector<std::int32_t> wanted;
    for (std::int64_t j = 0; j < classes.key_blocks; ++j) {
      if (classes.values[static_cast<std::size_t>(row * classes.key_blocks + j)] == 1) {
        wanted.push_back(static_cast<std::int32_t>(j));
      }
    }
    const std::int32_t* list = lists.data<std::int32_t>() + row * width;
    ASSERT_EQ(counts.data<std::int32_t>()[row], static_cast<std::int32_t>(wanted.size()));
    EXPECT_TRUE(std::equal(wanted.begin(), wanted.end(), list));
  }
}

// Every query block keeps as many neighbouring blocks as asked for, around its own place.
TEST_P(AttentionTest, WindowMap) {
  const TokenGrid grid{5, 8, 10};
  for (const double topk : {0.01, 0.1, 0.3, 1.0}) {
    const Array zeros(Shape{1, grid.size(), 2, 16});
    const Tensor q = Upload(zeros, type());
    const BlockMap map = backend().MakeBlockMap(
        {.q = q, .k = q, .grid = grid, .options = {BlockMapKind::kWindow, topk, 0.1, 32, 16}});
    EXPECT_EQ(map.grid.size(), grid.size());
    const Classes classes = ClassesOf(map);
    const std::int64_t critical = CriticalBlocks(topk, classes.key_blocks);
    for (std::int64_t h = 0; h < 2; ++h) {
      for (std::int64_t i = 0; i < classes.query_blocks; ++i) {
        std::int64_t first = -1, count = 0;
        for (std::int64_t j = 0; j < classes.key_blocks; ++j) {
          if (classes.at(0, h, i, j) != BlockClass::kCritical) continue;
          if (first < 0) first = j;
          EXPECT_EQ(j, first + count) << "a window has no holes";
          ++count;
        }
        EXPECT_EQ(count, critical);
        const std::int64_t rows = std::min<std::int64_t>(32, grid.size() - i * 32);
        const std::int64_t centre = (i * 32 + (rows - 1) / 2) / 16;
        EXPECT_LE(first, centre);
        EXPECT_LT(centre, first + count);
      }
    }
  }
}

TEST_P(AttentionTest, CountPairsAdds) {
  const Classes classes = ClassesWithKeys(1, 2, 2304, 16, 16);
  const Tensor counter = backend().Allocate(Shape{2}, DType::kI64);
  backend().Zero(counter);
  const BlockMap map = Force(classes);
  backend().CountPairs(map, counter);
  backend().CountPairs(map, counter);
  const Tensor host = Tensor::Host(Shape{2}, DType::kI64);
  backend().Copy(counter, host);
  const auto critical = std::count(classes.values.begin(), classes.values.end(), 1);
  EXPECT_EQ(host.data<std::int64_t>()[0], 2 * critical);
  EXPECT_EQ(host.data<std::int64_t>()[1], 2 * static_cast<std::int64_t>(classes.values.size()));
}

TEST_P(AttentionTest, SlaScopesAndFeatureMaps) {
  for (const LinearScope scope :
       {LinearScope::kMarginal, LinearScope::kNonCritical, LinearScope::kAll}) {
    for (const FeatureMap feature_map :
         {FeatureMap::kSoftmax, FeatureMap::kElu, FeatureMap::kRelu}) {
      RunSla(2, 150, 2, 32, ClassesWithKeys(2, 2, 150, 32, 16), scope, feature_map, true);
    }
  }
}

TEST_P(AttentionTest, SlaShapes) {
  using enum LinearScope;
  const FeatureMap softmax = FeatureMap::kSoftmax;
  RunSla(1, 1, 1, 64, ClassesWithKeys(1, 1, 1, 64, 64), kMarginal, softmax, true);
  RunSla(1, 63, 1, 64, ClassesWithKeys(1, 1, 63, 64, 64), kAll, softmax, true);
  RunSla(1, 65, 2, 128, ClassesWithKeys(1, 2, 65, 64, 64), kNonCritical, softmax, true);
  RunSla(1, 300, 1, 128, ClassesWithKeys(1, 1, 300, 128, 64), kMarginal, softmax, true);
  RunSla(1, 200, 2, 40, ClassesWithKeys(1, 2, 200, 48, 24), kMarginal, softmax, true);
  RunSla(1, 200, 2, 64, ClassesWithKeys(1, 2, 200, 64, 64), kMarginal, softmax, false);
}

// Small blocks: most are in scope, and neighbours have most of it in common.
TEST_P(AttentionTest, SlaSmallBlocks) {
  using enum LinearScope;
  for (const auto& [length, size, scope, feature_map] :
       {std::tuple{400, 32, kMarginal, FeatureMap::kSoftmax},
        {391, 128, kMarginal, FeatureMap::kSoftmax},
        {391, 64, kNonCritical, FeatureMap::kElu},
        {273, 40, kMarginal, FeatureMap::kRelu},
        {400, 64, kAll, FeatureMap::kElu}}) {
    Classes map = ClassesWithKeys(1, 2, length, 16, 16);
    for (std::size_t i = 0; i < map.values.size(); ++i) {
      const bool follows = i % static_cast<std::size_t>(map.key_blocks * map.query_blocks) >=
                           static_cast<std::size_t>(map.key_blocks);
      const bool kept = follows && RandomInt(0, 3) > 0;
      if (kept) {
        map.values[i] = map.values[i - static_cast<std::size_t>(map.key_blocks)];
      } else if (RandomInt(0, 3) > 0) {
        map.values[i] = 2;
      }
    }
    RunSla(1, length, 2, size, map, scope, feature_map, true);
  }
}

// Query blocks without a critical or without any marginal block.
TEST_P(AttentionTest, SlaEmptySets) {
  Classes none = RandomClasses(1, 1, 128, 32, 32);
  std::fill(none.values.begin(), none.values.end(), 2);
  RunSla(1, 128, 1, 32, none, LinearScope::kMarginal, FeatureMap::kSoftmax, true);
  Classes all = none;
  std::fill(all.values.begin(), all.values.end(), 1);
  RunSla(1, 128, 1, 32, all, LinearScope::kMarginal, FeatureMap::kSoftmax, true);
  RunSla(1, 128, 1, 32, all, LinearScope::kNonCritical, FeatureMap::kSoftmax, true);
  Classes dropped = none;
  std::fill(dropped.values.begin(), dropped.values.end(), 0);
  RunSla(1, 128, 1, 32, dropped, LinearScope::kMarginal, FeatureMap::kSoftmax, true);
  Classes small = RandomClasses(1, 1, 100, 16, 16);
  for (const std::uint8_t only : {0, 1, 2}) {
    std::fill(small.values.begin(), small.values.end(), only);
    RunSla(1, 100, 1, 128, small, LinearScope::kMarginal, FeatureMap::kSoftmax, true);
  }
}

// A huge value in a critical block must not leave its rounding error in the linear branch.
TEST_P(AttentionTest, SlaDoesNotCancel) {
  const std::int64_t length = 256, size = 32, block = RandomInt(1, 2) * 16;
  Qkv in = RandomQkv(1, length, 1, size);
  for (std::int64_t i = 0; i < block * size; ++i) in.v[i] *= 65536;
  Classes map = ClassesWithKeys(1, 1, length, static_cast<int>(block), static_cast<int>(block));
  for (std::int64_t i = 0; i < map.query_blocks; ++i) {
    for (std::int64_t j = 0; j < map.key_blocks; ++j) {
      const bool near = j >= i && j < i + 3;
      map.values[static_cast<std::size_t>(i * map.key_blocks + j)] = near || j == 0 ? 1 : 2;
    }
  }
  // Rows of the first block do not see the huge keys at all: they are theirs, so leave them out.
  const BlockMap forced = Force(map);
  Array weight(Shape{size, size});
  for (std::int64_t c = 0; c < size; ++c) weight[c * size + c] = 1;
  const auto sla = [&](const Tensor& proj_weight) {
    const Tensor out = Poisoned(in.q.shape, kF32);
    backend().SlaAttention(
        {.q = Upload(in.q, kF32),
         .k = Upload(in.k, kF32),
         .v = Upload(in.v, kF32),
         .map = &forced,
         .scope = LinearScope::kNonCritical,
         .proj_weight = proj_weight,
         .proj_bias = proj_weight.defined() ? Upload(Array(Shape{size}), kF32) : Tensor(),
         .out = out});
    return Download(out);
  };
  const Array with = sla(Upload(weight, kF32));
  const Array exact = reference::Sla<Exact>(in.q, in.k, in.v, map, LinearScope::kNonCritical,
                                            FeatureMap::kSoftmax, weight, Array(Shape{size}));
  const Array plain =
      reference::Sla<reference::PlainF32>(in.q, in.k, in.v, map, LinearScope::kNonCritical,
                                          FeatureMap::kSoftmax, weight, Array(Shape{size}));
  const Array sparse = sla(Tensor());
  const Array exact_sparse = reference::SparseBranch<Exact>(in.q, in.k, in.v, map);
  double error = 0, sparse_error = 0, plain_error = 0;
  for (std::int64_t i = 0; i < exact.size(); ++i) {
    error = std::max(error, std::abs(with[i] - exact[i]));
    plain_error = std::max(plain_error, std::abs(plain[i] - exact[i]));
    sparse_error = std::max(sparse_error, std::abs(sparse[i] - exact_sparse[i]));
  }
  EXPECT_LE(error, 2 * plain_error + 2 * sparse_error);
}

// topk = 1: all blocks are critical, SLA without its linear branch is dense attention.
TEST_P(AttentionTest, SlaWithEveryBlockIsDense) {
  const Qkv in = RandomQkv(1, 200, 2, 64);
  const Tensor q = Upload(in.q, type()), k = Upload(in.k, type()), v = Upload(in.v, type());
  const BlockMap map =
      backend().MakeBlockMap({.q = q, .k = k, .options = {BlockMapKind::kTopK, 1.0, 0.1, 64, 64}});
  const Tensor sparse = Poisoned(in.q.shape, type());
  backend().SlaAttention({.q = q, .k = k, .v = v, .map = &map, .out = sparse});
  const auto run = [&](auto policy) {
    return reference::Attention<decltype(policy)>(in.q, in.k, in.v, 0.125, Array(), nullptr);
  };
  ExpectClose(sparse, run(Exact{}), Plain(run), "SLA with every block");
}

TEST_P(AttentionTest, SaladMapsAndGates) {
  for (const bool window : {false, true}) {
    for (const SaladGate gate : {SaladGate::kToken, SaladGate::kSample}) {
      RunSalad({3, 5, 7}, window, gate, true, 2, 32);
    }
  }
  RunSalad({2, 6, 8}, true, SaladGate::kToken, true, 3, 64);
  RunSalad({1, 1, 1}, false, SaladGate::kToken, true, 1, 64);
  RunSalad({3, 4, 5}, true, SaladGate::kToken, false, 2, 32);
  RunSalad({2, 6, 7}, false, SaladGate::kToken, true, 2, 128);
  RunSalad({3, 5, 7}, true, SaladGate::kSample, true, 2, 128);
  RunSalad({2, 8, 9}, false, SaladGate::kSample, true, 3, 64);
}

// Blocks of 16 tokens, as models of a few thousand tokens have them: 144 of them (fewer on CPUs,
// for the reference's sake), ragged ones, and sizes that differ.
TEST_P(AttentionTest, BlocksOf16) {
  const FeatureMap softmax = FeatureMap::kSoftmax;
  const TokenGrid grid{GetParam().device.name == "cuda" ? 9 : 3, 16, 16};
  RunSla(1, grid.size(), 2, 128, TopKClasses(1, grid.size(), 2, 128, 0.05, 0.1, 16),
         LinearScope::kMarginal, softmax, true);
  RunSalad(grid, TopKClasses(1, grid.size(), 2, 128, 0.1, 0.0, 16), SaladGate::kToken, true, 128);
  for (const std::int64_t size : {64, 128}) {
    RunSla(2, 250, 2, size, ClassesWithKeys(2, 2, 250, 16, 16), LinearScope::kMarginal, softmax,
           true);
    RunSla(1, 333, 2, size, ClassesWithKeys(1, 2, 333, 32, 16), LinearScope::kNonCritical,
           FeatureMap::kElu, true);
    RunSla(1, 200, 1, size, ClassesWithKeys(1, 1, 200, 16, 64), LinearScope::kAll, softmax, true);
  }
}

TEST_P(AttentionTest, MassKept) {
  const TokenGrid grid{3, 8, 9};
  for (const bool window : {false, true}) {
    const Qkv in = RandomQkv(2, grid.size(), 2, 32);
    Classes map = ClassesWithKeys(2, 2, grid.size(), 32, 16);
    if (window) map.grid = grid;
    const BlockMap forced = Force(map);
    for (const int rows : {1, 16, 10000}) {
      const Tensor out = Poisoned(Shape{1}, kF32);
      backend().AttentionMassKept(Upload(in.q, type()), Upload(in.k, type()), 0.17f, forced, rows,
                                  out);
      EXPECT_NEAR(Download(out)[0], reference::MassKept(in.q, in.k, 0.17f, map, rows), 1e-4);
    }
  }
}

// Heads and blocks that have a kernel of their own on some devices: ragged lengths, several tiles a
// block, more rows than a tile has, and the other order of tokens.
TEST_P(AttentionTest, MassKeptWithWideHeads) {
  for (const int size : {64, 128}) {
    for (const int block_k : {16, 64, 128}) {
      const TokenGrid grid{3, 10, 11};
      for (const bool window : {false, true}) {
        const Qkv in = RandomQkv(1, grid.size(), 2, size);
        Classes map = ClassesWithKeys(1, 2, grid.size(), std::min(block_k, 64), block_k);
        if (window) map.grid = grid;
        const BlockMap forced = Force(map);
        for (const int rows : {3, 70}) {
          const Tensor out = Poisoned(Shape{1}, kF32);
          backend().AttentionMassKept(Upload(in.q, type()), Upload(in.k, type()), 0.06f, forced,
                                      rows, out);
          EXPECT_NEAR(Download(out)[0], reference::MassKept(in.q, in.k, 0.06f, map, rows), 1e-4);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, AttentionTest, testing::ValuesIn(OpCases()), OpCaseName);

}  // namespace
}  // namespace slalom
