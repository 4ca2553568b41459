// What survives a process: the archive by itself, and the store over it.
#include "server/job_archive.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <future>
#include <set>
#include <string>

#include "server/job_id.h"
#include "server/job_store.h"
#include "server/video_job.h"
#include "tests/unit/server/job_fixture.h"

namespace slalom {
namespace {

namespace fs = std::filesystem;

Checkpoint MakeCheckpoint(const std::string& text) {
  const auto bytes = std::as_bytes(std::span(text));
  return std::make_shared<const std::vector<std::byte>>(bytes.begin(), bytes.end());
}

class JobArchiveTest : public testing::Test {
 protected:
  void SetUp() override { fs::remove_all(folder_); }
  void TearDown() override { fs::remove_all(folder_); }

  static v1::Job Job(const std::string& id, v1::JobState state, std::int64_t bytes = 0) {
    v1::Job job;
    job.set_job_id(id);
    job.set_state(state);
    job.mutable_statistics()->set_bytes(bytes);
    if (state != v1::JOB_STATE_SUCCEEDED) job.mutable_error()->set_code(1);
    return job;
  }
  static void Write(JobArchive& archive, const std::string& id, const std::string& text) {
    archive.Video(id)->Append(std::as_bytes(std::span(text)));
  }
  std::string FileOf(const std::string& name) const { return folder_ + "/jobs/" + name; }

