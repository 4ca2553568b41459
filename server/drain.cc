#include "server/drain.h"

namespace slalom {

bool SettleUntil(const DrainTimes& times, const std::function<bool()>& settled,
                 const std::function<bool()>& hurry) {
  while (!settled()) {
    const auto now = SchedulerClock::now();
    if (now >= times.at_least && (now >= times.deadline || hurry())) return false;
  }
  return true;
}

}  // namespace slalom
