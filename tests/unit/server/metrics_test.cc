#include "server/metrics.h"

#include <gtest/gtest.h>

#include <map>
#include <sstream>
#include <string>

#include "tests/unit/server/prometheus_text.h"

namespace slalom {
namespace {

TEST(MetricsTest, EveryNameOfTheContractIsThere) {
  Metrics metrics;
  metrics.CountRequest("demo", "sla", 0);
  metrics.ObserveStep({"cpu", "demo", AttentionKind::kSla, 2, 0.25});
  JobResult result;
  result.state = JobState::kCancelled;
  result.cancel_to_free_seconds = 0.02;
  result.statistics.layer_sparsity = {0.9, 0.8};
  result.statistics.layer_mass_kept = {0.7, 0.6};
  metrics.ObserveJob("demo", "", result);
  SchedulerStats stats;
  stats.devices.push_back({"cpu", "a cpu", true, 0, 12.5});
  const auto samples = ParsePrometheus(metrics.Text(&stats));
  for (const char* name :
       {"slalom_requests_total", "slalom_queue_depth", "slalom_queue_wait_seconds_count",
        "slalom_time_to_first_byte_seconds_count", "slalom_stage_seconds_count",
        "slalom_denoise_step_seconds_bucket", "slalom_request_seconds_sum", "slalom_batch_size_sum",
        "slalom_attention_sparsity", "slalom_attention_mass_kept", "slalom_dense_fallback_total",
        "slalom_frames_total", "slalom_videos_total", "slalom_video_seconds_total",
        "slalom_device_memory_bytes", "slalom_device_busy_seconds_total",
        "slalom_cancel_to_free_seconds_count", "slalom_tenant_device_seconds_total",
        "slalom_build_info"}) {
    EXPECT_TRUE(HasMetric(samples, name)) << name;
  }
}

TEST(MetricsTest, CountsWhatItIsTold) {
  Metrics metrics;
  metrics.CountRequest("demo", "sla", 0);
  metrics.CountRequest("demo", "sla", 0);
  metrics.CountRequest("demo", "dense", static_cast<int>(ErrorCode::kCancelled));
  metrics.ObserveStep({"cpu", "demo", AttentionKind::kDense, 3, 0.004});
  metrics.ObserveVideo(0.5, 20, 33, 16);
  metrics.CountDenseFallback("no_adapter");
  JobResult result;
  result.device_seconds = 7;
  result.statistics.layer_sparsity = {0.9, 0.8};
  metrics.ObserveJob("demo", "acme", result);
  auto samples = ParsePrometheus(metrics.Text(nullptr));
  EXPECT_EQ((samples[R"(slalom_requests_total{attention="sla",code="OK",model="demo"})"]), 2);
  EXPECT_EQ((samples[R"(slalom_requests_total{attention="dense",code="CANCELLED",model="demo"})"]),
            1);
  EXPECT_EQ(samples[R"(slalom_denoise_step_seconds_bucket{attention="dense",le="0.002"})"], 0);
  EXPECT_EQ(samples[R"(slalom_denoise_step_seconds_bucket{attention="dense",le="0.005"})"], 1);
  EXPECT_EQ(samples["slalom_batch_size_sum"], 3);
  EXPECT_EQ(samples["slalom_frames_total"], 33);
  EXPECT_EQ(samples["slalom_videos_total"], 1);
  EXPECT_NEAR(samples["slalom_video_seconds_total"], 33.0 / 16, 1e-9);
  EXPECT_EQ(samples[R"(slalom_dense_fallback_total{reason="no_adapter"})"], 1);
  EXPECT_EQ(samples[R"(slalom_tenant_device_seconds_total{tenant="acme"})"], 7);
  EXPECT_EQ(samples[R"(slalom_attention_sparsity{layer="1",model="demo"})"], 0.8);
}

TEST(MetricsTest, BusySecondsFollowTheScheduler) {
  Metrics metrics;
  SchedulerStats stats;
  stats.queued = {1, 2, 3};
  stats.devices.push_back({"cuda:0", "a gpu", true, 0, 2.5});
  metrics.Text(&stats);
  stats.devices[0].busy_seconds = 4.0;
  auto samples = ParsePrometheus(metrics.Text(&stats));
  EXPECT_EQ(samples[R"(slalom_device_busy_seconds_total{device="cuda:0"})"], 4.0);
  EXPECT_EQ(samples[R"(slalom_queue_depth{priority="low"})"], 1);
  EXPECT_EQ(samples[R"(slalom_queue_depth{priority="high"})"], 3);
}

TEST(MetricsTest, PredictionsTellTheirErrors) {
  Metrics metrics;
  SchedulerStats stats;
  stats.cost_errors.push_back(
      {"a gpu", "demo", AttentionKind::kSla, CostPhase::kDecode, 10, 0.25, -0.125});
  stats.eta_error = {20, 0.5, 0.75};
  stats.requeued = 3;
  metrics.Text(&stats);
  stats.requeued = 4;
  auto samples = ParsePrometheus(metrics.Text(&stats));
  const std::string decode = R"(attention="sla",device="a gpu",kind=")";
  const std::string model = R"(",model="demo",phase="decode"})";
  EXPECT_EQ(samples["slalom_cost_error{" + decode + "mean" + model], 0.25);
  EXPECT_EQ(samples["slalom_cost_error{" + decode + "bias" + model], -0.125);
  EXPECT_EQ(samples[R"(slalom_eta_error{kind="mean"})"], 0.5);
  EXPECT_EQ(samples[R"(slalom_eta_error{kind="bias"})"], 0.75);
  EXPECT_EQ(samples["slalom_requeued_jobs_total"], 4);
}

TEST(MetricsTest, DevicesTellTheirMemory) {
  Metrics metrics;
  SchedulerStats stats;
  stats.devices.push_back(
      {.device = "cuda:0",
       .memory = {.bytes_in_use = 30, .bytes_reserved = 40, .bytes_peak = 35, .bytes_total = 100}});
  auto samples = ParsePrometheus(metrics.Text(&stats));
  EXPECT_EQ(samples[R"(slalom_device_memory_bytes{device="cuda:0",kind="in_use"})"], 30);
  EXPECT_EQ(samples[R"(slalom_device_memory_bytes{device="cuda:0",kind="reserved"})"], 40);
  EXPECT_EQ(samples[R"(slalom_device_memory_bytes{device="cuda:0",kind="peak"})"], 35);
  EXPECT_EQ(samples[R"(slalom_device_memory_bytes{device="cuda:0",kind="total"})"], 100);
  EXPECT_GT(samples[R"(slalom_device_memory_bytes{device="host",kind="resident"})"], 0);
}

}  // namespace
}  // namespace slalom
