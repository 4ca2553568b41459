#include "server/job_archive.h"

#include <google/protobuf/util/time_util.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <utility>

#include "kernels/core/error.h"
#include "server/job_id.h"

namespace slalom {
namespace {

namespace fs = std::filesystem;
using SystemTime = std::chrono::system_clock::time_point;

constexpr const char* kVideo = ".mp4";
constexpr const char* kCheckpoint = ".latent";
constexpr const char* kPart = ".part";
constexpr int kSchemaVersion = 1;

// `ended` is NULL while the job is live. A request_id is free again once its job has failed or was
// cancelled (states 4 and 5 of v1.JobState).
constexpr const char* kSchema = R"sql(
  CREATE TABLE jobs (
    sequence    INTEGER PRIMARY KEY AUTOINCREMENT,
    id          TEXT NOT NULL UNIQUE,
    tenant      TEXT NOT NULL,
    request_id  TEXT,
    fingerprint BLOB NOT NULL,
    request     BLOB NOT NULL,
    created_us  INTEGER NOT NULL,
    deadline_us INTEGER,
    state       INTEGER NOT NULL,
    ended       BLOB
  ) STRICT;
  CREATE UNIQUE INDEX jobs_by_request ON jobs (tenant, request_id)
    WHERE request_id IS NOT NULL AND state NOT IN (4, 5);
  CREATE TABLE notes (key TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
  PRAGMA user_version = 1;
)sql";

std::int64_t Micros(SystemTime time) {
  return std::chrono::duration_cast<std::chrono::microseconds>(time.time_since_epoch()).count();
}

SystemTime FromMicros(std::int64_t micros) { return SystemTime(std::chrono::microseconds(micros)); }

// A file that an archive could have made. A folder that somebody else has used before may hold
// others, which are none of our business.
bool IsOurs(const fs::path& file) {
  const std::string name = file.filename().string();
  const std::size_t end = std::min(name.find('.'), name.size());
  const std::string extension = name.substr(end);
  const bool known = extension == kVideo || extension == kCheckpoint ||
                     extension == std::string(kCheckpoint) + kPart;
  return known && IsJobId(name.substr(0, end));
}

}  // namespace

JobArchive::JobArchive(const std::string& folder)
    : folder_(folder.empty() ? "" : (fs::path(folder) / "jobs").string()) {
  if (folder_.empty()) {
    ReplayBuffer().Append({});  // now rather than after the first clip: is there room for videos?
    return;
  }
  std::error_code error;
  fs::create_directories(folder_, error);
  if (error) {
    throw Error(ErrorCode::kFailedPrecondition,
                "state_dir: cannot create '" + folder_ + "': " + error.message());
  }
  database_ = std::make_unique<Database>((fs::path(folder) / "slalom.db").string());
  CreateTables();
  keeper_ = std::thread([this] { Keep(); });
}

JobArchive::~JobArchive() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  if (keeper_.joinable()) keeper_.join();
}

void JobArchive::CreateTables() {
  const int version = database_->version();
  if (version > kSchemaVersion) {
    throw Error(ErrorCode::kFailedPrecondition, "state_dir: '" + folder_ +
                                                    "' was written by a newer slalomd (schema " +
                                                    std::to_string(version) + ", this one knows " +
                                                    std::to_string(kSchemaVersion) + ")");
  }
  if (version == 0) database_->Execute((std::string("BEGIN;") + kSchema + "COMMIT").c_str());
}

std::string JobArchive::PathOf(const std::string& id, const char* extension) const {
  return (fs::path(folder_) / (id + extension)).string();
}

