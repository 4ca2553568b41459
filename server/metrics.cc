#include "server/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>
#include <unistd.h>

#include <fstream>
#include <map>
#include <mutex>
#include <sstream>

#include "server/version.h"

namespace slalom {
namespace {

using Buckets = prometheus::Histogram::BucketBoundaries;
using CounterFamily = prometheus::Family<prometheus::Counter>;
using GaugeFamily = prometheus::Family<prometheus::Gauge>;
using HistogramFamily = prometheus::Family<prometheus::Histogram>;

// A step takes a few milliseconds (a small clip on a GPU) to a minute (a large one on a CPU).
Buckets StepBuckets() {
  return {0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60};
}
// A job takes a second to hours.
Buckets JobBuckets() {
  return {0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200};
}
// A stage can be anything from tokenising (microseconds) to denoising (a whole job).
Buckets StageBuckets() {
  return {0.0001, 0.001, 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600};
}
// Waiting can be nothing at all.
Buckets WaitBuckets() {
  return {0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600};
}
Buckets CancelBuckets() { return {0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60}; }
Buckets BatchBuckets() { return {1, 2, 3, 4, 6, 8, 12, 16, 32}; }

// Resident memory of this process.
double ResidentBytes() {
  std::ifstream statm("/proc/self/statm");
  double total = 0;
  double resident = 0;
  statm >> total >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE));
}

}  // namespace

const char* AttentionName(AttentionKind kind) {
  switch (kind) {
    case AttentionKind::kDense:
      return "dense";
    case AttentionKind::kSla:
      return "sla";
    case AttentionKind::kSalad:
      return "salad";
  }
  return "";
}

class Metrics::Impl {
 public:
  CounterFamily& Counters(const char* name, const char* help) {
    return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
  }
  GaugeFamily& Gauges(const char* name, const char* help) {
    return prometheus::BuildGauge().Name(name).Help(help).Register(registry);
  }
  HistogramFamily& Histograms(const char* name, const char* help) {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(registry);
  }

  prometheus::Registry registry;
  CounterFamily& requests = Counters("slalom_requests_total", "GenerateVideo calls that ended");
  GaugeFamily& queue_depth = Gauges("slalom_queue_depth", "Jobs that wait for a device");
  prometheus::Histogram& queue_wait =
      Histograms("slalom_queue_wait_seconds", "From submission to the first device work")
          .Add({}, WaitBuckets());
  prometheus::Histogram& first_byte =
      Histograms("slalom_time_to_first_byte_seconds", "From the request to the first byte of video")
          .Add({}, JobBuckets());
  HistogramFamily& stage = Histograms("slalom_stage_seconds", "Seconds of one clip's stage");
  HistogramFamily& step =
      Histograms("slalom_denoise_step_seconds", "Seconds of one denoising step of a batch");
  prometheus::Histogram& request =
      Histograms("slalom_request_seconds", "From the request to the last byte of its video")
          .Add({}, JobBuckets());
  prometheus::Histogram& batch =
      Histograms("slalom_batch_size", "Clips in one denoising step").Add({}, BatchBuckets());
  GaugeFamily& sparsity =
      Gauges("slalom_attention_sparsity",
             "Share of attention block pairs skipped in the last clip, measured from its maps");
  GaugeFamily& mass_kept =
      Gauges("slalom_attention_mass_kept",
             "Share of the softmax mass that the kept blocks hold in the last clip, sampled");
  CounterFamily& fallback =
      Counters("slalom_dense_fallback_total", "Automatic attention that came to dense");
  prometheus::Counter& frames = Counters("slalom_frames_total", "Frames encoded").Add({});
  prometheus::Counter& videos = Counters("slalom_videos_total", "Videos completed").Add({});
  prometheus::Counter& video_seconds =
      Counters("slalom_video_seconds_total", "Playing time of the videos completed").Add({});
  GaugeFamily& memory = Gauges(
      "slalom_device_memory_bytes",
      "Memory by kind: a device's total, in_use, reserved by the arenas and peak in use; this "
      "process's resident memory on the host");
  CounterFamily& busy =
      Counters("slalom_device_busy_seconds_total", "Seconds that a device has worked");
  prometheus::Histogram& cancel_to_free =
      Histograms("slalom_cancel_to_free_seconds", "From a cancellation to the device being free")
          .Add({}, CancelBuckets());
  CounterFamily& tenant_seconds =
      Counters("slalom_tenant_device_seconds_total", "Device seconds used, by tenant");
  CounterFamily& refused =
      Counters("slalom_refused_total", "Requests refused for now, by what ran out");
  GaugeFamily& cost_error = Gauges(
      "slalom_cost_error",
      "How far predicted seconds of work are off, as a share of the measured ones, lately: mean of "
      "the absolute error; bias, above 0 where too much is predicted");
  GaugeFamily& eta_error =
      Gauges("slalom_eta_error",
             "The same for the time until the end that jobs were told when they were accepted");
  prometheus::Counter& requeued =
      Counters("slalom_requeued_jobs_total", "Jobs that a lost device gave back to the queue")
          .Add({});
  prometheus::Counter& readmitted =
      Counters("slalom_readmitted_jobs_total", "Jobs of an earlier process that went on").Add({});
  prometheus::Gauge& streams = Gauges("slalom_streams", "Open streams").Add({});
  prometheus::Gauge& kept_jobs = Gauges("slalom_kept_jobs", "Ended jobs that are kept").Add({});
  prometheus::Gauge& kept_bytes =
      Gauges("slalom_kept_video_bytes", "Videos of ended jobs that are kept").Add({});
  CounterFamily& prompt_cache =
      Counters("slalom_prompt_cache_total", "Prompts looked up among the kept embeddings");
  GaugeFamily& prompt_cache_bytes =
      Gauges("slalom_prompt_cache_bytes", "Host memory of the kept embeddings");
  GaugeFamily& build_info = Gauges("slalom_build_info", "1, with the version as label");
  std::mutex text_mutex;
};

