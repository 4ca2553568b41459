#include "tests/bench/trace.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <numbers>
#include <random>
#include <sstream>

#include "kernels/core/error.h"

namespace slalom {
namespace {

constexpr double kDay = 86400;

// A clip's device seconds, in the proportions of a video model: most of it is steps.
TraceShape Divide(const std::string& name, double seconds, int steps) {
  return {name, 0.02 * seconds, 0.85 * seconds / steps, 0.13 * seconds};
}

using Row = std::map<std::string, std::string>;

[[noreturn]] void Bad(std::size_t number, const std::string& what) {
  throw Error(ErrorCode::kInvalidArgument, "trace, job " + std::to_string(number) + ": " + what);
}

double Number(const Row& row, const std::string& key, std::size_t number, double otherwise) {
  const auto found = row.find(key);
  if (found == row.end() || found->second.empty()) {
    if (otherwise >= 0) return otherwise;
    Bad(number, key + " is missing");
  }
  double value = 0;
  std::istringstream text(found->second);
  if (!(text >> value) || !text.eof() || !std::isfinite(value) || value < 0) {
    Bad(number, key + " is '" + found->second + "', must be a number of 0 or more");
  }
  return value;
}

std::string Word(const Row& row, const std::string& key, const std::string& otherwise) {
  const auto found = row.find(key);
  return found == row.end() || found->second.empty() ? otherwise : found->second;
}

Priority ParsePriority(const std::string& text, std::size_t number) {
  for (int p = 0; p < kNumPriorities; ++p) {
    if (text == PriorityName(static_cast<Priority>(p))) return static_cast<Priority>(p);
  }
  Bad(number, "priority is '" + text + "', must be low, normal or high");
}

class Builder {
 public:
  void Add(const Row& row) {
    const std::size_t number = ++count_;
    constexpr double kNeeded = -1;
    TraceJob job;
    job.arrival = Number(row, "arrival_seconds", number, kNeeded);
    job.steps = static_cast<int>(Number(row, "steps", number, kNeeded));
    if (job.steps < 1) Bad(number, "steps must be at least 1");
    job.deadline = Number(row, "deadline_seconds", number, 0);
    job.priority = ParsePriority(Word(row, "priority", "normal"), number);
    const std::string shape = Word(row, "shape", "");
    if (shape.empty()) Bad(number, "shape is missing");
    const auto [known, added] = shapes_.emplace(shape, static_cast<int>(shapes_.size()));
    job.shape = known->second;
    if (added) {
      trace_.shapes.push_back({shape, Number(row, "begin_seconds", number, kNeeded),
                               Number(row, "step_seconds", number, kNeeded),
                               Number(row, "decode_seconds", number, kNeeded)});
    }
    const auto [tenant, first] =
        tenants_.emplace(Word(row, "tenant", ""), static_cast<int>(tenants_.size()));
    job.tenant = tenant->second;
    if (first) {
      const double weight = Number(row, "weight", number, 1.0);
      if (weight == 0) Bad(number, "weight must be positive");
      trace_.tenants.push_back(tenant->first);
      trace_.weights.push_back(weight);
    }
    trace_.jobs.push_back(job);
  }

  Trace Finish() {
    std::stable_sort(trace_.jobs.begin(), trace_.jobs.end(),
                     [](const TraceJob& a, const TraceJob& b) { return a.arrival < b.arrival; });
    return std::move(trace_);
  }