std::vector<JobArchive::Entry> JobArchive::Load() {
  std::vector<Entry> entries;
  if (!durable()) return entries;
  {
    std::lock_guard lock(database_mutex_);
    Statement query(*database_,
                    "SELECT id, tenant, fingerprint, request, created_us, deadline_us, ended"
                    " FROM jobs ORDER BY sequence");
    while (query.Step()) {
      Entry entry;
      entry.origin.id = query.Bytes(0);
      entry.origin.tenant = query.Bytes(1);
      entry.origin.fingerprint = query.Bytes(2);
      bool good = entry.origin.resolved.ParseFromString(query.Bytes(3));
      entry.origin.created = FromMicros(query.Int(4));
      if (!query.IsNull(5)) entry.origin.deadline = FromMicros(query.Int(5));
      if (!query.IsNull(6)) good = entry.ended.emplace().ParseFromString(query.Bytes(6)) && good;
      if (!good)
        throw Error(ErrorCode::kDataLoss, "state_dir: job " + entry.origin.id + " is damaged");
      entries.push_back(std::move(entry));
    }
  }
  for (Entry& entry : entries) {
    // A video that is not all there (the power went before the disk had it) is made once more.
    std::error_code missing;
    const auto size = fs::file_size(PathOf(entry.origin.id, kVideo), missing);
    if (entry.ended && entry.ended->state() == v1::JOB_STATE_SUCCEEDED &&
        (missing || static_cast<std::int64_t>(size) != entry.ended->statistics().bytes())) {
      spdlog::warn("job {}: its video is damaged and will be made again", entry.origin.id);
      fs::remove(PathOf(entry.origin.id, kVideo), missing);
      entry.ended.reset();
    }
  }
  DeleteOrphans(entries);
  return entries;
}

void JobArchive::DeleteOrphans(const std::vector<Entry>& entries) const {
  std::set<std::string> known;
  for (const Entry& entry : entries) {
    const bool succeeded = entry.ended && entry.ended->state() == v1::JOB_STATE_SUCCEEDED;
    if (!entry.ended || succeeded) known.insert(entry.origin.id + kVideo);
    if (!entry.ended) known.insert(entry.origin.id + kCheckpoint);
  }
  std::error_code ignored;
  for (const auto& file : fs::directory_iterator(folder_)) {
    if (!IsOurs(file.path()) || known.contains(file.path().filename().string())) continue;
    fs::remove(file.path(), ignored);
  }
}

std::unique_ptr<ReplayBuffer> JobArchive::Video(const std::string& id) const {
  if (!durable()) return std::make_unique<ReplayBuffer>();
  return std::make_unique<ReplayBuffer>(PathOf(id, kVideo));
}

Checkpoint JobArchive::LoadCheckpoint(const std::string& id) const {
  if (!durable()) return nullptr;
  std::ifstream file(PathOf(id, kCheckpoint), std::ios::binary | std::ios::ate);
  if (!file) return nullptr;
  std::vector<std::byte> bytes(static_cast<std::size_t>(file.tellg()));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  if (!file) return nullptr;
  return std::make_shared<const std::vector<std::byte>>(std::move(bytes));
}

void JobArchive::Accept(const JobRecord::Origin& origin) {
  if (!durable()) return;
  const std::string& request_id = origin.resolved.request_id();
  std::lock_guard lock(database_mutex_);
  Statement insert(*database_,
                   "INSERT INTO jobs (id, tenant, request_id, fingerprint, request, created_us,"
                   " deadline_us, state) VALUES (?, ?, ?, ?, ?, ?, ?, ?)");
  insert.BindText(1, origin.id).BindText(2, origin.tenant);
  if (!request_id.empty()) insert.BindText(3, request_id);
  insert.BindBlob(4, origin.fingerprint).BindBlob(5, origin.resolved.SerializeAsString());
  insert.Bind(6, Micros(origin.created));
  if (origin.deadline) insert.Bind(7, Micros(*origin.deadline));
  insert.Bind(8, v1::JOB_STATE_QUEUED).Run();
}

void JobArchive::End(const v1::Job& job) {
  if (!durable()) return;
  {
    std::lock_guard lock(database_mutex_);
    Statement update(*database_, "UPDATE jobs SET state = ?, ended = ? WHERE id = ?");
    update.Bind(1, job.state()).BindBlob(2, job.SerializeAsString()).BindText(3, job.job_id());
    update.Run();
  }
  {
    // Its checkpoint must not come after its end.
    std::unique_lock lock(mutex_);
    checkpoints_.erase(job.job_id());
    changed_.wait(lock, [&] { return writing_ != job.job_id(); });
  }
  std::error_code ignored;
  fs::remove(PathOf(job.job_id(), kCheckpoint), ignored);
}

