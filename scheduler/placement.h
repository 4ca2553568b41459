// Several devices, one queue: on which device a job would be done first, and when. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

namespace slalom {

// What one device can offer a queued job.
struct DeviceOffer {
  double ahead_seconds = 0;  // predicted for what would go before the job there
  double own_seconds = 0;    // predicted for the job itself
  bool idle = false;         // it has nothing begun: it waits for work
};

// Which of the devices should begin the job, by predicted finish time, when device `here` asks for
// it. Predictions are not exact: another one must be clearly better, or equal and idle while `here`
// has other work. So equal devices never wait for each other, and a slow device leaves a job to a
// fast one that will be done with it earlier, even counting what the fast one has to do first.
std::size_t Place(std::span<const DeviceOffer> offers, std::size_t here);

// How long a job has to wait for what goes before it: begun jobs on their devices, queued ones on
// whichever of their devices is free first. Sets of devices are bits.
class Forecast {
 public:
  explicit Forecast(std::size_t devices) : begun_(devices), begun_jobs_(devices) {}

  // Jobs that go before the one asked about. Seconds: predicted, of one device.
  void AddBegun(int device, double seconds);
  void AddQueued(std::uint64_t devices, double seconds);

  struct Wait {
    int jobs = 0;
    double seconds = 0;
  };
  // For a queued job that any of these devices may run.
  Wait ForQueued(std::uint64_t devices) const;
  // For a job begun on that device.
  Wait ForBegun(int device) const;

 private:
  struct Sum {
    int jobs = 0;
    double seconds = 0;
  };
  Sum QueuedFor(std::uint64_t devices) const;

  std::vector<double> begun_;  // seconds, by device
  std::vector<int> begun_jobs_;
  std::map<std::uint64_t, Sum> queued_;  // by set of devices: few
};

}  // namespace slalom
