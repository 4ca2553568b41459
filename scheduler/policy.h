// Who runs next on a device. Pure functions of what they are shown: no threads, no clock, no
// device.
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
  Priority priority = Priority::kNormal;  // its class: JobQueue raises it for who has aged
  std::uint64_t sequence = 0;             // order of arrival, unique
  SchedulerClock::time_point arrival;
  std::optional<SchedulerClock::time_point> deadline;
  // Its place within its class: lower goes first. JobQueue::RankOf says what it is made of.
  double rank = 0;
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
  // What one more such clip adds to the seconds of a shared step, over cost.step_seconds: 1 when a
  // device gains nothing from larger batches.
  double marginal = 0.8;

  bool begun() const { return phase != Phase::kQueued; }
  // Its next piece of work would make frames that nobody takes.
  bool stalled() const {
    return (phase == Phase::kDenoised || phase == Phase::kDecoding) && !wants_frames;
  }
};

// How jobs are ordered. The defaults are the service's; others are there to compare with.
struct PolicyOrder {
  // Seconds of waiting that a job yields for each device second that it takes: a clip of a minute
  // lets pass what comes within `stretch` minutes and is small. 0: by arrival. Chosen with
  // tests/bench/simulate: RESULTS.md.
  double stretch = 60;
  // The same for each device second that its tenant has used more than others: tenants who always
  // have jobs waiting stay within (difference of their waits) / usage_stretch device seconds of
  // their shares. 0: tenants do not matter. At most `stretch`, or equals would take turns.
  double usage_stretch = 10;
  bool classes = true;  // priority comes before everything else
  // Jobs that have waited so long while higher classes had work get ageing_share of the device
  // seconds, the oldest first. 0 seconds: they wait on.
  double ageing_seconds = 3600;
  double ageing_share = 0.05;
};

struct PolicyLimits {
  int max_in_flight = 8;         // begun and not done, per device
  int max_decoding = 1;          // decoders whose client reads, per device
  int max_batch = 1;             // clips per denoising step
  std::size_t memory_bytes = 0;  // device memory for clips in flight; 0: no limit
  // Clips share a step when each more costs at most 1 - min_batch_gain of a step alone.
  double min_batch_gain = 0.1;
  PolicyOrder order;
};

// One bounded piece of device work.
struct Action {
  enum class Kind { kWait, kBegin, kDenoise, kDecode };
  Kind kind = Kind::kWait;
  std::vector<std::size_t> jobs;  // indices into the span given; several for kDenoise only
};

class Policy {
 public:
  // The next piece of work among `jobs`: all that this device has begun, and of the queued ones
  // that it could begin at least the first, and the first of each likely key that the begun ones
  // have (JobQueue finds them). The first job in order that can use the device gets it, and other
  // jobs join its step where that pays. A job whose deadline has passed gets nothing. Never plans
  // beyond the limits, except that a job which is alone on the device always runs.
  static Action Plan(std::span<const JobView> jobs, SchedulerClock::time_point now,
                     const PolicyLimits& limits);

  // True when a goes before b: class, then rank, then arrival.
  static bool Before(const JobView& a, const JobView& b);

  // A job's place by itself, in seconds of the scheduler's clock: when it came, plus what it yields
  // to smaller ones for the device seconds that it takes; its deadline when that is sooner.
  // `weight` is its tenant's share.
  static double BaseRank(SchedulerClock::time_point arrival, double device_seconds, double weight,
                         std::optional<SchedulerClock::time_point> deadline,
                         const PolicyOrder& order);

  // Device seconds that a job still needs.
  static double RemainingSeconds(const JobView& job);
  // The same over what a clip of so many steps needs in all: 1 at first, 0 at the end.
  static double FractionLeft(const JobView& job, int steps);
};

}  // namespace slalom
