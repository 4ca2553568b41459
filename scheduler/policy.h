// Who runs next on a device. A pure function of what it is shown: no threads, no clock, no device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "model/pipeline.h"
#include "scheduler/job.h"

namespace slalom {

// What the policy sees of a job that its worker may run.
struct JobView {
  enum class Phase {
    kQueued,    // owns nothing on the device
    kStepping,  // begun, steps left to do
    kDenoised,  // all steps done, the decoder not yet started: as cheap as a waiting job
    kDecoding,  // holds decoder state
  };
  Phase phase = Phase::kQueued;
  Priority priority = Priority::kNormal;
  std::uint64_t sequence = 0;  // order of arrival, unique
  std::optional<SchedulerClock::time_point> deadline;
  // Begun jobs with equal batch keys may share a step. Which jobs will have equal ones is guessed
  // from their specs before they have begun: equal likely keys.
  std::string_view batch_key;
  std::string_view likely_key;
  int max_batch = 1;         // the most that the pipeline steps at once for such clips
  bool alone = false;        // a batch with it failed: it is stepped by itself from then on
  bool wants_frames = true;  // its sink has room
  int steps_left = 0;
  double decode_left = 1.0;  // fraction of the frames
  ClipCost cost;

  bool begun() const { return phase != Phase::kQueued; }
  // Its next piece of work would make frames that nobody takes.
  bool stalled() const {
    return (phase == Phase::kDenoised || phase == Phase::kDecoding) && !wants_frames;
  }
};

struct PolicyLimits {
  int max_in_flight = 8;         // begun and not done, per device
  int max_decoding = 1;          // decoders whose client reads, per device
  int max_batch = 1;             // clips per denoising step
  std::size_t memory_bytes = 0;  // device memory for clips in flight; 0: no limit
};

// One bounded piece of device work.
struct Action {
  enum class Kind { kWait, kBegin, kDenoise, kDecode };
  Kind kind = Kind::kWait;
  std::vector<std::size_t> jobs;  // indices into the span given; several for kDenoise only
};

class Policy {
 public:
  // The next piece of work among `jobs`: those that this device has begun and the queued ones that
  // it could begin. The order is priority, then arrival; the first job that can use the device
  // gets it, and other jobs join its step where batching helps. A job whose deadline has passed
  // gets nothing. Never plans beyond the limits, except that a job which is alone on the device
  // always runs.
  static Action Plan(std::span<const JobView> jobs, SchedulerClock::time_point now,
                     const PolicyLimits& limits);

  // True when a goes before b.
  static bool Before(const JobView& a, const JobView& b);

  // Device seconds that a job still needs.
  static double RemainingSeconds(const JobView& job);
};

}  // namespace slalom
