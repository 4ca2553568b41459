#include "server/job_store.h"

#include <algorithm>
#include <utility>

#include "kernels/core/error.h"
#include "server/refusal.h"
#include "server/video_job.h"

namespace slalom {
namespace {

// The scheduler has let go of a job's sink a moment after its end.
constexpr double kSinkGraceSeconds = 1.0;

std::string RequestKey(const JobRecord& record) {
  const std::string& request_id = record.origin().resolved.request_id();
  return request_id.empty() ? "" : record.tenant() + "\n" + request_id;
}

}  // namespace

JobStore::JobStore(JobArchive* archive, RetentionLimits limits)
    : archive_(archive), limits_(limits) {
  TakeOver();
}

JobStore::~JobStore() = default;

void JobStore::TakeOver() {
  for (JobArchive::Entry& known : archive_->Load()) {
    known.origin.readmitted = true;
    auto video = archive_->Video(known.origin.id);
    auto record =
        known.ended
            ? std::make_shared<JobRecord>(std::move(known.origin), std::move(video), *known.ended)
            : std::make_shared<JobRecord>(std::move(known.origin), std::move(video));
    const std::string key = RequestKey(*record);
    if (!key.empty() && !Dead(*record)) by_request_id_[key] = record->id();
    Enter(std::move(record));
  }
}

// With the lock held.
void JobStore::Enter(std::shared_ptr<JobRecord> record) {
  const std::uint64_t sequence = next_sequence_++;
  by_tenant_[record->tenant()][sequence] = record;
  const std::string id = record->id();
  entries_[id] = {std::move(record), nullptr, sequence};
}

bool JobStore::Parked(const JobRecord& record) const {
  return archive_->durable() && record.error_code() == ErrorCode::kUnavailable;
}

bool JobStore::Dead(const JobRecord& record) const {
  return record.error_code().has_value() && !Parked(record);
}

std::shared_ptr<JobRecord> JobStore::Add(std::shared_ptr<JobRecord> record, int max_live) {
  std::lock_guard lock(mutex_);
  const std::string key = RequestKey(*record);
  if (const auto known = by_request_id_.find(key); !key.empty() && known != by_request_id_.end()) {
    const std::shared_ptr<JobRecord>& earlier = entries_.at(known->second).record;
    const bool dead = Dead(*earlier);
    if (!dead && earlier->origin().fingerprint != record->origin().fingerprint) {
      throw Error(ErrorCode::kAlreadyExists, "request_id: '" +
                                                 record->origin().resolved.request_id() +
                                                 "' stands for another request (job " +
                                                 earlier->id() + "); give each request its own");
    }
    if (!dead) return earlier;
  }
  if (max_live > 0) {
    const auto own = by_tenant_.find(record->tenant());
    const auto live =
        own == by_tenant_.end() ? 0 : std::ranges::count_if(own->second, [](const auto& item) {
          return !item.second->ended();
        });
    if (live >= max_live) {
      throw Refusal("quota", "tenant '" + record->tenant() + "' has " + std::to_string(live) +
                                 " jobs; its quota is " + std::to_string(max_live) + " at a time");
    }
  }
  if (!key.empty()) by_request_id_[key] = record->id();
  Enter(record);
  return record;
}

void JobStore::Attach(const std::string& id, std::shared_ptr<VideoJob> sink) {
  std::lock_guard lock(mutex_);
  const auto entry = entries_.find(id);
  if (entry != entries_.end()) entry->second.sink = std::move(sink);
}

// With the lock held.
JobStore::Entry JobStore::Take(const std::string& id) {
  const auto entry = entries_.find(id);
  if (entry == entries_.end()) return {};
  Entry taken = std::move(entry->second);
  entries_.erase(entry);
  const auto own = by_tenant_.find(taken.record->tenant());
  own->second.erase(taken.sequence);
  if (own->second.empty()) by_tenant_.erase(own);
  const auto key = by_request_id_.find(RequestKey(*taken.record));
  if (key != by_request_id_.end() && key->second == id) by_request_id_.erase(key);
  return taken;
}

void JobStore::Remove(const std::string& id) {
  Entry removed;  // destroyed without the lock
  {
    std::lock_guard lock(mutex_);
    removed = Take(id);
  }
  if (removed.record) removed.record->video().Remove();
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

std::vector<JobStore::Listed> JobStore::List(const std::string& tenant, std::uint64_t before,
                                             std::size_t most) const {
  std::vector<Listed> found;
  std::lock_guard lock(mutex_);
  const auto own = by_tenant_.find(tenant);
  if (own == by_tenant_.end()) return found;
  for (auto job = own->second.lower_bound(before);
       job != own->second.begin() && found.size() < most;) {
    --job;
    found.push_back({job->first, job->second});
  }
  return found;
}

std::vector<std::shared_ptr<JobRecord>> JobStore::Live() const {
  std::vector<const Entry*> found;
  std::lock_guard lock(mutex_);
  for (const auto& [id, entry] : entries_) {
    if (!entry.record->ended()) found.push_back(&entry);
  }
  std::sort(found.begin(), found.end(),
            [](const Entry* a, const Entry* b) { return a->sequence < b->sequence; });
  std::vector<std::shared_ptr<JobRecord>> records;
  records.reserve(found.size());
  for (const Entry* entry : found) records.push_back(entry->record);
  return records;
}

JobStore::Kept JobStore::kept() const {
  Kept kept;
  std::lock_guard lock(mutex_);
  for (const auto& [id, entry] : entries_) {
    if (!entry.record->ended()) continue;
    ++kept.jobs;
    kept.video_bytes += entry.record->video().size();
  }
  return kept;
}

// With the lock held.
std::vector<std::string> JobStore::WhatToForget(std::vector<std::shared_ptr<VideoJob>>* done) {
  struct Candidate {
    bool fetched;
    std::uint64_t sequence;
    std::string id;
    std::int64_t bytes;
  };
  std::vector<std::string> forget;
  std::vector<Candidate> candidates;
  std::int64_t bytes = 0;
  std::size_t jobs = 0;
  for (auto& [id, entry] : entries_) {
    const JobRecord& record = *entry.record;
    if (!record.ended()) continue;
    const double age = record.seconds_since_end();
    if (entry.sink && age > kSinkGraceSeconds) done->push_back(std::move(entry.sink));
    if (Parked(record)) continue;
    const std::int64_t size = record.video().size();
    if (age > limits_.seconds && !record.has_readers()) {
      forget.push_back(id);
      continue;
    }
    ++jobs;
    bytes += size;
    // A reader that is still at it keeps its job.
    if (!record.has_readers()) candidates.push_back({record.fetched(), entry.sequence, id, size});
  }
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return a.fetched != b.fetched ? a.fetched : a.sequence < b.sequence;
  });
  for (const Candidate& candidate : candidates) {
    const bool too_many = jobs > static_cast<std::size_t>(limits_.jobs);
    const bool too_large = limits_.video_bytes > 0 && bytes > limits_.video_bytes;
    if (!too_many && !(too_large && candidate.bytes > 0)) continue;
    forget.push_back(candidate.id);
    --jobs;
    bytes -= candidate.bytes;
  }
  return forget;
}

void JobStore::Sweep() {
  std::vector<std::shared_ptr<VideoJob>> done;  // their encoders are joined without the lock
  std::vector<Entry> removed;
  std::vector<std::string> forget;
  {
    std::lock_guard lock(mutex_);
    forget = WhatToForget(&done);
    for (const std::string& id : forget) removed.push_back(Take(id));
  }
  archive_->Forget(forget);
  for (const Entry& entry : removed) entry.record->video().Remove();
}

}  // namespace slalom
