#include "scheduler/placement.h"

#include <algorithm>
#include <bit>

namespace slalom {
namespace {

// How much sooner another device must be done to be waited for.
constexpr double kClearlyBetter = 0.9;

double Finish(const DeviceOffer& offer) { return offer.ahead_seconds + offer.own_seconds; }

}  // namespace

std::size_t Place(std::span<const DeviceOffer> offers, std::size_t here) {
  const auto best =
      static_cast<std::size_t>(std::min_element(offers.begin(), offers.end(),
                                                [](const DeviceOffer& a, const DeviceOffer& b) {
                                                  if (Finish(a) != Finish(b))
                                                    return Finish(a) < Finish(b);
                                                  return a.idle && !b.idle;
                                                }) -
                               offers.begin());
  if (best == here) return here;
  if (Finish(offers[best]) < kClearlyBetter * Finish(offers[here])) return best;
  return offers[best].idle && !offers[here].idle ? best : here;
}

void Forecast::AddBegun(int device, double seconds) {
  begun_[static_cast<std::size_t>(device)] += seconds;
  ++begun_jobs_[static_cast<std::size_t>(device)];
}

void Forecast::AddQueued(std::uint64_t devices, double seconds) {
  Sum& sum = queued_[devices];
  ++sum.jobs;
  sum.seconds += seconds;
}

Forecast::Sum Forecast::QueuedFor(std::uint64_t devices) const {
  Sum total;
  for (const auto& [set, sum] : queued_) {
    const int common = std::popcount(set & devices);
    if (common == 0) continue;
    total.jobs += sum.jobs;
    // The part of it that these devices will take.
    total.seconds += sum.seconds * common / std::popcount(set);
  }
  return total;
}

Forecast::Wait Forecast::ForQueued(std::uint64_t devices) const {
  Wait wait;
  std::vector<double> busy;
  for (std::size_t i = 0; i < begun_.size(); ++i) {
    if (((devices >> i) & 1) == 0) continue;
    busy.push_back(begun_[i]);
    wait.jobs += begun_jobs_[i];
  }
  const Sum queued = QueuedFor(devices);
  wait.jobs += queued.jobs;
  if (busy.empty()) return wait;
  // The queued work flows to whoever is free first, as water fills a vessel: how high does it rise?
  std::sort(busy.begin(), busy.end());
  double level = busy.front();
  double left = queued.seconds;
  for (std::size_t n = 1; left > 0; ++n) {
    const double room = n < busy.size() ? (busy[n] - level) * static_cast<double>(n) : left;
    const double poured = std::min(left, room);
    level += poured / static_cast<double>(n);
    left -= poured;
    if (n == busy.size()) break;
  }
  wait.seconds = level;
  return wait;
}

Forecast::Wait Forecast::ForBegun(int device) const {
  const auto index = static_cast<std::size_t>(device);
  const Sum queued = QueuedFor(std::uint64_t{1} << index);
  return {begun_jobs_[index] + queued.jobs, begun_[index] + queued.seconds};
}

}  // namespace slalom
