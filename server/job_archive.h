// JobArchive: what survives the process. Facts about jobs in a database, bytes (videos,
// checkpoints) in files beside it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "scheduler/job.h"
#include "server/database.h"
#include "server/job_record.h"
#include "server/replay_buffer.h"

namespace slalom {

// The folder holds slalom.db (SQLite) and jobs/: ID.mp4, a video as far as it has come, and
// ID.latent, the newest checkpoint of a job that runs.
//
// The promise: once Accept has returned, the job is known until Forget, whatever happens to the
// process or to the power; once End has returned, it stays ended. A job that is neither ended nor
// forgotten when the process ends is live when the next one loads the archive.
//
// Without a folder nothing survives: videos are unnamed files and the other methods do nothing.
//
// Thread-safe. Accept and End return when the disk has it (milliseconds); the Keep methods return
// at once, for threads that must not block, and are done by a thread of the archive's own.
class JobArchive {
 public:
  // Throws Error: kFailedPrecondition when the folder cannot be used or another server has it,
  // kDataLoss when the database is damaged; without a folder, when no unnamed file can be made.
  explicit JobArchive(const std::string& folder);
  // Finishes what is queued.
  ~JobArchive();

  JobArchive(const JobArchive&) = delete;
  JobArchive& operator=(const JobArchive&) = delete;

  bool durable() const { return database_ != nullptr; }

  struct Entry {
    JobRecord::Origin origin;
    std::optional<v1::Job> ended;  // how; without: it is live
  };
  // Everything that is known, in the order of acceptance. Deletes videos and checkpoints of jobs
  // that are not.
  std::vector<Entry> Load();

  // For a new job, or for one of Load's: then it has what was there.
  std::unique_ptr<ReplayBuffer> Video(const std::string& id) const;
  // Null when there is none.
  Checkpoint LoadCheckpoint(const std::string& id) const;

  void Accept(const JobRecord::Origin& origin);
  void End(const v1::Job& job);
  // Ends the job, then calls `then` (without locks held), whether or not that worked: what cannot
  // be kept is logged.
  void KeepEnd(v1::Job job, std::function<void()> then);
  // Replaces the checkpoint before it. Of one job only the newest waits for the disk.
  void KeepCheckpoint(const std::string& id, Checkpoint checkpoint);
  // Facts and files.
  void Forget(const std::vector<std::string>& ids);

  // Small values that outlive the process; empty when absent.
  void SetNote(const std::string& key, const std::string& value);
  std::string Note(const std::string& key) const;

 private:
  struct Ending {
    v1::Job job;
    std::function<void()> then;
  };

  void CreateTables();
  void DeleteOrphans(const std::vector<Entry>& entries) const;
  std::string PathOf(const std::string& id, const char* extension) const;
  void WriteCheckpoint(const std::string& id, const Checkpoint& checkpoint) const;
  void Keep();

  const std::string folder_;  // of the files; empty: not durable

  mutable std::mutex database_mutex_;
  std::unique_ptr<Database> database_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Ending> endings_;
  std::map<std::string, Checkpoint> checkpoints_;  // by job
  std::string writing_;                            // the job whose checkpoint is being written
  bool stop_ = false;
  std::thread keeper_;  // last: it uses all of the above
};

}  // namespace slalom
