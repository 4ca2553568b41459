// What of the gradients' kernels needs no device: which kernel takes what, the walk along lists by
// key block, and the order in which the Hopper kernels' warps wait for each other.
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/attention/backward.h"
#include "kernels/cuda/attention/key_blocks.cuh"
#include "kernels/cuda/hopper/ring.h"

namespace slalom::cuda {
namespace {

SparseGradientProblem Problem(DType type, int head_size, int block_q, int block_k) {
  SparseGradientProblem problem;
  problem.dtype = type;
  problem.head_size = head_size;
  problem.keys.block_q = problem.queries.block_k = block_q;
  problem.keys.block_k = problem.queries.block_q = block_k;
  return problem;
}

TEST(GradientKernel, Choice) {
  const auto bf16 = DType::kBF16;
  const auto choose = [](const SparseGradientProblem& problem, bool aligned, int major) {
    return ChooseGradientKernel(problem, aligned, major);
  };
  EXPECT_EQ(choose(Problem(bf16, 128, 128, 64), true, 9), GradientKernel::kHopper);
  EXPECT_EQ(choose(Problem(bf16, 64, 64, 64), true, 9), GradientKernel::kHopper);
  EXPECT_EQ(choose(Problem(bf16, 128, 128, 64), true, 8), GradientKernel::kTensorCore);
  EXPECT_EQ(choose(Problem(bf16, 128, 128, 64), true, 10), GradientKernel::kTensorCore);
  EXPECT_EQ(choose(Problem(bf16, 128, 128, 64), false, 9), GradientKernel::kRow);
  EXPECT_EQ(choose(Problem(bf16, 128, 96, 64), true, 9), GradientKernel::kTensorCore);
  EXPECT_EQ(choose(Problem(bf16, 128, 64, 16), true, 9), GradientKernel::kTensorCore);
  EXPECT_EQ(choose(Problem(bf16, 128, 64, 24), true, 9), GradientKernel::kRow);
  EXPECT_EQ(choose(Problem(bf16, 40, 64, 64), true, 9), GradientKernel::kRow);
  EXPECT_EQ(choose(Problem(DType::kF32, 128, 64, 64), true, 9), GradientKernel::kRow);
}

// Walked by key tiles, the transposed lists give every query row of every critical pair once.
TEST(QueryLists, WalkByKeyTiles) {
  for (const auto& [block_q, block_k, length] :
       {std::array{64, 64, 200}, {128, 64, 300}, {64, 128, 330}, {128, 128, 129}}) {
    const int nq = (length + block_q - 1) / block_q, nk = (length + block_k - 1) / block_k;
    std::vector<std::int32_t> indices(static_cast<std::size_t>(nq * nk), -1);
    std::vector<std::int32_t> counts(static_cast<std::size_t>(nk), 0);
    const auto critical = [](int i, int j) { return (3 * i + 5 * j) % 4 < 2; };
    for (int j = 0; j < nk; ++j) {
      for (int i = 0; i < nq; ++i) {
        if (critical(i, j)) indices[static_cast<std::size_t>(j * nq + counts[j]++)] = i;
      }
    }
    const BlockList list{indices.data(), counts.data(), nk, nq, block_k, block_q};
    for (int key = 0; key < length; key += kKeyBlock) {
      std::vector<int> seen(static_cast<std::size_t>(length), 0);
      const KeyBlocks blocks = KeyBlocksOfTile(list, length, 0, key);
      for (int unit = 0; unit < blocks.count; ++unit) {
        ASSERT_GT(blocks.Keys(unit), 0);
        for (int r = 0; r < blocks.Keys(unit); ++r) {
          ++seen[static_cast<std::size_t>(blocks.Start(unit) + r)];
        }
      }
      for (int query = 0; query < length; ++query) {
        EXPECT_EQ(seen[static_cast<std::size_t>(query)],
                  critical(query / block_q, key / block_k) ? 1 : 0)
            << "key tile " << key << " query " << query;
      }
    }
  }
}

// --- who waits for whom ---

struct Barrier {
  int arrivals, pending;
  std::uint32_t phase = 0;
  explicit Barrier(int count) : arrivals(count), pending(count) {}
  bool Passes(std::uint32_t parity) const { return phase != parity; }
  void Arrive() {
    if (--pending > 0) return;
    pending = arrivals;
    phase ^= 1;
  }
};

struct Step {
  enum class Kind { kWaitFull, kWaitEmpty, kLoad, kStartRead, kEndRead, kMeet };
  Kind kind;
  int stage = 0;
  std::uint32_t parity = 0;
  int tile = 0;
};
using Program = std::vector<Step>;
using Kind = Step::Kind;

struct State {
  std::vector<Barrier> full, empty;
  std::vector<std::vector<int>> tiles;  // by stage: what each loader brought last
  std::vector<int> readers;             // by stage: who is reading it
  int met = 0;                          // who has come to the meeting
  std::vector<std::size_t> at;
};

// All interleavings of `loaders` programs that fill stages and others that read them. Returns what
// goes wrong, or "".
std::string Explore(const std::vector<Program>& programs, int loaders, int stages,
                    int releases_per_stage) {
  const int consumers = static_cast<int>(programs.size()) - loaders;
  State start;
  start.full.assign(static_cast<std::size_t>(stages), Barrier(loaders));
  start.empty.assign(static_cast<std::size_t>(stages), Barrier(releases_per_stage));
  start.tiles.assign(static_cast<std::size_t>(stages),
                     std::vector<int>(static_cast<std::size_t>(loaders), -1));
  start.readers.assign(static_cast<std::size_t>(stages), 0);
  start.at.assign(programs.size(), 0);
  std::vector<State> open{start};
  std::set<std::vector<std::size_t>> seen{start.at};
  while (!open.empty()) {
    const State state = std::move(open.back());
    open.pop_back();
    bool moved = false, done = true;
    for (std::size_t who = 0; who < programs.size(); ++who) {
      if (state.at[who] == programs[who].size()) continue;
      done = false;
      State next = state;
      const Step& step = programs[who][state.at[who]];
      const auto stage = static_cast<std::size_t>(step.stage);
      if (step.kind == Kind::kWaitFull && !state.full[stage].Passes(step.parity)) continue;
      if (step.kind == Kind::kWaitEmpty && !state.empty[stage].Passes(step.parity)) continue;
      if (step.kind == Kind::kLoad) {
        if (state.readers[stage] > 0) return "a stage is overwritten while it is read";
        next.tiles[stage][who] = step.tile;
        next.full[stage].Arrive();
      }
      if (step.kind == Kind::kStartRead) {
        for (const int tile : state.tiles[stage]) {
          if (tile != step.tile) return "a stage does not hold its tile";
        }
        ++next.readers[stage];
      }
      if (step.kind == Kind::kEndRead) {
        --next.readers[stage];
        next.empty[stage].Arrive();
      }
      if (step.kind == Kind::kMeet) {
        // Each comes once before (tile 0) and goes on (tile 1) when all have come.
        if (step.tile == 0) ++next.met;
        if (step.tile == 1 && state.met < consumers) continue;
        for (const int readers : state.readers) {
          if (step.tile == 1 && readers > 0) return "sums are exchanged where tiles are still read";
        }
      }
      moved = true;
      ++next.at[who];
      if (seen.insert(next.at).second) open.push_back(std::move(next));
    }
    if (!moved && !done) return "all wait";
  }
  return "";
}

template <int kStages>
Program Loader(int tiles) {
  Program program;
  hopper::Ring<kStages> ring;
  for (int i = 0; i < tiles; ++i, ring.Next()) {
    program.push_back({Kind::kWaitEmpty, ring.stage, ring.parity ^ 1, i});
    program.push_back({Kind::kLoad, ring.stage, 0, i});
  }
  return program;
}

// Reads tiles group, group + groups, ...; a tile is let go of once the next one's products have
// begun, the last one at the end.
template <int kStages>
Program Reader(int tiles, int group, int groups, bool release_last) {
  Program program;
  hopper::Ring<kStages> ring;
  for (int i = 0; i < group; ++i) ring.Next();
  int last = -1, last_tile = -1;
  for (int i = group; i < tiles; i += groups) {
    program.push_back({Kind::kWaitFull, ring.stage, ring.parity, i});
    program.push_back({Kind::kStartRead, ring.stage, 0, i});
    if (last >= 0) program.push_back({Kind::kEndRead, last, 0, last_tile});
    last = ring.stage;
    last_tile = i;
    for (int g = 0; g < groups; ++g) ring.Next();
  }
  if (release_last && last >= 0) program.push_back({Kind::kEndRead, last, 0, last_tile});
  return program;
}

// d_q: every stage is read by every warpgroup.
TEST(GradientPipeline, Queries) {
  for (const int groups : {1, 2}) {
    for (int tiles = 1; tiles <= 9; ++tiles) {
      std::vector<Program> two{Loader<2>(tiles)}, four{Loader<4>(tiles)};
      for (int group = 0; group < groups; ++group) {
        two.push_back(Reader<2>(tiles, 0, 1, false));
        four.push_back(Reader<4>(tiles, 0, 1, false));
      }
      EXPECT_EQ(Explore(two, 1, 2, groups), "") << groups << " groups, " << tiles << " tiles";
      EXPECT_EQ(Explore(four, 1, 4, groups), "") << groups << " groups, " << tiles << " tiles";
    }
  }
}

// d_k and d_v: two loaders fill a stage (TMA, and a warp for lse and delta), one warpgroup reads
// it; at the end the sums are exchanged in the stages' memory.
TEST(GradientPipeline, Keys) {
  for (int tiles = 1; tiles <= 11; ++tiles) {
    std::vector<Program> programs{Loader<4>(tiles), Loader<4>(tiles)};
    for (int group = 0; group < 2; ++group) {
      programs.push_back(Reader<4>(tiles, group, 2, true));
      programs.back().push_back({Kind::kMeet, 0, 0, 0});
      programs.back().push_back({Kind::kMeet, 0, 0, 1});
    }
    EXPECT_EQ(Explore(programs, 2, 4, 1), "") << tiles << " tiles";
  }
}

// The exploration sees what it is meant to see.
TEST(GradientPipeline, FindsFaults) {
  Program early = Loader<2>(4);
  std::erase_if(early, [](const Step& step) { return step.kind == Kind::kWaitEmpty; });
  EXPECT_NE(Explore({early, Reader<2>(4, 0, 1, false)}, 1, 2, 1), "");
  EXPECT_EQ(Explore({Loader<2>(5), Reader<2>(5, 0, 1, false)}, 1, 2, 2), "all wait");
}

}  // namespace
}  // namespace slalom::cuda
