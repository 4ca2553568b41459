// How long a server that is told to stop waits for what its devices have made already.
#pragma once

#include <functional>

#include "scheduler/job.h"

namespace slalom {

struct DrainTimes {
  SchedulerClock::time_point at_least;  // so long in any case
  SchedulerClock::time_point deadline;  // and so long unless somebody is in a hurry
};

// Asks `settled`, which may wait a little, until it says yes: the encoders are done. False when the
// time was over first.
bool SettleUntil(const DrainTimes& times, const std::function<bool()>& settled,
                 const std::function<bool()>& hurry);

}  // namespace slalom