Metrics::Metrics() : impl_(std::make_unique<Impl>()) {
  impl_->build_info.Add({{"version", kVersion}}).Set(1);
  // Series that exist from the start: a rate over an absent series is nothing, not 0.
  for (const char* name : {"tokenize", "text_encode", "denoise", "decode", "encode"}) {
    impl_->stage.Add({{"stage", name}}, StageBuckets());
  }
  for (int i = 0; i < kNumPriorities; ++i) {
    impl_->queue_depth.Add({{"priority", PriorityName(static_cast<Priority>(i))}}).Set(0);
  }
  impl_->fallback.Add({{"reason", "no_adapter"}});
  for (const char* reason : {"rate", "quota", "queue", "streams"}) {
    impl_->refused.Add({{"reason", reason}});
  }
}

Metrics::~Metrics() = default;

void Metrics::CountRequest(const std::string& model, const std::string& attention, int code) {
  const char* name = code == 0 ? "OK" : ErrorCodeName(static_cast<ErrorCode>(code));
  impl_->requests.Add({{"model", model}, {"attention", attention}, {"code", name}}).Increment();
}

void Metrics::CountRefusal(const std::string& reason) {
  impl_->refused.Add({{"reason", reason}}).Increment();
}

void Metrics::CountReadmitted(int jobs) { impl_->readmitted.Increment(jobs); }

void Metrics::SetService(const Service& service) {
  impl_->streams.Set(service.streams);
  impl_->kept_jobs.Set(service.kept_jobs);
  impl_->kept_bytes.Set(static_cast<double>(service.kept_video_bytes));
}

void Metrics::CountDenseFallback(const std::string& reason) {
  impl_->fallback.Add({{"reason", reason}}).Increment();
}

void Metrics::ObserveStep(const StepObservation& step) {
  impl_->step.Add({{"attention", AttentionName(step.attention)}}, StepBuckets())
      .Observe(step.seconds);
  impl_->batch.Observe(step.batch_size);
}

void Metrics::ObserveFirstByte(double seconds) { impl_->first_byte.Observe(seconds); }

