// VideoService: the RPCs of slalom.v1.VideoGeneration over a Scheduler.
#pragma once

#include <memory>

#include "scheduler/job.h"
#include "server/job_desk.h"

namespace grpc {
class Service;
}

namespace slalom {

struct ServiceOptions {
  JobDeskOptions desk;
  int max_streams = 4096;
};

// The life of a request: authenticate, parse; the JobDesk makes a job of it; a VideoStream reads
// the job's record until its end. Handlers never block on a device. Thread-safe.
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
  // Waits until every job's last byte is kept, or the deadline. False when some are not.
  bool Settle(SchedulerClock::time_point deadline);
  // Lets go of the scheduler, which may then be destroyed. To be called once gRPC has shut down.
  void Stop();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace slalom
