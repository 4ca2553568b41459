#include "tests/bench/load_report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "kernels/core/error.h"

namespace slalom::bench {
namespace {

ClassReport Summarize(const std::string& name, const std::vector<const CallResult*>& results) {
  ClassReport report;
  report.name = name;
  std::vector<double> accepted;
  std::vector<double> first_byte;
  std::vector<double> total;
  for (const CallResult* result : results) {
    ++report.calls;
    if (result->disconnected) {
      ++report.disconnected;
      continue;
    }
    const bool good = result->code == 0;
    ++report.codes[good ? "OK" : ErrorCodeName(static_cast<ErrorCode>(result->code))];
    if (!good) continue;
    accepted.push_back(result->accepted);
    first_byte.push_back(result->first_byte);
    total.push_back(result->total);
  }
  report.accepted = PercentilesOf(std::move(accepted));
  report.first_byte = PercentilesOf(std::move(first_byte));
  report.total = PercentilesOf(std::move(total));
  return report;
}

nlohmann::json Json(const Percentiles& p) {
  return {{"p50", p.p50}, {"p95", p.p95}, {"p99", p.p99}, {"max", p.max}};
}

std::string Row(const ClassReport& report, const char* what, const Percentiles& p) {
  char line[160];
  std::snprintf(line, sizeof(line), "%-12s %-11s %9.3f %9.3f %9.3f %9.3f\n", report.name.c_str(),
                what, p.p50, p.p95, p.p99, p.max);
  return line;
}

}  // namespace

Percentiles PercentilesOf(std::vector<double> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    const double rank = std::ceil(share * static_cast<double>(values.size()));
    return values[static_cast<std::size_t>(std::max(rank, 1.0)) - 1];
  };
  return {at(0.50), at(0.95), at(0.99), values.back()};
}

LoadReport MakeReport(const std::vector<LoadClass>& mix, const std::vector<CallResult>& results,
                      double seconds) {
  LoadReport report;
  report.seconds = seconds;
  std::vector<const CallResult*> all;
  for (const CallResult& result : results) all.push_back(&result);
  for (std::size_t i = 0; i < mix.size(); ++i) {
    std::vector<const CallResult*> own;
    std::copy_if(all.begin(), all.end(), std::back_inserter(own),
                 [i](const CallResult* result) { return result->load_class == i; });
    report.classes.push_back(Summarize(mix[i].name, own));
  }
  if (mix.size() > 1) report.classes.push_back(Summarize("all", all));
  const auto completed = std::count_if(all.begin(), all.end(), [](const CallResult* result) {
    return result->code == 0 && !result->disconnected;
  });
  report.completed_per_second = static_cast<double>(completed) / std::max(seconds, 1e-9);
  return report;
}

std::string ToTable(const LoadReport& report) {
  char line[200];
  std::string text = "class        seconds to        p50       p95       p99       max\n";
  for (const ClassReport& each : report.classes) {
    text += Row(each, "accepted", each.accepted) + Row(each, "first byte", each.first_byte) +
            Row(each, "last byte", each.total);
  }
  for (const ClassReport& each : report.classes) {
    text += each.name + ": " + std::to_string(each.calls) + " calls";
    for (const auto& [code, count] : each.codes) text += ", " + std::to_string(count) + " " + code;
    if (each.disconnected > 0) text += ", " + std::to_string(each.disconnected) + " disconnected";
    text += "\n";
  }
  std::snprintf(line, sizeof(line), "%.1f s, %.2f clips/s\n", report.seconds,
                report.completed_per_second);
  text += line;
  if (report.server_mib_peak > 0) {
    std::snprintf(line, sizeof(line),
                  "server: resident %.1f MiB before, %.1f MiB at most, %d threads at most\n",
                  report.server_mib_before, report.server_mib_peak, report.server_threads_peak);
    text += line;
  }
  return text;
}

std::string ToJson(const LoadReport& report) {
  nlohmann::json json = {{"seconds", report.seconds},
                         {"completed_per_second", report.completed_per_second},
                         {"server_mib_before", report.server_mib_before},
                         {"server_mib_peak", report.server_mib_peak},
                         {"server_threads_peak", report.server_threads_peak}};
  for (const ClassReport& each : report.classes) {
    json["classes"].push_back({{"name", each.name},
                               {"calls", each.calls},
                               {"disconnected", each.disconnected},
                               {"codes", each.codes},
                               {"accepted_seconds", Json(each.accepted)},
                               {"first_byte_seconds", Json(each.first_byte)},
                               {"total_seconds", Json(each.total)}});
  }
  return json.dump(2) + "\n";
}

}  // namespace slalom::bench
