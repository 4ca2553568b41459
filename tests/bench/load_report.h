// The latency report of a load generator.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "tests/bench/load_call.h"
#include "tests/bench/load_mix.h"

namespace slalom::bench {

struct Percentiles {
  double p50 = 0;
  double p95 = 0;
  double p99 = 0;
  double max = 0;
};
// Of the nearest rank; all 0 without values.
Percentiles PercentilesOf(std::vector<double> values);

struct ClassReport {
  std::string name;
  int calls = 0;
  int disconnected = 0;              // on purpose
  std::map<std::string, int> codes;  // of the others
  // Seconds, of the calls that ended well.
  Percentiles accepted;
  Percentiles first_byte;
  Percentiles total;
};

struct LoadReport {
  std::vector<ClassReport> classes;  // as in the mix; then "all", when there are several
  double seconds = 0;
  double completed_per_second = 0;
  double server_mib_before = 0;  // resident; 0: not asked for
  double server_mib_peak = 0;
  int server_threads_peak = 0;
};

LoadReport MakeReport(const std::vector<LoadClass>& mix, const std::vector<CallResult>& results,
                      double seconds);
std::string ToTable(const LoadReport& report);
std::string ToJson(const LoadReport& report);

}  // namespace slalom::bench
