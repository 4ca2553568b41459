#include "scheduler/cost_model.h"

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <limits>
#include <sstream>

namespace slalom {
namespace {

constexpr char kHeader[] = "slalom cost model 1";

// Until batches of a size have been measured they are worth trying: this many measurements weigh as
// much as the guess.
constexpr double kMarginalGuess = 0.8;
constexpr double kMarginalTrust = 4;
constexpr double kMarginalMemory = 30;
constexpr std::size_t kMaxMarginals = 64;
// A step alone must have been measured (the first weighs 0.2) before a shared one is compared with
// it.
constexpr double kAloneFirst = 0.1;

constexpr double kErrorMemory = 100;
constexpr double kOutOfMemoryStep = 1.25;
constexpr double kMaxBytesScale = 4;

// A guess of nothing cannot be corrected by a factor.
double Positive(double value) { return std::max(value, 1e-9); }
double WorkOf(double work, double seconds) { return work > 0 ? work : Positive(seconds); }

std::size_t Scaled(std::size_t bytes, double scale) {
  return scale == 1.0 ? bytes : static_cast<std::size_t>(static_cast<double>(bytes) * scale);
}

// Names are written between tabs.
bool Writable(const std::string& name) { return name.find_first_of("\t\n\r") == std::string::npos; }

}  // namespace

const char* CostPhaseName(CostPhase phase) {
  switch (phase) {
    case CostPhase::kBegin:
      return "begin";
    case CostPhase::kStep:
      return "step";
    case CostPhase::kDecode:
      return "decode";
  }
  return "unknown";
}

int CostModel::Kind(const std::string& device, const std::string& model, AttentionKind attention) {
  const auto found = std::find_if(kinds_.begin(), kinds_.end(), [&](const KindModel& kind) {
    return kind.device == device && kind.model == model && kind.attention == attention;
  });
  if (found != kinds_.end()) return static_cast<int>(found - kinds_.begin());
  KindModel kind;
  kind.device = device;
  kind.model = model;
  kind.attention = attention;
  kinds_.push_back(std::move(kind));
  return static_cast<int>(kinds_.size()) - 1;
}

const CostModel::PhaseModel& CostModel::Nearest(const KindModel& kind, CostPhase phase) const {
  const PhaseModel* nearest = &Phase(kind, phase);
  if (nearest->samples > 0) return *nearest;
  for (const KindModel& other : kinds_) {
    if (other.device != kind.device || other.model != kind.model) continue;
    if (Phase(other, phase).samples > nearest->samples) nearest = &Phase(other, phase);
  }
  return *nearest;
}

double CostModel::Seconds(const KindModel& kind, CostPhase phase, double work,
                          double prior_seconds) const {
  const PhaseModel& model = Nearest(kind, phase);
  if (model.samples == 0) return prior_seconds;
  return model.fit.Predict(WorkOf(work, prior_seconds), Positive(prior_seconds));
}

ClipCost CostModel::Predict(int number, const ClipCost& prior) const {
  const KindModel& kind = At(number);
  ClipCost cost = prior;
  cost.begin_seconds = Seconds(kind, CostPhase::kBegin, prior.begin_work, prior.begin_seconds);
  cost.step_seconds = Seconds(kind, CostPhase::kStep, prior.step_work, prior.step_seconds);
  cost.decode_seconds = Seconds(kind, CostPhase::kDecode, prior.decode_work, prior.decode_seconds);
  cost.waiting_bytes = Scaled(prior.waiting_bytes, Phase(kind, CostPhase::kBegin).bytes_scale);
  cost.step_bytes = Scaled(prior.step_bytes, Phase(kind, CostPhase::kStep).bytes_scale);
  cost.decode_bytes = Scaled(prior.decode_bytes, Phase(kind, CostPhase::kDecode).bytes_scale);
  return cost;
}

double CostModel::Marginal(int number, const ClipCost& prior) const {
  const KindModel& kind = At(number);
  const auto found = kind.marginals.find(WorkOf(prior.step_work, prior.step_seconds));
  if (found == kind.marginals.end()) return kMarginalGuess;
  const auto& [mean, count] = found->second;
  return (kMarginalTrust * kMarginalGuess + count * mean) / (kMarginalTrust + count);
}

double CostModel::StepSeconds(int number, const ClipCost& prior, int batch) const {
  const double alone = Seconds(At(number), CostPhase::kStep, prior.step_work, prior.step_seconds);
  return alone * (1.0 + (batch - 1) * Marginal(number, prior));
}

void CostModel::Observe(KindModel& kind, CostPhase phase, double work, double prior_seconds,
                        double predicted, double seconds, double alone_seconds) {
  if (!(seconds > 0) || !std::isfinite(seconds)) return;
  PhaseModel& model = Phase(kind, phase);
  const double rate = std::max(1.0 / kErrorMemory, 1.0 / static_cast<double>(model.samples + 1));
  const double error = (predicted - seconds) / seconds;
  model.mean_error += rate * (std::abs(error) - model.mean_error);
  model.bias += rate * (error - model.bias);
  ++model.samples;
  if (alone_seconds > 0) {
    model.fit.Add(WorkOf(work, prior_seconds), Positive(prior_seconds), alone_seconds);
  }
}

void CostModel::ObserveBegin(int number, const ClipCost& prior, double seconds) {
  KindModel& kind = At(number);
  const double predicted = Seconds(kind, CostPhase::kBegin, prior.begin_work, prior.begin_seconds);
  Observe(kind, CostPhase::kBegin, prior.begin_work, prior.begin_seconds, predicted, seconds,
          seconds);
}

void CostModel::ObserveDecode(int number, const ClipCost& prior, double seconds) {
  KindModel& kind = At(number);
  const double predicted =
      Seconds(kind, CostPhase::kDecode, prior.decode_work, prior.decode_seconds);
  Observe(kind, CostPhase::kDecode, prior.decode_work, prior.decode_seconds, predicted, seconds,
          seconds);
}

void CostModel::ObserveStep(int number, const ClipCost& prior, int batch, double seconds) {
  KindModel& kind = At(number);
  const double predicted = StepSeconds(number, prior, batch);
  const double work = WorkOf(prior.step_work, prior.step_seconds);
  double alone = seconds;
  if (batch > 1) {
    const double known = Phase(kind, CostPhase::kStep).fit.count(work);
    const double one = Seconds(kind, CostPhase::kStep, prior.step_work, prior.step_seconds);
    // A shared step that is faster than one alone was: that one was cold, or the device has
    // changed.
    if (known >= kAloneFirst && seconds >= one) {
      // How long one takes is known: what is new is what the others add.
      if (kind.marginals.size() >= kMaxMarginals && !kind.marginals.contains(work)) {
        kind.marginals.erase(kind.marginals.begin());
      }
      auto& [mean, count] = kind.marginals[work];
      const double measured = std::min((seconds / one - 1.0) / (batch - 1), 2.0);
      count = std::min(kMarginalMemory, count + 1);
      mean += (measured - mean) / count;
      alone = 0;
    } else {
      alone = seconds / (1.0 + (batch - 1) * Marginal(number, prior));
    }
  }
  Observe(kind, CostPhase::kStep, prior.step_work, prior.step_seconds, predicted, seconds, alone);
}

void CostModel::ObserveBytes(int number, CostPhase phase, double predicted, double bytes) {
  if (!(predicted > 0) || !(bytes > predicted)) return;
  double& scale = Phase(At(number), phase).bytes_scale;
  scale = std::min(kMaxBytesScale, scale * bytes / predicted);
}

void CostModel::ObserveOutOfMemory(int number, CostPhase phase) {
  double& scale = Phase(At(number), phase).bytes_scale;
  scale = std::min(kMaxBytesScale, scale * kOutOfMemoryStep);
}

std::vector<CostError> CostModel::Errors() const {
  std::vector<CostError> errors;
  for (const KindModel& kind : kinds_) {
    for (int p = 0; p < kNumCostPhases; ++p) {
      const PhaseModel& model = kind.phases[static_cast<std::size_t>(p)];
      if (model.samples == 0) continue;
      errors.push_back({kind.device, kind.model, kind.attention, static_cast<CostPhase>(p),
                        model.samples, model.mean_error, model.bias});
    }
  }
  return errors;
}

std::string CostModel::Save() const {
  std::ostringstream out;
  out << std::setprecision(std::numeric_limits<double>::max_digits10) << kHeader << '\n';
  for (const KindModel& kind : kinds_) {
    if (!Writable(kind.device) || !Writable(kind.model)) continue;
    out << kind.device << '\t' << kind.model << '\t' << static_cast<int>(kind.attention) << '\n';
    for (const PhaseModel& model : kind.phases) {
      out << model.bytes_scale << ' ' << model.samples << ' ' << model.mean_error << ' '
          << model.bias << ' ';
      model.fit.Write(out);
    }
    out << kind.marginals.size();
    for (const auto& [work, sum] : kind.marginals) {
      out << ' ' << work << ' ' << sum.first << ' ' << sum.second;
    }
    out << '\n';
  }
  out << "end\n";
  return out.str();
}

bool CostModel::Load(const std::string& text) {
  std::istringstream in(text);
  std::string line;
  if (!std::getline(in, line) || line != kHeader) return false;
  std::vector<KindModel> loaded;
  while (std::getline(in, line) && line != "end") {
    KindModel kind;
    std::istringstream names(line);
    int attention = -1;
    std::getline(names, kind.device, '\t');
    std::getline(names, kind.model, '\t');
    if (!(names >> attention) || attention < 0 || attention > 2) return false;
    kind.attention = static_cast<AttentionKind>(attention);
    for (PhaseModel& model : kind.phases) {
      in >> model.bytes_scale >> model.samples >> model.mean_error >> model.bias;
      if (!in || !(model.bytes_scale >= 1.0) || model.bytes_scale > kMaxBytesScale) return false;
      if (model.samples < 0 || !model.fit.Read(in)) return false;
    }
    std::size_t marginals = 0;
    if (!(in >> marginals) || marginals > kMaxMarginals) return false;
    for (std::size_t i = 0; i < marginals; ++i) {
      double work = 0;
      std::pair<double, double> sum;
      if (!(in >> work >> sum.first >> sum.second)) return false;
      kind.marginals[work] = sum;
    }
    in.ignore(1);
    loaded.push_back(std::move(kind));
  }
  if (line != "end") return false;
  // Numbers that Kind has given out stay as they are.
  for (KindModel& kind : loaded) {
    const int number = Kind(kind.device, kind.model, kind.attention);
    At(number) = std::move(kind);
  }
  return true;
}

}  // namespace slalom
