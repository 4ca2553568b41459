#include "scheduler/cost_fit.h"

#include <algorithm>
#include <cmath>
#include <istream>
#include <ostream>

namespace slalom {
namespace {

// How many measurements the line and a cell remember: enough to average noise, few enough to follow
// a device whose load changes.
constexpr double kLineMemory = 60;
constexpr double kCellMemory = 20;
// The first run of anything also pays for what is prepared once.
constexpr double kFirstWeight = 0.2;
// What the slope's nearness to 1 is worth, as a sum of squares of log(work).
constexpr double kSlopeTrust = 2.0;
// The guess is only there to be corrected: it may be off by orders of magnitude.
constexpr double kPriorWeight = 0.001;
// A cell with this many measurements is believed by half; they fade while others come.
constexpr double kCellTrust = 0.5;
constexpr double kCellFades = 200;
// Beyond so many mean deviations a measurement is pulled in.
constexpr double kFar = 3.0;
constexpr double kSpreadRate = 0.1;
constexpr double kLeastSpread = 0.01;
constexpr double kCalmAfter = 4;  // measurements before any is called an outlier
constexpr std::size_t kMaxCells = 64;

}  // namespace

double CostFit::Slope() const { return (kSlopeTrust + sum_xy_) / (kSlopeTrust + sum_xx_); }

double CostFit::Line(double x) const { return mean_y_ + Slope() * (x - mean_x_); }

double CostFit::Trust(const Cell& cell) const {
  const double count = cell.count * std::exp((cell.last - seen_) / kCellFades);
  return count / (count + kCellTrust);
}

double CostFit::Predict(double work, double prior_seconds) const {
  const double prior = std::log(prior_seconds);
  if (weight_ <= 0) return prior_seconds;
  const double x = std::log(work);
  double y = (weight_ * Line(x) + kPriorWeight * prior) / (weight_ + kPriorWeight);
  if (const auto cell = cells_.find(work); cell != cells_.end()) {
    y += Trust(cell->second) * (cell->second.mean - y);
  }
  return std::exp(y);
}

void CostFit::Add(double work, double prior_seconds, double seconds) {
  if (!(work > 0) || !(seconds > 0) || !(prior_seconds > 0)) return;
  if (!std::isfinite(work) || !std::isfinite(seconds) || !std::isfinite(prior_seconds)) return;
  const double x = std::log(work);
  double y = std::log(seconds);
  if (seen_ > 0) {
    const double predicted = std::log(Predict(work, prior_seconds));
    const double off = y - predicted;
    if (seen_ >= kCalmAfter) {
      y = predicted + std::clamp(off, -kFar * spread_, kFar * spread_);
    }
    const double off_at_most = std::min(std::abs(off), 2 * kFar * spread_);
    spread_ = std::max(kLeastSpread, spread_ + kSpreadRate * (off_at_most - spread_));
  }

  const double added = seen_ == 0 ? kFirstWeight : 1.0;
  const double keep = weight_ + added > kLineMemory ? 1.0 - 1.0 / kLineMemory : 1.0;
  weight_ = weight_ * keep + added;
  const double dx = x - mean_x_;
  const double dy = y - mean_y_;
  const double rate = added / weight_;
  mean_x_ += rate * dx;
  mean_y_ += rate * dy;
  sum_xx_ = keep * sum_xx_ + added * (1 - rate) * dx * dx;
  sum_xy_ = keep * sum_xy_ + added * (1 - rate) * dx * dy;

  if (cells_.size() >= kMaxCells && !cells_.contains(work)) {
    cells_.erase(std::min_element(cells_.begin(), cells_.end(), [](const auto& a, const auto& b) {
      return a.second.count < b.second.count;
    }));
  }
  Cell& cell = cells_[work];
  cell.count = std::min(kCellMemory, cell.count + added);
  cell.mean += added / cell.count * (y - cell.mean);
  seen_ = std::min(1e9, seen_ + 1);
  cell.last = seen_;
}

double CostFit::count(double work) const {
  const auto cell = cells_.find(work);
  return cell == cells_.end() ? 0.0 : cell->second.count;
}

void CostFit::Write(std::ostream& out) const {
  out << weight_ << ' ' << mean_x_ << ' ' << mean_y_ << ' ' << sum_xx_ << ' ' << sum_xy_ << ' '
      << spread_ << ' ' << seen_ << ' ' << cells_.size();
  for (const auto& [work, cell] : cells_) {
    out << ' ' << work << ' ' << cell.count << ' ' << cell.mean << ' ' << cell.last;
  }
  out << '\n';
}

bool CostFit::Read(std::istream& in) {
  std::size_t cells = 0;
  in >> weight_ >> mean_x_ >> mean_y_ >> sum_xx_ >> sum_xy_ >> spread_ >> seen_ >> cells;
  if (!in || cells > kMaxCells || weight_ < 0 || sum_xx_ < 0 || spread_ < kLeastSpread) {
    return false;
  }
  cells_.clear();
  for (std::size_t i = 0; i < cells; ++i) {
    double work = 0;
    Cell cell;
    in >> work >> cell.count >> cell.mean >> cell.last;
    if (!in || !(work > 0) || !(cell.count >= 0)) return false;
    cells_[work] = cell;
  }
  return true;
}

}  // namespace slalom