void JobArchive::KeepEnd(v1::Job job, std::function<void()> then) {
  if (!durable()) return then();
  {
    std::lock_guard lock(mutex_);
    endings_.push_back({std::move(job), std::move(then)});
  }
  changed_.notify_all();
}

void JobArchive::KeepCheckpoint(const std::string& id, Checkpoint checkpoint) {
  if (!durable()) return;
  {
    std::lock_guard lock(mutex_);
    checkpoints_[id] = std::move(checkpoint);
  }
  changed_.notify_all();
}

// Written beside, then renamed: a checkpoint is there as a whole or not at all. It is not forced to
// the disk: after a loss of power its checksum tells, and the clip begins anew.
void JobArchive::WriteCheckpoint(const std::string& id, const Checkpoint& checkpoint) const {
  const std::string path = PathOf(id, kCheckpoint);
  std::error_code error;
  {
    std::ofstream file(path + kPart, std::ios::binary | std::ios::trunc);
    file.write(reinterpret_cast<const char*>(checkpoint->data()),
               static_cast<std::streamsize>(checkpoint->size()));
    file.close();
    if (!file) error = std::error_code(errno, std::generic_category());
  }
  if (!error) fs::rename(path + kPart, path, error);
  if (!error) return;
  spdlog::warn("job {}: its checkpoint cannot be kept: {}", id, error.message());
  fs::remove(path + kPart, error);
}

void JobArchive::Keep() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stop_ || !endings_.empty() || !checkpoints_.empty(); });
    if (!endings_.empty()) {
      const std::vector<Ending> endings = std::exchange(endings_, {});
      lock.unlock();
      for (const Ending& ending : endings) {
        try {
          End(ending.job);
        } catch (const Error& error) {
          spdlog::error("job {}: its end cannot be kept: {}", ending.job.job_id(), error.what());
        }
        ending.then();
      }
      lock.lock();
    } else if (!checkpoints_.empty()) {
      const auto checkpoint = checkpoints_.extract(checkpoints_.begin());
      writing_ = checkpoint.key();
      lock.unlock();
      WriteCheckpoint(checkpoint.key(), checkpoint.mapped());
      lock.lock();
      writing_.clear();
      changed_.notify_all();
    } else if (stop_) {
      return;
    }
  }
}

void JobArchive::Forget(const std::vector<std::string>& ids) {
  if (!durable() || ids.empty()) return;
  {
    std::lock_guard lock(database_mutex_);
    database_->Execute("BEGIN");
    try {
      Statement remove(*database_, "DELETE FROM jobs WHERE id = ?");
      for (const std::string& id : ids) remove.BindText(1, id).Run();
    } catch (...) {
      database_->Execute("ROLLBACK");
      throw;
    }
    database_->Execute("COMMIT");
  }
  std::error_code ignored;
  for (const std::string& id : ids) {
    fs::remove(PathOf(id, kVideo), ignored);
    fs::remove(PathOf(id, kCheckpoint), ignored);
  }
}

void JobArchive::SetNote(const std::string& key, const std::string& value) {
  if (!durable()) return;
  std::lock_guard lock(database_mutex_);
  Statement(*database_, "INSERT OR REPLACE INTO notes (key, value) VALUES (?, ?)")
      .BindText(1, key)
      .BindBlob(2, value)
      .Run();
}

std::string JobArchive::Note(const std::string& key) const {
  if (!durable()) return {};
  std::lock_guard lock(database_mutex_);
  Statement query(*database_, "SELECT value FROM notes WHERE key = ?");
  query.BindText(1, key);
  return query.Step() ? query.Bytes(0) : std::string();
}

}  // namespace slalom
