// VideoService: the RPCs of slalom.v1.VideoGeneration over a Scheduler.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "scheduler/job.h"
#include "server/config.h"

namespace grpc {
class Service;
}

namespace slalom {

class Metrics;
class Scheduler;

struct ServiceOptions {
  std::vector<TenantOptions> tenants;
  std::string state_dir;
  double job_retention_seconds = 3600;
  int max_kept_jobs = 1000;
  int max_queue = 64;  // the scheduler's, to tell a full queue from a clip that never fits
};

// The life of a request: authenticate, check, resolve (request.h); a JobRecord goes into the
// JobStore, a VideoJob into the Scheduler; a VideoStream reads the record until its end. Handlers
// never block on a device. Thread-safe.
class VideoService {
 public:
  // `metrics` outlives it. Throws Error when the state folder cannot be used.
  VideoService(ServiceOptions options, Metrics* metrics);
  ~VideoService();

  VideoService(const VideoService&) = delete;
  VideoService& operator=(const VideoService&) = delete;

  grpc::Service* grpc_service();

  // Until this is called every RPC answers UNAVAILABLE, "warming up". The scheduler must live until
  // Stop.
  void Serve(Scheduler* scheduler);

  // Waits until every job's last byte is kept, or the deadline; then keeps what --state-dir needs.
  void Settle(SchedulerClock::time_point deadline);
  // Lets go of the scheduler, which may then be destroyed. To be called once gRPC has shut down.
  void Stop();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace slalom
