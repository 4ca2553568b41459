// Who runs next on a device. A pure function of what it is shown: no threads, no clock, no device.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>
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
  // Jobs with equal keys may share a batch. Of a queued job it is only a likely one.
  std::string batch_key;
  int max_batch = 1;         // the most that the pipeline steps at once for such clips
  bool alone = false;        // a batch with it failed: it is stepped by itself from then on
  bool wants_frames = true;  // its sink has room
  int steps_left = 0;
  double decode_left = 1.0;  // fraction of the frames
  ClipCost cost;
};

struct PolicyLimits {
  int max_in_flight = 8;         // begun and not done, per device
  int max_decoding = 2;          // decoders with a client that reads, per device
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

  // Seconds until jobs[index] is done, if `devices` equal devices serve all of `jobs` in order.
  static double SecondsUntilDone(std::span<const JobView> jobs, std::size_t index, int devices);
};

}  // namespace slalom