void Metrics::ObserveJob(const std::string& model, const std::string& tenant,
                         const JobResult& result) {
  const auto stage = [this](const char* name, double seconds) {
    if (seconds > 0) impl_->stage.Add({{"stage", name}}, StageBuckets()).Observe(seconds);
  };
  const ClipStatistics& statistics = result.statistics;
  impl_->queue_wait.Observe(result.queue_seconds);
  stage("tokenize", statistics.tokenize_seconds);
  stage("text_encode", statistics.text_encode_seconds);
  stage("denoise", statistics.denoise_seconds);
  stage("decode", statistics.decode_seconds);
  impl_->tenant_seconds.Add({{"tenant", tenant}}).Increment(result.device_seconds);
  if (result.cancel_to_free_seconds) {
    impl_->cancel_to_free.Observe(*result.cancel_to_free_seconds);
  }
  const auto set_layers = [&model](GaugeFamily& family, const std::vector<double>& layers) {
    for (std::size_t i = 0; i < layers.size(); ++i) {
      family.Add({{"model", model}, {"layer", std::to_string(i)}}).Set(layers[i]);
    }
  };
  set_layers(impl_->sparsity, statistics.layer_sparsity);
  set_layers(impl_->mass_kept, statistics.layer_mass_kept);
}

void Metrics::ObserveVideo(double encode_seconds, double request_seconds, int frames, int fps) {
  impl_->stage.Add({{"stage", "encode"}}, StageBuckets()).Observe(encode_seconds);
  impl_->request.Observe(request_seconds);
  impl_->frames.Increment(frames);
  impl_->videos.Increment();
  impl_->video_seconds.Increment(static_cast<double>(frames) / fps);
}

std::string Metrics::Text(const SchedulerStats* stats) {
  // Two scrapes at a time would both add the same step of a device's busy seconds.
  std::lock_guard lock(impl_->text_mutex);
  if (stats != nullptr) {
    for (int i = 0; i < kNumPriorities; ++i) {
      impl_->queue_depth.Add({{"priority", PriorityName(static_cast<Priority>(i))}})
          .Set(stats->queued[static_cast<std::size_t>(i)]);
    }
    for (const CostError& error : stats->cost_errors) {
      const auto set = [&](const char* kind, double value) {
        impl_->cost_error
            .Add({{"device", error.device},
                  {"model", error.model},
                  {"attention", AttentionName(error.attention)},
                  {"phase", CostPhaseName(error.phase)},
                  {"kind", kind}})
            .Set(value);
      };
      set("mean", error.mean_error);
      set("bias", error.bias);
    }
    impl_->eta_error.Add({{"kind", "mean"}}).Set(stats->eta_error.mean_error);
    impl_->eta_error.Add({{"kind", "bias"}}).Set(stats->eta_error.bias);
    impl_->requeued.Increment(static_cast<double>(stats->requeued) - impl_->requeued.Value());
    for (const DeviceStats& device : stats->devices) {
      const auto count = [&](const char* result, std::int64_t total) {
        prometheus::Counter& counter =
            impl_->prompt_cache.Add({{"device", device.device}, {"result", result}});
        counter.Increment(static_cast<double>(total) - counter.Value());
      };
      count("hit", device.prompt_cache.hits);
      count("miss", device.prompt_cache.misses);
      impl_->prompt_cache_bytes.Add({{"device", device.device}})
          .Set(static_cast<double>(device.prompt_cache.bytes));
      prometheus::Counter& busy = impl_->busy.Add({{"device", device.device}});
      busy.Increment(device.busy_seconds - busy.Value());
      const auto set = [&](const char* kind, std::size_t bytes) {
        impl_->memory.Add({{"device", device.device}, {"kind", kind}})
            .Set(static_cast<double>(bytes));
      };
      set("total", device.memory.bytes_total);
      set("in_use", device.memory.bytes_in_use);
      set("reserved", device.memory.bytes_reserved);
      set("peak", device.memory.bytes_peak);
    }
  }
  impl_->memory.Add({{"device", "host"}, {"kind", "resident"}}).Set(ResidentBytes());
  std::ostringstream out;
  prometheus::TextSerializer().Serialize(out, impl_->registry.Collect());
  return out.str();
}

}  // namespace slalom
