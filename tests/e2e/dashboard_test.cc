// deploy/grafana: every expression of the dashboard asks for metrics and labels that a server has.
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "tests/e2e/running_server.h"
#include "tests/unit/server/prometheus_text.h"

namespace slalom {
namespace {

using Strings = std::set<std::string>;

// All matches' first groups.
Strings FindAll(const std::string& text, const std::string& pattern) {
  const std::regex regex(pattern);
  Strings found;
  for (std::sregex_iterator it(text.begin(), text.end(), regex), end; it != end; ++it) {
    found.insert((*it)[1]);
  }
  return found;
}

// The words of all lists "by (a, b)" and of all selectors {a="..",b=~".."}, but for `instance`,
// which Prometheus adds; and those that a legend names.
Strings LabelsOf(const std::string& expression, const std::string& legend) {
  Strings labels = FindAll(legend, R"re(\{\{(\w+)\}\})re");
  for (const std::string& list : FindAll(expression, R"re(by \(([^)]*)\))re")) {
    labels.merge(FindAll(list, R"re((\w+))re"));
  }
  for (const std::string& selector : FindAll(expression, R"re(\{([^}]*)\})re")) {
    labels.merge(FindAll(selector, R"re((\w+)=)re"));
  }
  labels.erase("instance");
  return labels;
}

// A server that has had one of everything that makes a series.
std::map<std::string, Strings> LabelsByMetric() {
  ServerConfig config;
  config.tenants = {{.name = "one", .token = "token-of-one"}};
  RunningServer running({}, config);
  v1::GenerateVideoRequest request = SmallClip();
  request.mutable_attention()->set_mode(v1::ATTENTION_MODE_SLA);
  EXPECT_EQ(running.Generate(request, "token-of-one").code, grpc::StatusCode::OK);
  std::map<std::string, Strings> labels;
  for (const auto& [sample, value] : ParsePrometheus(running.Get("/metrics"))) {
    labels[sample.substr(0, sample.find('{'))].merge(FindAll(sample, R"re((\w+)=")re"));
  }
  return labels;
}

TEST(DashboardTest, AsksForMetricsThatExist) {
  std::ifstream file(DASHBOARD);
  const auto dashboard = nlohmann::json::parse(file);
  const std::map<std::string, Strings> known = LabelsByMetric();
  Strings asked;
  Strings titles;
  for (const auto& panel : dashboard.at("panels")) {
    const std::string title = panel.at("title");
    EXPECT_TRUE(titles.insert(title).second) << title;
    if (panel.at("type") == "row") continue;
    ASSERT_FALSE(panel.at("targets").empty()) << title;
    for (const auto& target : panel.at("targets")) {
      const std::string expression = target.at("expr");
      const Strings metrics = FindAll(expression, R"re((slalom_\w+))re");
      EXPECT_FALSE(metrics.empty()) << title;
      for (const std::string& metric : metrics) {
        asked.insert(metric);
        const auto found = known.find(metric);
        ASSERT_NE(found, known.end()) << title << " asks for " << metric;
        for (const std::string& label : LabelsOf(expression, target.at("legendFormat"))) {
          EXPECT_TRUE(found->second.contains(label)) << title << ": " << metric << " by " << label;
        }
      }
    }
  }
  for (const char* metric :
       {"slalom_queue_depth", "slalom_denoise_step_seconds_bucket", "slalom_attention_sparsity",
        "slalom_stage_seconds_sum", "slalom_device_memory_bytes", "slalom_cost_error",
        "slalom_refused_total"}) {
    EXPECT_TRUE(asked.contains(metric)) << "the dashboard does not show " << metric;
  }
}

}  // namespace
}  // namespace slalom
