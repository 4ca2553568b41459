// The order in which the Hopper kernels' producer and consumers wait for each other, followed
// through every interleaving for small numbers of tiles: nobody waits for ever, nobody reads a
// stage that holds another tile, nothing is overwritten before all have read it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "kernels/cuda/hopper/ring.h"

namespace slalom::cuda {
namespace {

using hopper::Ring;

// An mbarrier: a wait for a parity passes once the phase of that parity is over.
struct Barrier {
  int arrivals = 1;
  int pending = 1;
  std::uint32_t phase = 0;

  explicit Barrier(int count = 1) : arrivals(count), pending(count) {}
  bool Passes(std::uint32_t parity) const { return phase != parity; }
  void Arrive() {
    if (--pending > 0) return;
    pending = arrivals;
    phase ^= 1;
  }
};

struct Step {
  enum class Kind { kWait, kLoad, kRead, kRelease, kSync, kPass };
  Kind kind;
  int stage = 0;  // of the pipeline, or the named barrier
  std::uint32_t parity = 0;
  int tile = 0;
  bool values = false;  // which of two pipelines: K or V
};
using Program = std::vector<Step>;

// One pipeline: stages with a full and an empty barrier each.
struct Pipeline {
  std::vector<Barrier> full, empty;
  std::vector<int> tile;

  Pipeline(int stages, int readers)
      : full(stages, Barrier(1)), empty(stages, Barrier(readers)), tile(stages, -1) {}
};

// A named barrier of two: one comes and waits, the other only passes by.
struct Turn {
  bool passed = false;
};

struct State {
  std::vector<Pipeline> pipelines;
  std::vector<Turn> turns;
  std::vector<std::size_t> at;  // the next step of each program
};

class Exploration {
 public:
  // The first programs are producers.
  Exploration(std::vector<Program> programs, int stages, int readers, std::size_t producers = 1)
      : programs_(std::move(programs)), producers_(producers) {
    State start;
    start.pipelines.assign(2, Pipeline(stages, readers));
    start.turns.resize(2);
    start.at.assign(programs_.size(), 0);
    Visit(std::move(start));
  }
  const std::string& fault() const { return fault_; }

 private:
  void Visit(State start) {
    std::vector<State> open{std::move(start)};
    std::set<std::vector<std::size_t>> seen{open.front().at};
    while (!open.empty() && fault_.empty()) {
      const State state = std::move(open.back());
      open.pop_back();
      bool moved = false, done = true;
      for (std::size_t who = 0; who < programs_.size(); ++who) {
        if (state.at[who] == programs_[who].size()) continue;
        done = false;
        State next = state;
        if (!Run(next, programs_[who][state.at[who]], who < producers_)) continue;
        moved = true;
        ++next.at[who];
        if (seen.insert(next.at).second) open.push_back(std::move(next));
      }
      if (!moved && !done) fault_ = "all wait";
    }
  }

  // False when the step has to wait.
  bool Run(State& state, const Step& step, bool producer) {
    Pipeline& pipeline = state.pipelines[step.values ? 1 : 0];
    switch (step.kind) {
      case Step::Kind::kWait: {
        auto& barriers = producer ? pipeline.empty : pipeline.full;
        return barriers[step.stage].Passes(step.parity);
      }
      case Step::Kind::kLoad:
        pipeline.tile[step.stage] = step.tile;
        pipeline.full[step.stage].Arrive();
        return true;
      case Step::Kind::kRead:  // the moment at which the products are finished
        if (pipeline.tile[step.stage] != step.tile) fault_ = "a stage holds another tile";
        return true;
      case Step::Kind::kRelease:
        pipeline.empty[step.stage].Arrive();
        return true;
      case Step::Kind::kSync:
        if (!state.turns[step.stage].passed) return false;
        state.turns[step.stage].passed = false;
        return true;
      case Step::Kind::kPass:
        if (state.turns[step.stage].passed) fault_ = "a turn is passed twice";
        state.turns[step.stage].passed = true;
        return true;
    }
    return false;
  }

  std::vector<Program> programs_;
  std::size_t producers_;
  std::string fault_;
};

constexpr int kAttentionStages = 2;

// What a block of threads does for one tile of queries: that many tiles of keys, and then `parts`
// of the linear branch's matrices in the stages of V. Loads are numbered through all of a block's.
struct QueryTile {
  int tiles, parts = 0;
};

struct AttentionProducer {
  Program program = {};
  Ring<kAttentionStages> k_ring = {}, v_ring = {};
  int keys_loaded = 0, values_loaded = 0;

