// JobStore: every job that the server knows, and for how long it does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "server/job_archive.h"
#include "server/job_record.h"

namespace slalom {

class VideoJob;

// How much of what has ended is kept. What somebody has fetched goes first, then the oldest.
struct RetentionLimits {
  double seconds = 3600;
  int jobs = 1000;
  std::int64_t video_bytes = 0;  // of ended jobs' videos; 0: no limit
};

// Thread-safe.
class JobStore {
 public:
  // Takes over the archive's jobs: ended ones as they are, the others to be readmitted. The archive
  // outlives it.
  JobStore(JobArchive* archive, RetentionLimits limits);
  // Ends the encoders.
  ~JobStore();

  // Takes a new record in. When its request_id stands for an earlier job with the same request,
  // that job's record comes back instead. A job that failed frees its request_id. Throws Error:
  // kAlreadyExists, or a Refusal when the tenant has `max_live` live jobs (0: no limit).
  std::shared_ptr<JobRecord> Add(std::shared_ptr<JobRecord> record, int max_live);
  // The sink is kept until the job has ended.
  void Attach(const std::string& id, std::shared_ptr<VideoJob> sink);
  // A record whose job was refused.
  void Remove(const std::string& id);

  // Throws Error: kNotFound, or kPermissionDenied when it is another tenant's.
  std::shared_ptr<JobRecord> Find(const std::string& id, const std::string& tenant) const;
  struct Listed {
    std::uint64_t sequence = 0;  // of acceptance
    std::shared_ptr<JobRecord> record;
  };
  // A tenant's newest first: at most `most` of those accepted before `before`. Costs what it gives.
  std::vector<Listed> List(const std::string& tenant,
                           std::uint64_t before = std::numeric_limits<std::uint64_t>::max(),
                           std::size_t most = std::numeric_limits<std::size_t>::max()) const;
  // In the order of acceptance.
  std::vector<std::shared_ptr<JobRecord>> Live() const;

  // Forgets what is due, joins ended encoders. To be called now and then.
  void Sweep();

  struct Kept {
    int jobs = 0;
    std::int64_t video_bytes = 0;
  };
  Kept kept() const;

 private:
  struct Entry {
    std::shared_ptr<JobRecord> record;
    std::shared_ptr<VideoJob> sink;
    std::uint64_t sequence = 0;
  };
  using Entries = std::map<std::string, Entry>;
  using BySequence = std::map<std::uint64_t, std::shared_ptr<JobRecord>>;

  void TakeOver();
  void Enter(std::shared_ptr<JobRecord> record);
  // Of no more use to anybody: it failed, or was cancelled. Not so one that the next process goes
  // on with.
  bool Dead(const JobRecord& record) const;
  bool Parked(const JobRecord& record) const;
  std::vector<std::string> WhatToForget(std::vector<std::shared_ptr<VideoJob>>* done);
  Entry Take(const std::string& id);

  JobArchive* const archive_;
  const RetentionLimits limits_;

  mutable std::mutex mutex_;
  Entries entries_;                                   // by id
  std::map<std::string, BySequence> by_tenant_;       // the same; no tenant without a job
  std::map<std::string, std::string> by_request_id_;  // tenant, newline, request_id -> id
  std::uint64_t next_sequence_ = 0;
};

}  // namespace slalom
