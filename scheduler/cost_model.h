// CostModel: what device work will cost, learned from what it has cost.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "model/pipeline.h"
#include "scheduler/cost_fit.h"

namespace slalom {

enum class CostPhase { kBegin, kStep, kDecode };
inline constexpr int kNumCostPhases = 3;
const char* CostPhaseName(CostPhase phase);  // "begin", "step", "decode"

// How well one kind of work is predicted, over about the last hundred measurements.
struct CostError {
  std::string device;  // Pipeline::device_description
  std::string model;
  AttentionKind attention = AttentionKind::kDense;
  CostPhase phase = CostPhase::kStep;
  std::int64_t samples = 0;
  double mean_error = 0;  // of |measured - predicted| / measured
  double bias = 0;        // of (predicted - measured) / measured: above 0 when it says too much
};

// Starts from Pipeline::Estimate and corrects it by measurements. Per kind of device, model and
// attention it fits log(seconds) over log(operations): clips of sizes that were never seen are
// predicted from those that were, and what a size differs from the line is learned per size. The
// fit forgets slowly, so that it follows a device that changes, and no single outlier moves it far.
// Bytes are corrected upwards only: a prediction that was exceeded is raised.
//
// A state machine: no clock, no threads, no randomness.
class CostModel {
 public:
  // A kind of work: (device, model, attention). Devices with equal descriptions learn together.
  // The number is valid for this object; asking again gives the same.
  int Kind(const std::string& device, const std::string& model, AttentionKind attention);

  // `prior` is Pipeline::Estimate's for the clip, always: it names the clip's size.
  ClipCost Predict(int kind, const ClipCost& prior) const;
  // What each further clip adds to a shared step, over one alone.
  double Marginal(int kind, const ClipCost& prior) const;
  double StepSeconds(int kind, const ClipCost& prior, int batch) const;

  // What Begin, a DenoiseStep of `batch` such clips, or all of a clip's decoding took.
  void ObserveBegin(int kind, const ClipCost& prior, double seconds);
  void ObserveStep(int kind, const ClipCost& prior, int batch, double seconds);
  void ObserveDecode(int kind, const ClipCost& prior, double seconds);
  // What it held at its peak, beside what waits: `bytes` instead of the predicted ones.
  void ObserveBytes(int kind, CostPhase phase, double predicted, double bytes);
  // It did not fit although the prediction said so.
  void ObserveOutOfMemory(int kind, CostPhase phase);

  std::vector<CostError> Errors() const;

  // Everything learned, as a few kilobytes of text. Load takes it back, before or after Kind was
  // called; text that is damaged or of another version changes nothing and gives false.
  std::string Save() const;
  bool Load(const std::string& text);

 private:
  struct PhaseModel {
    CostFit fit;
    double bytes_scale = 1.0;
    std::int64_t samples = 0;
    double mean_error = 0;
    double bias = 0;
  };
  struct KindModel {
    std::string device;
    std::string model;
    AttentionKind attention = AttentionKind::kDense;
    std::array<PhaseModel, kNumCostPhases> phases;
    // By step work: sum of measured marginals and their number, bounded.
    std::map<double, std::pair<double, double>> marginals;
  };

  KindModel& At(int kind) { return kinds_[static_cast<std::size_t>(kind)]; }
  const KindModel& At(int kind) const { return kinds_[static_cast<std::size_t>(kind)]; }
  static PhaseModel& Phase(KindModel& kind, CostPhase phase) {
    return kind.phases[static_cast<std::size_t>(phase)];
  }
  static const PhaseModel& Phase(const KindModel& kind, CostPhase phase) {
    return kind.phases[static_cast<std::size_t>(phase)];
  }
  // Of that phase of work; before it has been measured, of the same work with another attention:
  // what that has of begin and decode is the same, and of steps it is nearer than an estimate.
  const PhaseModel& Nearest(const KindModel& kind, CostPhase phase) const;
  double Seconds(const KindModel& kind, CostPhase phase, double work, double prior_seconds) const;
  static void Observe(KindModel& kind, CostPhase phase, double work, double prior_seconds,
                      double predicted, double seconds, double alone_seconds);

  std::vector<KindModel> kinds_;
};

}  // namespace slalom