 private:
  Trace trace_;
  std::map<std::string, int> shapes_;
  std::map<std::string, int> tenants_;
  std::size_t count_ = 0;
};

std::vector<std::string> SplitCsv(const std::string& line) {
  std::vector<std::string> cells;
  std::istringstream stream(line);
  for (std::string cell; std::getline(stream, cell, ',');) {
    const auto begin = cell.find_first_not_of(" \t\r\"");
    const auto end = cell.find_last_not_of(" \t\r\"");
    cells.push_back(begin == std::string::npos ? "" : cell.substr(begin, end - begin + 1));
  }
  return cells;
}

void ReadCsv(std::istream& in, Builder* builder) {
  std::string line;
  if (!std::getline(in, line)) return;
  const std::vector<std::string> keys = SplitCsv(line);
  while (std::getline(in, line)) {
    if (line.empty()) continue;
    const std::vector<std::string> cells = SplitCsv(line);
    Row row;
    for (std::size_t i = 0; i < std::min(keys.size(), cells.size()); ++i) row[keys[i]] = cells[i];
    builder->Add(row);
  }
}

void ReadJson(std::istream& in, Builder* builder) {
  const nlohmann::json jobs = nlohmann::json::parse(in, nullptr, /*allow_exceptions=*/false);
  if (!jobs.is_array()) throw Error(ErrorCode::kInvalidArgument, "trace: not an array of jobs");
  for (const auto& job : jobs) {
    if (!job.is_object()) throw Error(ErrorCode::kInvalidArgument, "trace: a job is no object");
    Row row;
    for (const auto& [key, value] : job.items()) {
      row[key] = value.is_string() ? value.get<std::string>() : value.dump();
    }
    builder->Add(row);
  }
}

}  // namespace

double Trace::Seconds(const TraceJob& job) const {
  const TraceShape& shape = shapes[static_cast<std::size_t>(job.shape)];
  return shape.begin_seconds + job.steps * shape.step_seconds + shape.decode_seconds;
}

Trace MakeTrace(const TraceOptions& options) {
  constexpr int kShortSteps = 10;
  constexpr int kLongSteps = 20;
  Trace trace;
  trace.shapes = {Divide("short", options.short_seconds, kShortSteps),
                  Divide("long", options.short_seconds * options.long_factor, kLongSteps)};
  std::vector<double> popularity;
  for (int t = 0; t < std::max(1, options.tenants); ++t) {
    trace.tenants.push_back("tenant-" + std::to_string(t));
    trace.weights.push_back(1.0);
    popularity.push_back(1.0 / (t + 1));
  }
  const double mean = options.short_seconds *
                      (options.short_share + (1 - options.short_share) * options.long_factor);
  const double rate = options.load * options.devices / mean;

  std::mt19937_64 random(options.seed);
  std::discrete_distribution<int> tenant(popularity.begin(), popularity.end());
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  std::exponential_distribution<double> gap(rate * (1 + options.amplitude));
  double now = 0;
  trace.jobs.reserve(static_cast<std::size_t>(options.jobs));
  while (static_cast<std::int64_t>(trace.jobs.size()) < options.jobs) {
    now += gap(random);
    // Thinning: the wave is lowest at midnight, when the trace begins.
    const double wave = 1 - options.amplitude * std::cos(2 * std::numbers::pi * now / kDay);
    if (uniform(random) * (1 + options.amplitude) > wave) continue;
    TraceJob job;
    job.arrival = now;
    job.shape = uniform(random) < options.short_share ? 0 : 1;
    job.steps = job.shape == 0 ? kShortSteps : kLongSteps;
    job.tenant = tenant(random);
    const double p = uniform(random);
    if (p < options.high_share) {
      job.priority = Priority::kHigh;
    } else if (p < options.high_share + options.low_share) {
      job.priority = Priority::kLow;
    }
    trace.jobs.push_back(job);
  }
  return trace;
}

Trace ReadTrace(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw Error(ErrorCode::kNotFound, "trace: cannot read " + path);
  Builder builder;
  if (path.ends_with(".json")) {
    ReadJson(in, &builder);
  } else {
    ReadCsv(in, &builder);
  }
  Trace trace = builder.Finish();
  if (trace.jobs.empty()) throw Error(ErrorCode::kInvalidArgument, "trace: no jobs in " + path);
  return trace;
}

}  // namespace slalom
