// A pipeline without a model: it sleeps, counts, fails on request and paints frames that can be
// recognised. For tests of whatever drives pipelines.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "model/pipeline.h"

namespace slalom {

// What the fake's pipelines did, in order, and a brake on them. Outlives them; thread-safe.
class FakeJournal {
 public:
  // One line per call: "begin PROMPT", "step PROMPT[+PROMPT...]", "decode PROMPT", "save PROMPT",
  // "restore PROMPT".
  std::vector<std::string> lines() const;
  std::size_t CountStartingWith(const std::string& prefix) const;

  // While held, calls of the pipeline stop after they have written their line.
  void Hold();
  // Holds from the moment when so many lines have begun with the prefix.
  void HoldAt(const std::string& prefix, std::size_t count);
  void Release();
  // Waits until so many lines start with the prefix. False when that takes too long.
  bool WaitFor(const std::string& prefix, std::size_t count = 1,
               std::chrono::milliseconds patience = std::chrono::seconds(10)) const;

  int live_generations() const;
  // Calls that overlapped on one device, or came from a second thread: must stay 0.
  int thread_violations() const;

 private:
  friend class FakePipeline;
  friend class FakeGeneration;
  void Write(const std::string& line);  // then waits while held
  std::size_t CountLocked(const std::string& prefix) const;

  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::vector<std::string> lines_;
  bool held_ = false;
  std::string hold_prefix_;
  std::size_t hold_count_ = 0;  // 0: no such order
  int live_generations_ = 0;
  int thread_violations_ = 0;
};

struct FakeOptions {
  std::string name = "fake";
  Device device;
  std::string description = "a fake device";
  std::chrono::microseconds begin_time{0};
  std::chrono::microseconds step_time{0};
  std::chrono::microseconds decode_time{0};  // of one DecodeNext
  int frames_per_decode = 4;                 // the first call gives 1, as a causal VAE does
  int max_batch = 1;
  bool lasting = false;  // deaf to "lost"
  ClipCost cost;         // what Estimate says
  MemoryStats memory;
  std::shared_ptr<FakeJournal> journal = std::make_shared<FakeJournal>();
};

// The prompt can carry orders, as words of the form WHAT@WHERE:
//   WHAT   oom (RESOURCE_EXHAUSTED), lost (UNAVAILABLE: the device is gone), error (INTERNAL),
//          throw (a std::runtime_error), nan (a StepFailure; only at steps)
//   WHERE  begin, stepN (the Nth step, from 1), decodeN (the Nth DecodeNext, from 1), preview,
//          batch (any step that is shared)
// for example "a red ball oom@step3".
//
// Resolve accepts sizes that are multiples of 16 up to 256, 4n+1 frames up to 65, 1 to 100 steps,
// prompts of up to 200 bytes, dense and SLA attention; the defaults are 64x48, 9 frames, 4 steps.
class FakePipeline : public Pipeline {
 public:
  explicit FakePipeline(FakeOptions options);
  ~FakePipeline() override;

  const ModelInfo& info() const override { return info_; }
  Device device() const override { return options_.device; }
  std::string device_description() const override { return options_.description; }
  MemoryStats Memory() const override { return options_.memory; }
  CacheStats PromptCacheUse() const override { return {}; }
  ClipSpec Resolve(const ClipRequest& request) const override;
  ClipCost Estimate(const ClipSpec& spec) const override { return options_.cost; }
  std::unique_ptr<Generation> Begin(const ClipSpec& spec) const override;
  std::vector<std::byte> Save(const Generation& generation) const override;
  std::unique_ptr<Generation> Restore(const ClipSpec& spec,
                                      std::span<const std::byte> checkpoint) const override;
  std::vector<StepFailure> DenoiseStep(std::span<Generation* const> batch) const override;
  int MaxBatch(const ClipSpec& spec) const override { return options_.max_batch; }
  FrameBatch DecodeNext(Generation& generation) const override;
  Tensor Preview(const Generation& generation) const override;

  // The colour of a pixel: red tells the frame, green and blue run from left to right and from top
  // to bottom.
  static std::array<std::uint8_t, 3> Pixel(const ClipSpec& spec, int frame, int x, int y);

 private:
  class Visit;

  const FakeOptions options_;
  ModelInfo info_;
  struct Occupancy;
  const std::unique_ptr<Occupancy> occupancy_;
};

}  // namespace slalom
