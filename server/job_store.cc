#include "server/job_store.h"

#include <google/protobuf/io/zero_copy_stream_impl.h>
#include <google/protobuf/util/delimited_message_util.h>
#include <google/protobuf/wrappers.pb.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <utility>

#include "kernels/core/error.h"
#include "server/video_job.h"

namespace slalom {
namespace {

namespace fs = std::filesystem;

constexpr const char* kVideo = ".mp4";
constexpr const char* kArchive = ".job";
// The scheduler has let go of a job's sink a moment after its end.
constexpr double kSinkGraceSeconds = 1.0;

std::string RequestKey(const JobRecord& record) {
  const std::string& request_id = record.origin().resolved.request_id();
  return request_id.empty() ? "" : record.tenant() + "\n" + request_id;
}

// An archive is four delimited messages: tenant, fingerprint, resolved request, job.
struct Archived {
  google::protobuf::StringValue tenant;
  google::protobuf::BytesValue fingerprint;
  v1::GenerateVideoRequest resolved;
  v1::Job job;

  bool Read(const std::string& path) {
    using google::protobuf::util::ParseDelimitedFromZeroCopyStream;
    std::ifstream file(path, std::ios::binary);
    google::protobuf::io::IstreamInputStream stream(&file);
    const auto read = [&](google::protobuf::MessageLite* message) {
      return ParseDelimitedFromZeroCopyStream(message, &stream, nullptr);
    };
    return read(&tenant) && read(&fingerprint) && read(&resolved) && read(&job);
  }