  void Load(bool values) {
    auto& ring = values ? v_ring : k_ring;
    int& number = values ? values_loaded : keys_loaded;
    program.push_back({Step::Kind::kWait, ring.stage, ring.parity ^ 1, number, values});
    program.push_back({Step::Kind::kLoad, ring.stage, 0, number++, values});
    ring.Next();
  }
  void Bring(const QueryTile& query) {
    for (int tile = 0; tile < query.tiles; ++tile) {
      Load(false);
      Load(true);
    }
    for (int part = 0; part < query.parts; ++part) Load(true);
  }
};

struct AttentionConsumer {
  int group, groups;
  Program program = {};
  Ring<kAttentionStages> k_ring = {}, v_ring = {};
  int keys_read = 0, values_read = 0;

  void Turn(Step::Kind kind, int whose) {
    if (groups == 2) program.push_back({kind, whose});
  }
  void Wait(bool values) {
    const auto& ring = values ? v_ring : k_ring;
    program.push_back({Step::Kind::kWait, ring.stage, ring.parity, 0, values});
  }
  void Finish(bool values) {
    auto& ring = values ? v_ring : k_ring;
    int& number = values ? values_read : keys_read;
    program.push_back({Step::Kind::kRead, ring.stage, 0, number++, values});
    program.push_back({Step::Kind::kRelease, ring.stage, 0, 0, values});
    ring.Next();
  }
  void Begin() {
    if (group == 1) Turn(Step::Kind::kPass, 0);
  }
  void Run(int tiles) {
    for (int tile = tiles - 1; tiles > 0 && tile >= -1; --tile) {
      Turn(Step::Kind::kSync, group);
      if (tile >= 0) Wait(false);
      if (tile < tiles - 1) Wait(true);
      Turn(Step::Kind::kPass, 1 - group);
      if (tile >= 0) Finish(false);
      if (tile < tiles - 1) Finish(true);
    }
  }
  // `at_once` parts are waited for, multiplied and given back together.
  void Mix(int parts, int at_once) {
    for (int first = 0; first < parts; first += at_once) {
      Ring<kAttentionStages> ring = v_ring;
      for (int i = 0; i < at_once; ++i, ring.Next()) {
        program.push_back({Step::Kind::kWait, ring.stage, ring.parity, 0, true});
      }
      for (int i = 0; i < at_once; ++i) Finish(true);
    }
  }
  void End() {
    if (group == 0) Turn(Step::Kind::kSync, 0);
  }
};

// The programs of a block that has these tiles of queries, one after the other.
std::vector<Program> AttentionBlock(const std::vector<QueryTile>& queries, int groups,
                                    int at_once = 1) {
  AttentionProducer producer;
  for (const QueryTile& query : queries) producer.Bring(query);
  std::vector<Program> programs{producer.program};
  for (int group = 0; group < groups; ++group) {
    AttentionConsumer consumer{group, groups};
    consumer.Begin();
    for (const QueryTile& query : queries) {
      consumer.Run(query.tiles);
      consumer.Mix(query.parts, at_once);
    }
    consumer.End();
    programs.push_back(consumer.program);
  }
  return programs;
}

TEST(Pipeline, Attention) {
  for (const int groups : {1, 2}) {
    for (int tiles = 1; tiles <= 7; ++tiles) {
      for (int next = 0; next <= 3; ++next) {
        const Exploration exploration(AttentionBlock({{tiles}, {next}, {1}}, groups),
                                      kAttentionStages, groups);
        EXPECT_EQ(exploration.fault(), "")
            << groups << " consumers, " << tiles << " tiles and " << next;
      }
    }
  }
}

TEST(Pipeline, AttentionWithLinearBranch) {
  for (const int groups : {1, 2}) {
    for (int tiles = 0; tiles <= 5; ++tiles) {
      for (const int at_once : {1, 2}) {
        for (const int matrices : {1, 2}) {
          const int parts = matrices * at_once;
          const Exploration exploration(
              AttentionBlock({{tiles, parts}, {2, parts}, {0, parts}}, groups, at_once),
              kAttentionStages, groups);
          EXPECT_EQ(exploration.fault(), "") << groups << " consumers, " << tiles << " tiles, "
                                             << parts << " parts, " << at_once << " at once";
        }
      }
    }
  }
}

constexpr int kLinearStages = 2;

// Sums of feature(K)^T V, `per_state` tiles each: a stage is given back when the product after its
// own has been started, or with the state.
Program StatesConsumer(int tiles, int per_state) {
  Program program;
  Ring<kLinearStages> ring;
  const auto finish = [&](int stage, int tile) {
    program.push_back({Step::Kind::kRead, stage, 0, tile, false});
    program.push_back({Step::Kind::kRelease, stage, 0, 0, false});
  };
  for (int done = 0; done < tiles; done += per_state) {
    const int last = std::min(per_state, tiles - done) - 1;
    for (int i = 0; i <= last; ++i) {
      const int multiplied = ring.stage;
      if (i > 0) ring.Next();
      program.push_back({Step::Kind::kWait, ring.stage, ring.parity, 0, false});
      if (i > 0) finish(multiplied, done + i - 1);
    }
    finish(ring.stage, done + last);
    ring.Next();
  }
  return program;
}

TEST(Pipeline, LinearStates) {
  for (int tiles = 1; tiles <= 7; ++tiles) {
    Program producer;
    Ring<kLinearStages> ring;
    for (int tile = 0; tile < tiles; ++tile, ring.Next()) {
      producer.push_back({Step::Kind::kWait, ring.stage, ring.parity ^ 1, tile, false});
      producer.push_back({Step::Kind::kLoad, ring.stage, 0, tile, false});
    }
    for (const int per_state : {1, 2, 7}) {
      const Program consumer = StatesConsumer(tiles, per_state);
      const Exploration exploration({producer, consumer, consumer}, kLinearStages, 2);
      EXPECT_EQ(exploration.fault(), "") << tiles << " tiles, " << per_state << " per state";
    }
  }
}

constexpr int kConvolutionStages = 2;  // of patches, and of weights

// The producer of patches, or the one of weights.
Program ConvolutionProducer(int count, bool weights) {
  Program program;
  Ring<kConvolutionStages> ring;
  for (int i = 0; i < count; ++i, ring.Next()) {
    program.push_back({Step::Kind::kWait, ring.stage, ring.parity ^ 1, i, weights});
    program.push_back({Step::Kind::kLoad, ring.stage, 0, i, weights});
  }
  return program;
}

// Stages are given back when the product after theirs has been started.
Program ConvolutionConsumer(int patches, int taps) {
  Program program;
  Ring<kConvolutionStages> patch_ring, weight_ring;
  int done_patch = -1, done_weight = -1;
  for (int patch = 0; patch < patches; ++patch, patch_ring.Next()) {
    program.push_back({Step::Kind::kWait, patch_ring.stage, patch_ring.parity, 0, false});
    for (int tap = 0; tap < taps; ++tap, weight_ring.Next()) {
      const int product = patch * taps + tap;
      program.push_back({Step::Kind::kWait, weight_ring.stage, weight_ring.parity, 0, true});
      if (product > 0) {
        const int before = (product - 1) / taps;
        program.push_back({Step::Kind::kRead, before % kConvolutionStages, 0, before, false});
        program.push_back({Step::Kind::kRead, done_weight, 0, product - 1, true});
        program.push_back({Step::Kind::kRelease, done_weight, 0, 0, true});
      }
      if (done_patch >= 0) program.push_back({Step::Kind::kRelease, done_patch, 0, 0, false});
      done_patch = -1;
      done_weight = weight_ring.stage;
    }
    done_patch = patch_ring.stage;
  }
  program.push_back({Step::Kind::kRead, done_patch, 0, patches - 1, false});
  program.push_back({Step::Kind::kRead, done_weight, 0, patches * taps - 1, true});
  return program;
}

TEST(Pipeline, Convolution) {
  for (const int taps : {1, 3}) {
    for (int patches = 1; patches <= 5; ++patches) {
      const Program consumer = ConvolutionConsumer(patches, taps);
      const Exploration exploration({ConvolutionProducer(patches, false),
                                     ConvolutionProducer(patches * taps, true), consumer, consumer},
                                    kConvolutionStages, 2, 2);
      EXPECT_EQ(exploration.fault(), "") << patches << " patches, " << taps << " taps";
    }
  }
}

// The exploration itself: barriers that count a reader too few or too many are found out.
TEST(Pipeline, FindsFaults) {
  const auto fault = [](int readers) {
    return Exploration(AttentionBlock({{5}}, 2), kAttentionStages, readers).fault();
  };
  EXPECT_NE(fault(1), "");
  EXPECT_EQ(fault(3), "all wait");
}

}  // namespace
}  // namespace slalom::cuda
