// JobStore: every job that the server knows, and for how long it does.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "server/job_record.h"

namespace slalom {

class VideoJob;

// Thread-safe.
class JobStore {
 public:
  // Ended jobs are kept for so long, and at most so many of them. With a `folder`, videos and what
  // belongs to them lie there, and those of an earlier process are taken over; what a crash left
  // half made is deleted. Throws Error when the folder cannot be used.
  JobStore(std::string folder, double retention_seconds, int max_kept);
  // Ends the encoders.
  ~JobStore();

  std::unique_ptr<ReplayBuffer> NewVideo(const std::string& id) const;

  // Takes a new record in. When its request_id stands for an earlier job with the same request,
  // that job's record comes back instead. A job that failed frees its request_id. Throws Error:
  // kAlreadyExists, or kResourceExhausted when the tenant has `max_live` live jobs (0: no limit).
  std::shared_ptr<JobRecord> Add(std::shared_ptr<JobRecord> record, int max_live);
  // The sink is kept until the job has ended.
  void Attach(const std::string& id, std::shared_ptr<VideoJob> sink);
  // A record whose job was refused.
  void Remove(const std::string& id);

  // Throws Error: kNotFound, or kPermissionDenied when it is another tenant's.
  std::shared_ptr<JobRecord> Find(const std::string& id, const std::string& tenant) const;
  // Newest first.
  std::vector<std::shared_ptr<JobRecord>> List(const std::string& tenant) const;
  std::vector<std::shared_ptr<JobRecord>> Live() const;

  // Forgets what is due, joins ended encoders. To be called now and then.
  void Sweep();

 private:
  struct Entry {
    std::shared_ptr<JobRecord> record;
    std::shared_ptr<VideoJob> sink;
    std::uint64_t sequence = 0;
    bool archived = false;
  };
  using Entries = std::map<std::string, Entry>;

  void TakeOver();
  void Archive(const JobRecord& record) const;
  void Forget(const JobRecord& record) const;
  std::string PathOf(const std::string& id, const char* extension) const;

  const std::string folder_;
  const double retention_seconds_;
  const int max_kept_;

  mutable std::mutex mutex_;
  Entries entries_;                                   // by id
  std::map<std::string, std::string> by_request_id_;  // tenant, newline, request_id -> id
  std::uint64_t next_sequence_ = 0;
};

}  // namespace slalom