  bool Write(const std::string& path) const {
    using google::protobuf::util::SerializeDelimitedToOstream;
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    const bool written = SerializeDelimitedToOstream(tenant, &file) &&
                         SerializeDelimitedToOstream(fingerprint, &file) &&
                         SerializeDelimitedToOstream(resolved, &file) &&
                         SerializeDelimitedToOstream(job, &file);
    file.close();
    return written && file.good();
  }
};

}  // namespace

JobStore::JobStore(std::string folder, double retention_seconds, int max_kept)
    : folder_(folder.empty() ? "" : (fs::path(folder) / "jobs").string()),
      retention_seconds_(retention_seconds),
      max_kept_(max_kept) {
  if (folder_.empty()) return;
  std::error_code error;
  fs::create_directories(folder_, error);
  if (error) {
    throw Error(ErrorCode::kFailedPrecondition,
                "state_dir: cannot create '" + folder_ + "': " + error.message());
  }
  TakeOver();
}

JobStore::~JobStore() = default;

std::string JobStore::PathOf(const std::string& id, const char* extension) const {
  return (fs::path(folder_) / (id + extension)).string();
}

std::unique_ptr<ReplayBuffer> JobStore::NewVideo(const std::string& id) const {
  if (folder_.empty()) return std::make_unique<ReplayBuffer>();
  return std::make_unique<ReplayBuffer>(PathOf(id, kVideo));
}

void JobStore::TakeOver() {
  std::vector<fs::path> videos;
  std::vector<fs::path> orphans;
  for (const auto& entry : fs::directory_iterator(folder_)) {
    const fs::path& path = entry.path();
    if (path.extension() == kVideo) {
      videos.push_back(path);
    } else if (path.extension() == ".part" ||
               (path.extension() == kArchive && !fs::exists(PathOf(path.stem(), kVideo)))) {
      orphans.push_back(path);
    }
  }
  for (const fs::path& orphan : orphans) fs::remove(orphan);
  for (const fs::path& video : videos) {
    const std::string id = video.stem().string();
    Archived archived;
    std::error_code ignored;
    const bool complete = archived.Read(PathOf(id, kArchive)) && archived.job.job_id() == id &&
                          static_cast<std::int64_t>(fs::file_size(video, ignored)) ==
                              archived.job.statistics().bytes();
    if (!complete) {
      fs::remove(video, ignored);
      fs::remove(PathOf(id, kArchive), ignored);
      continue;
    }
    JobRecord::Origin origin;
    origin.id = id;
    origin.tenant = archived.tenant.value();
    origin.fingerprint = archived.fingerprint.value();
    origin.resolved = archived.resolved;
    auto record = std::make_shared<JobRecord>(std::move(origin), ReplayBuffer::Open(video.string()),
                                              archived.job);
    const std::string key = RequestKey(*record);
    if (!key.empty()) by_request_id_[key] = id;
    entries_[id] = {std::move(record), nullptr, next_sequence_++, true};
  }
}

void JobStore::Archive(const JobRecord& record) const {
  Archived archived;
  archived.tenant.set_value(record.tenant());
  archived.fingerprint.set_value(record.origin().fingerprint);
  archived.resolved = record.origin().resolved;
  archived.job = record.Snapshot();
  // Written beside, then renamed: a crash leaves no half archive.
  const std::string path = PathOf(record.id(), kArchive);
  std::error_code ignored;
  if (archived.Write(path + ".part")) {
    fs::rename(path + ".part", path, ignored);
  } else {
    fs::remove(path + ".part", ignored);
  }
}

void JobStore::Forget(const JobRecord& record) const {
  record.video().Remove();
  if (folder_.empty()) return;
  std::error_code ignored;
  fs::remove(PathOf(record.id(), kArchive), ignored);
}

std::shared_ptr<JobRecord> JobStore::Add(std::shared_ptr<JobRecord> record, int max_live) {
  std::lock_guard lock(mutex_);
  const std::string key = RequestKey(*record);
  if (const auto known = by_request_id_.find(key); !key.empty() && known != by_request_id_.end()) {
    const std::shared_ptr<JobRecord>& earlier = entries_.at(known->second).record;
    const bool failed = earlier->ended() && !earlier->succeeded();
    if (!failed && earlier->origin().fingerprint != record->origin().fingerprint) {
      throw Error(ErrorCode::kAlreadyExists, "request_id: '" +
                                                 record->origin().resolved.request_id() +
                                                 "' stands for another request (job " +
                                                 earlier->id() + "); give each request its own");
    }
    if (!failed) return earlier;
  }
  if (max_live > 0) {
    const auto live = std::count_if(entries_.begin(), entries_.end(), [&](const auto& item) {
      return item.second.record->tenant() == record->tenant() && !item.second.record->ended();
    });
    if (live >= max_live) {
      throw Error(ErrorCode::kResourceExhausted, "tenant '" + record->tenant() + "' has " +
                                                     std::to_string(live) + " jobs; its quota is " +
                                                     std::to_string(max_live) + " at a time");
    }
  }
  if (!key.empty()) by_request_id_[key] = record->id();
  entries_[record->id()] = {record, nullptr, next_sequence_++, false};
  return record;
}

void JobStore::Attach(const std::string& id, std::shared_ptr<VideoJob> sink) {
  std::lock_guard lock(mutex_);
  const auto entry = entries_.find(id);
  if (entry != entries_.end()) entry->second.sink = std::move(sink);
}

void JobStore::Remove(const std::string& id) {
  Entry removed;  // destroyed without the lock
  {
    std::lock_guard lock(mutex_);
    const auto entry = entries_.find(id);
    if (entry == entries_.end()) return;
    removed = std::move(entry->second);
    entries_.erase(entry);
    const auto key = by_request_id_.find(RequestKey(*removed.record));
    if (key != by_request_id_.end() && key->second == id) by_request_id_.erase(key);
  }
  Forget(*removed.record);
}

std::shared_ptr<JobRecord> JobStore::Find(const std::string& id, const std::string& tenant) const {
  std::lock_guard lock(mutex_);
  const auto entry = entries_.find(id);
  if (entry == entries_.end()) {
    throw Error(ErrorCode::kNotFound,
                "job_id: there is no job '" + id + "'; ended jobs are forgotten after a while");
  }
  if (entry->second.record->tenant() != tenant) {
    throw Error(ErrorCode::kPermissionDenied, "job_id: '" + id + "' is another tenant's job");
  }
  return entry->second.record;
}

std::vector<std::shared_ptr<JobRecord>> JobStore::List(const std::string& tenant) const {
  std::vector<const Entry*> found;
  std::lock_guard lock(mutex_);
  for (const auto& [id, entry] : entries_) {
    if (entry.record->tenant() == tenant) found.push_back(&entry);
  }
  std::sort(found.begin(), found.end(),
            [](const Entry* a, const Entry* b) { return a->sequence > b->sequence; });
  std::vector<std::shared_ptr<JobRecord>> records;
  records.reserve(found.size());
  for (const Entry* entry : found) records.push_back(entry->record);
  return records;
}

std::vector<std::shared_ptr<JobRecord>> JobStore::Live() const {
  std::vector<std::shared_ptr<JobRecord>> records;
  std::lock_guard lock(mutex_);
  for (const auto& [id, entry] : entries_) {
    if (!entry.record->ended()) records.push_back(entry.record);
  }
  return records;
}

void JobStore::Sweep() {
  std::vector<std::shared_ptr<VideoJob>> sinks;  // their encoders are joined without the lock
  std::vector<std::shared_ptr<JobRecord>> archive;
  std::vector<std::pair<std::uint64_t, std::string>> ended;
  std::vector<std::string> forget;
  {
    std::lock_guard lock(mutex_);
    for (auto& [id, entry] : entries_) {
      if (!entry.record->ended()) continue;
      const double age = entry.record->seconds_since_end();
      if (entry.sink && age > kSinkGraceSeconds) sinks.push_back(std::move(entry.sink));
      if (!entry.archived && !folder_.empty() && entry.record->succeeded()) {
        entry.archived = true;
        archive.push_back(entry.record);
      }
      if (age > retention_seconds_) {
        forget.push_back(id);
      } else {
        ended.emplace_back(entry.sequence, id);
      }
    }
  }
  std::sort(ended.begin(), ended.end());
  for (std::size_t i = 0; i + static_cast<std::size_t>(max_kept_) < ended.size(); ++i) {
    forget.push_back(ended[i].second);
  }
  for (const auto& record : archive) Archive(*record);
  for (const std::string& id : forget) Remove(id);
}

}  // namespace slalom
