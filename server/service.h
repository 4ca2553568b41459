// VideoService: the RPCs of slalom.v1.VideoGeneration over a Scheduler.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "scheduler/job.h"
#include "server/config.h"
#include "server/job_store.h"

namespace grpc {
class Service;
}

namespace slalom {

class JobArchive;
class Metrics;
class Scheduler;

struct ServiceOptions {
  std::vector<TenantOptions> tenants;
  RetentionLimits retention;
  double checkpoint_seconds = 0;
  int max_streams = 4096;
  int max_queue = 64;  // the scheduler's, to tell a full queue from a clip that never fits
  // Called about once a second, from a thread of the service's.
  std::function<void()> on_tick;
};

// The life of a request: authenticate, check, resolve (request.h); a JobRecord goes into the
// JobStore, a VideoJob into the Scheduler; a VideoStream reads the record until its end. Handlers
// never block on a device. Thread-safe.
class VideoService {
 public:
  // `archive` and `metrics` outlive it. Takes over the archive's jobs; throws Error when it is
  // damaged.
  VideoService(ServiceOptions options, JobArchive* archive, Metrics* metrics);
  ~VideoService();

  VideoService(const VideoService&) = delete;
  VideoService& operator=(const VideoService&) = delete;

  grpc::Service* grpc_service();

  // Until this is called new requests are answered UNAVAILABLE, "warming up". Jobs that an earlier
  // process has accepted go first. The scheduler must live until Stop.
  void Serve(Scheduler* scheduler);

  // Asks the jobs that have not begun to end: a durable archive has them for the next process.
  void ParkQueue();
  // Waits until every job's last byte is kept, or the deadline.
  void Settle(SchedulerClock::time_point deadline);
  // Lets go of the scheduler, which may then be destroyed. To be called once gRPC has shut down.
  void Stop();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace slalom
