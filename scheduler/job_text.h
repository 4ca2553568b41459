// Words about jobs for error messages, and seconds.
#pragma once

#include <cstdio>
#include <string>

#include "scheduler/job.h"

namespace slalom {

inline double InSeconds(SchedulerClock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

inline std::string DescribeSeconds(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, seconds < 10 ? "%.1f s" : "%.0f s", seconds);
  return text;
}

}  // namespace slalom
