#include "server/job_store.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "server/video_job.h"

namespace slalom {
namespace {

constexpr double kLong = 1000;

std::shared_ptr<JobRecord> MakeRecord(const JobStore& store, const std::string& id,
                                      const std::string& tenant = "",
                                      const std::string& request_id = "",
                                      const std::string& prompt = "a ball") {
  JobRecord::Origin origin;
  origin.id = id;
  origin.tenant = tenant;
  origin.resolved.set_prompt(prompt);
  origin.resolved.set_request_id(request_id);
  origin.fingerprint = prompt;
  return std::make_shared<JobRecord>(std::move(origin), store.NewVideo(id));
}

ErrorCode CodeOf(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.code();
  }
  return ErrorCode::kUnknown;
}

TEST(JobStoreTest, ATenantFindsItsOwnJobsOnly) {
  JobStore store("", kLong, 10);
  store.Add(MakeRecord(store, "a", "one"), 0);
  store.Add(MakeRecord(store, "b", "two"), 0);
  EXPECT_EQ(store.Find("a", "one")->id(), "a");
  EXPECT_EQ(CodeOf([&] { store.Find("b", "one"); }), ErrorCode::kPermissionDenied);
  EXPECT_EQ(CodeOf([&] { store.Find("c", "one"); }), ErrorCode::kNotFound);
  ASSERT_EQ(store.List("two").size(), 1u);
  EXPECT_EQ(store.List("two")[0]->id(), "b");
}

TEST(JobStoreTest, ARepeatedRequestIdIsTheSameJob) {
  JobStore store("", kLong, 10);
  const auto first = MakeRecord(store, "a", "one", "key");
  EXPECT_EQ(store.Add(first, 0), first);
  EXPECT_EQ(store.Add(MakeRecord(store, "b", "one", "key"), 0), first);
  EXPECT_EQ(CodeOf([&] { store.Add(MakeRecord(store, "c", "one", "key", "a cube"), 0); }),
            ErrorCode::kAlreadyExists);
  const auto other_tenant = MakeRecord(store, "d", "two", "key", "a cube");
  EXPECT_EQ(store.Add(other_tenant, 0), other_tenant);
  first->Fail(Error(ErrorCode::kCancelled, "gone"));
  const auto again = MakeRecord(store, "e", "one", "key");
  EXPECT_EQ(store.Add(again, 0), again) << "a failed job frees its key";
}

TEST(JobStoreTest, AQuotaCountsLiveJobs) {
  JobStore store("", kLong, 10);
  const auto first = store.Add(MakeRecord(store, "a", "one"), 2);
  store.Add(MakeRecord(store, "b", "one"), 2);
  EXPECT_EQ(CodeOf([&] { store.Add(MakeRecord(store, "c", "one"), 2); }),
            ErrorCode::kResourceExhausted);
  store.Add(MakeRecord(store, "d", "two"), 2);
  first->Fail(Error(ErrorCode::kInternal, "x"));
  store.Add(MakeRecord(store, "e", "one"), 2);
  EXPECT_EQ(store.Live().size(), 3u);
}

TEST(JobStoreTest, ForgetsWhatIsOldAndWhatIsTooMuch) {
  JobStore store("", kLong, 2);
  for (const char* id : {"a", "b", "c"}) {
    store.Add(MakeRecord(store, id), 0)->Fail(Error(ErrorCode::kInternal, "x"));
  }
  const auto live = store.Add(MakeRecord(store, "d"), 0);
  store.Sweep();
  EXPECT_EQ(CodeOf([&] { store.Find("a", ""); }), ErrorCode::kNotFound) << "the oldest";
  EXPECT_EQ(store.List("").size(), 3u);

  JobStore short_lived("", 0, 10);
  short_lived.Add(MakeRecord(short_lived, "a"), 0)->Succeed({});
  short_lived.Sweep();
  EXPECT_TRUE(short_lived.List("").empty());
}

class StoreFolderTest : public testing::Test {
 protected:
  void SetUp() override { std::filesystem::remove_all(folder_); }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  const std::string folder_ = testing::TempDir() + "/slalom_store_test";
};

TEST_F(StoreFolderTest, AnEndedJobSurvivesTheProcess) {
  {
    JobStore store(folder_, kLong, 10);
    const auto record = store.Add(MakeRecord(store, "a", "one", "key"), 0);
    record->Accept(JobHandle(), 0, 0);
    record->AppendVideo(std::as_bytes(std::span("0123456789", 10)));
    v1::Statistics statistics;
    statistics.set_frames(7);
    record->Succeed(statistics);
    store.Add(MakeRecord(store, "b", "one"), 0);  // never ends
    store.Sweep();
  }
  std::ofstream(folder_ + "/jobs/c.job.part") << "half";
  JobStore store(folder_, kLong, 10);
  const auto record = store.Find("a", "one");
  EXPECT_EQ(record->Snapshot().state(), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(record->Snapshot().statistics().frames(), 7);
  EXPECT_EQ(record->video().Read(0, 100), "0123456789");
  ReadPosition position;
  v1::GenerateVideoResponse message;
  grpc::Status status;
  ASSERT_EQ(record->Read(&position, &message, &status), JobRecord::Next::kMessage);
  EXPECT_EQ(message.accepted().job_id(), "a");
  EXPECT_EQ(store.Add(MakeRecord(store, "d", "one", "key"), 0), record) << "keys survive too";
  EXPECT_EQ(CodeOf([&] { store.Find("b", "one"); }), ErrorCode::kNotFound);
  EXPECT_FALSE(std::filesystem::exists(folder_ + "/jobs/b.mp4")) << "half a video is deleted";
  EXPECT_FALSE(std::filesystem::exists(folder_ + "/jobs/c.job.part"));
}

TEST_F(StoreFolderTest, DamagedArchivesAreDropped) {
  std::filesystem::create_directories(folder_ + "/jobs");
  std::ofstream(folder_ + "/jobs/x.mp4") << "bytes";
  std::ofstream(folder_ + "/jobs/x.job") << "\xff\xff\xff garbage";
  JobStore store(folder_, kLong, 10);
  EXPECT_TRUE(store.List("").empty());
  EXPECT_FALSE(std::filesystem::exists(folder_ + "/jobs/x.mp4"));
}

TEST_F(StoreFolderTest, AFolderThatCannotBeMadeIsAnError) {
  EXPECT_EQ(CodeOf([] { JobStore store("/proc/no", kLong, 10); }), ErrorCode::kFailedPrecondition);
}

}  // namespace
}  // namespace slalom