  // Of this process: cases may run side by side.
  const std::string folder_ =
      testing::TempDir() + "/slalom_archive_test_" + std::to_string(getpid());
};

TEST_F(JobArchiveTest, WhatIsAcceptedIsThereUntilItIsForgotten) {
  {
    JobArchive archive(folder_);
    for (const char* id : {"c", "a", "b"}) archive.Accept(MakeOrigin(id, id));
    archive.End(Job("a", v1::JOB_STATE_CANCELLED));
    archive.SetNote("cost", std::string("1\0002", 3));
  }
  JobArchive archive(folder_);
  EXPECT_EQ(archive.Note("cost"), std::string("1\0002", 3));
  EXPECT_EQ(archive.Note("other"), "");
  auto entries = archive.Load();
  ASSERT_EQ(entries.size(), 3u);
  EXPECT_EQ(entries[0].origin.id, "c") << "in the order of acceptance";
  EXPECT_EQ(entries[0].origin.tenant, "one");
  EXPECT_EQ(entries[0].origin.fingerprint, MakeOrigin("c").fingerprint);
  EXPECT_EQ(entries[0].origin.resolved.prompt(), "a ball");
  ASSERT_TRUE(entries[0].origin.deadline);
  EXPECT_FALSE(entries[0].ended);
  EXPECT_EQ(entries[1].ended->state(), v1::JOB_STATE_CANCELLED);
  archive.Forget({"c", "b"});
  EXPECT_EQ(archive.Load().size(), 1u);
}

TEST_F(JobArchiveTest, ARequestIdBelongsToOneLiveOrSuccessfulJob) {
  JobArchive archive(folder_);
  archive.Accept(MakeOrigin("a", "key"));
  EXPECT_EQ(CodeOf([&] { archive.Accept(MakeOrigin("b", "key")); }), ErrorCode::kInternal);
  archive.End(Job("a", v1::JOB_STATE_FAILED));
  archive.Accept(MakeOrigin("c", "key"));
  archive.Accept(MakeOrigin("d"));
  archive.Accept(MakeOrigin("e"));
}

TEST_F(JobArchiveTest, OnlyTheNewestCheckpointOfALiveJobIsKept) {
  {
    JobArchive archive(folder_);
    archive.Accept(MakeOrigin("a"));
    archive.Accept(MakeOrigin("b"));
    for (int i = 0; i < 50; ++i) archive.KeepCheckpoint("a", MakeCheckpoint(std::to_string(i)));
    archive.KeepCheckpoint("b", MakeCheckpoint("b"));
    std::promise<void> ended;
    archive.KeepEnd(Job("b", v1::JOB_STATE_FAILED), [&] { ended.set_value(); });
    ended.get_future().wait();
    EXPECT_FALSE(fs::exists(FileOf("b.latent")));
  }
  JobArchive archive(folder_);
  archive.Load();
  ASSERT_TRUE(archive.LoadCheckpoint("a"));
  EXPECT_EQ(*archive.LoadCheckpoint("a"), *MakeCheckpoint("49"));
  EXPECT_FALSE(archive.LoadCheckpoint("b"));
}

TEST_F(JobArchiveTest, FilesThatBelongToNoJobAreDeleted) {
  const std::string live = NewJobId();
  const std::string done = NewJobId();
  const std::string failed = NewJobId();
  const std::string damaged = NewJobId();
  {
    JobArchive archive(folder_);
    for (const std::string& id : {live, done, failed, damaged}) {
      archive.Accept(MakeOrigin(id));
      Write(archive, id, "0123456789");
    }
    archive.End(Job(done, v1::JOB_STATE_SUCCEEDED, 10));
    archive.End(Job(failed, v1::JOB_STATE_FAILED));
    archive.End(Job(damaged, v1::JOB_STATE_SUCCEEDED, 11));
  }
  std::ofstream(FileOf(NewJobId() + ".mp4")) << "x";
  std::ofstream(FileOf(live + ".latent.part")) << "half";
  JobArchive archive(folder_);
  for (const auto& entry : archive.Load()) {
    const bool ended = entry.origin.id == done || entry.origin.id == failed;
    EXPECT_EQ(entry.ended.has_value(), ended) << entry.origin.id;
  }
  std::set<std::string> files;
  for (const auto& file : fs::directory_iterator(folder_ + "/jobs")) {
    files.insert(file.path().filename());
  }
  EXPECT_EQ(files, (std::set<std::string>{live + ".mp4", done + ".mp4"}));
}

TEST_F(JobArchiveTest, OtherPeoplesFilesAreLeftAlone) {
  fs::create_directories(folder_ + "/jobs/empty");
  const std::set<std::string> files = {"thesis.txt", "holiday.mp4", NewJobId(),
                                       NewJobId() + ".mp4.bak"};
  for (const std::string& name : files) std::ofstream(FileOf(name)) << "x";
  JobArchive archive(folder_);
  EXPECT_TRUE(archive.Load().empty());
  for (const std::string& name : files) EXPECT_TRUE(fs::exists(FileOf(name))) << name;
  EXPECT_TRUE(fs::exists(FileOf("empty")));
}

TEST_F(JobArchiveTest, TwoServersCannotShareAFolder) {
  JobArchive archive(folder_);
  archive.Accept(MakeOrigin("a"));
  EXPECT_EQ(CodeOf([&] { JobArchive second(folder_); }), ErrorCode::kFailedPrecondition);
}

TEST_F(JobArchiveTest, ADamagedDatabaseIsDataLossAndIsLeftAlone) {
  fs::create_directories(folder_);
  std::ofstream(folder_ + "/slalom.db") << std::string(5000, 'x');
  EXPECT_EQ(CodeOf([&] { JobArchive archive(folder_); }), ErrorCode::kDataLoss);
  EXPECT_EQ(fs::file_size(folder_ + "/slalom.db"), 5000u);
  EXPECT_EQ(CodeOf([] { JobArchive archive("/proc/no"); }), ErrorCode::kFailedPrecondition);
}

TEST_F(JobArchiveTest, TheStoreTakesOver) {
  {
    JobArchive archive(folder_);
    JobStore store(&archive, {});
    const auto record =
        store.Add(std::make_shared<JobRecord>(MakeOrigin("a", "key"), archive.Video("a")), 0);
    archive.Accept(record->origin());
    record->Accept(JobHandle(), 0, 0);
    record->AppendVideo(std::as_bytes(std::span("0123456789", 10)));
    v1::Statistics statistics;
    statistics.set_frames(7);
    archive.End(record->Succeeded(statistics));
    archive.Accept(MakeOrigin("b", "other"));
    Write(archive, "b", "half");
  }
  JobArchive archive(folder_);
  JobStore store(&archive, {});
  const auto record = store.Find("a", "one");
  EXPECT_EQ(record->Snapshot().state(), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(record->Snapshot().statistics().frames(), 7);
  EXPECT_EQ(record->video().Read(0, 100), "0123456789");
  EXPECT_LT(record->seconds_since_end(), 60);
  ASSERT_EQ(store.Live().size(), 1u);
  EXPECT_TRUE(store.Live()[0]->origin().readmitted);
  EXPECT_EQ(store.Live()[0]->video().size(), 4) << "what readers may have of it";
  auto repeated = MakeOrigin("c", "key");
  EXPECT_EQ(store.Add(std::make_shared<JobRecord>(repeated, archive.Video("c")), 0), record);
}

}  // namespace
}  // namespace slalom
