// The order in which the Hopper kernels' producer and consumers wait for each other, followed
// through every interleaving for small numbers of tiles: nobody waits for ever, nobody reads a
// stage that holds another tile, nothing is overwritten before all have read it.
#include <gtest/gtest.h>

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
  Exploration(std::vector<Program> programs, int stages, int readers)
      : programs_(std::move(programs)) {
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
        if (!Run(next, programs_[who][state.at[who]], who == 0)) continue;
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
  std::string fault_;
};

constexpr int kAttentionStages = 2;

Program AttentionProducer(int tiles) {
  Program program;
  Ring<kAttentionStages> ring;
  for (int tile = tiles - 1; tile >= 0; --tile, ring.Next()) {
    for (const bool values : {false, true}) {
      program.push_back({Step::Kind::kWait, ring.stage, ring.parity ^ 1, tile, values});
      program.push_back({Step::Kind::kLoad, ring.stage, 0, tile, values});
    }
  }
  return program;
}

struct AttentionConsumer {
  int group, groups;
  Program program;
  Ring<kAttentionStages> k_ring, v_ring;

  void Turn(Step::Kind kind, int whose) {
    if (groups == 2) program.push_back({kind, whose});
  }
  void Wait(bool values) {
    const auto& ring = values ? v_ring : k_ring;
    program.push_back({Step::Kind::kWait, ring.stage, ring.parity, 0, values});
  }
  void Finish(bool values, int tile) {
    auto& ring = values ? v_ring : k_ring;
    program.push_back({Step::Kind::kRead, ring.stage, 0, tile, values});
    program.push_back({Step::Kind::kRelease, ring.stage, 0, 0, values});
    ring.Next();
  }
  void Run(int tiles) {
    if (group == 1) Turn(Step::Kind::kPass, 0);
    for (int tile = tiles - 1; tile >= -1; --tile) {
      Turn(Step::Kind::kSync, group);
      if (tile >= 0) Wait(false);
      if (tile < tiles - 1) Wait(true);
      Turn(Step::Kind::kPass, 1 - group);
      if (tile >= 0) Finish(false, tile);
      if (tile < tiles - 1) Finish(true, tile + 1);
    }
    if (group == 0) Turn(Step::Kind::kSync, 0);
  }
};

TEST(Pipeline, Attention) {
  for (const int groups : {1, 2}) {
    for (int tiles = 1; tiles <= 7; ++tiles) {
      std::vector<Program> programs{AttentionProducer(tiles)};
      for (int group = 0; group < groups; ++group) {
        AttentionConsumer consumer{group, groups, {}, {}, {}};
        consumer.Run(tiles);
        programs.push_back(consumer.program);
      }
      const Exploration exploration(programs, kAttentionStages, groups);
      EXPECT_EQ(exploration.fault(), "") << groups << " consumers, " << tiles << " tiles";
    }
  }
}

TEST(Pipeline, Convolution) {
  constexpr int kStages = 3;
  for (int count = 1; count <= 10; ++count) {
    Program producer, consumer;
    Ring<kStages> in, out, released;
    for (int i = 0; i < count; ++i, in.Next()) {
      producer.push_back({Step::Kind::kWait, in.stage, in.parity ^ 1});
      producer.push_back({Step::Kind::kLoad, in.stage, 0, i});
    }
    for (int i = 0; i < count; ++i, out.Next()) {
      consumer.push_back({Step::Kind::kWait, out.stage, out.parity});
      if (i == 0) continue;
      consumer.push_back({Step::Kind::kRead, released.stage, 0, i - 1});
      consumer.push_back({Step::Kind::kRelease, released.stage});
      released.Next();
    }
    consumer.push_back({Step::Kind::kRead, released.stage, 0, count - 1});
    EXPECT_EQ(Exploration({producer, consumer, consumer}, kStages, 2).fault(), "")
        << count << " stages of work";
  }
}

// The exploration itself: barriers that count a reader too few or too many are found out.
TEST(Pipeline, FindsFaults) {
  const auto fault = [](int readers) {
    std::vector<Program> programs{AttentionProducer(5)};
    for (int group = 0; group < 2; ++group) {
      AttentionConsumer consumer{group, 2, {}, {}, {}};
      consumer.Run(5);
      programs.push_back(consumer.program);
    }
    return Exploration(programs, kAttentionStages, readers).fault();
  };
  EXPECT_NE(fault(1), "");
  EXPECT_EQ(fault(3), "all wait");
}

}  // namespace
}  // namespace slalom::cuda
