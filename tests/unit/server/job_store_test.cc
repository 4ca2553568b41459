#include "server/job_store.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "server/refusal.h"
#include "server/video_job.h"
#include "tests/unit/server/job_fixture.h"

namespace slalom {
namespace {

class JobStoreTest : public testing::Test {
 protected:
  std::shared_ptr<JobRecord> MakeRecord(const std::string& id, const std::string& tenant = "",
                                        const std::string& request_id = "",
                                        const std::string& prompt = "a ball") {
    JobRecord::Origin origin = MakeOrigin(id, request_id, prompt);
    origin.tenant = tenant;
    return std::make_shared<JobRecord>(std::move(origin), archive_.Video(id));
  }
  // One that has ended well, with so many bytes.
  std::shared_ptr<JobRecord> AddVideo(JobStore& store, const std::string& id, std::size_t bytes) {
    const auto record = store.Add(MakeRecord(id), 0);
    record->Accept(JobHandle(), 0, 0);
    const std::string video(bytes, 'x');
    record->AppendVideo(std::as_bytes(std::span(video)));
    record->Succeed({});
    return record;
  }
  static bool Knows(const JobStore& store, const std::string& id) {
    try {
      store.Find(id, "");
      return true;
    } catch (const Error&) {
      return false;
    }
  }

  JobArchive archive_{""};
};

TEST_F(JobStoreTest, ATenantFindsItsOwnJobsOnly) {
  JobStore store(&archive_, {});
  store.Add(MakeRecord("a", "one"), 0);
  store.Add(MakeRecord("b", "two"), 0);
  EXPECT_EQ(store.Find("a", "one")->id(), "a");
  EXPECT_EQ(CodeOf([&] { store.Find("b", "one"); }), ErrorCode::kPermissionDenied);
  EXPECT_EQ(CodeOf([&] { store.Find("c", "one"); }), ErrorCode::kNotFound);
  ASSERT_EQ(store.List("two").size(), 1u);
  EXPECT_EQ(store.List("two")[0].record->id(), "b");
}

TEST_F(JobStoreTest, ListsATenantsNewestFirstFromWhereItIsAsked) {
  JobStore store(&archive_, {});
  for (const char* id : {"a", "b", "c", "d", "e"}) {
    store.Add(MakeRecord(id, "one"), 0);
    store.Add(MakeRecord(std::string("other-") + id, "two"), 0);
  }
  const auto ids = [](const std::vector<JobStore::Listed>& jobs) {
    std::string all;
    for (const auto& job : jobs) all += job.record->id();
    return all;
  };
  EXPECT_EQ(ids(store.List("one")), "edcba");
  const auto page = store.List("one", std::numeric_limits<std::uint64_t>::max(), 2);
  EXPECT_EQ(ids(page), "ed");
  store.Remove("d");
  EXPECT_EQ(ids(store.List("one", page.back().sequence, 2)), "cb") << "its last job is gone";
  EXPECT_EQ(ids(store.List("one", store.List("one").back().sequence)), "");
  for (const char* id : {"a", "b", "c", "e"}) store.Remove(id);
  EXPECT_TRUE(store.List("one").empty());
  EXPECT_EQ(store.List("two").size(), 5u);
  EXPECT_TRUE(store.List("nobody").empty());
}

TEST_F(JobStoreTest, ARepeatedRequestIdIsTheSameJob) {
  JobStore store(&archive_, {});
  const auto first = MakeRecord("a", "one", "key");
  EXPECT_EQ(store.Add(first, 0), first);
  EXPECT_EQ(store.Add(MakeRecord("b", "one", "key"), 0), first);
  EXPECT_EQ(CodeOf([&] { store.Add(MakeRecord("c", "one", "key", "a cube"), 0); }),
            ErrorCode::kAlreadyExists);
  const auto other_tenant = MakeRecord("d", "two", "key", "a cube");
  EXPECT_EQ(store.Add(other_tenant, 0), other_tenant);
  first->Fail(Error(ErrorCode::kCancelled, "gone"));
  const auto again = MakeRecord("e", "one", "key");
  EXPECT_EQ(store.Add(again, 0), again) << "a failed job frees its key";
}

TEST_F(JobStoreTest, AQuotaCountsLiveJobs) {
  JobStore store(&archive_, {});
  const auto first = store.Add(MakeRecord("a", "one"), 2);
  store.Add(MakeRecord("b", "one"), 2);
  try {
    store.Add(MakeRecord("c", "one"), 2);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Refusal& refusal) {
    EXPECT_EQ(refusal.code(), ErrorCode::kResourceExhausted);
    EXPECT_STREQ(refusal.reason(), "quota");
  }
  store.Add(MakeRecord("d", "two"), 2);
  first->Fail(Error(ErrorCode::kInternal, "x"));
  store.Add(MakeRecord("e", "one"), 2);
  EXPECT_EQ(store.Live().size(), 3u);
}

TEST_F(JobStoreTest, ForgetsWhatIsOldAndWhatIsTooMuch) {
  JobStore store(&archive_, {1000, 2, 0});
  for (const char* id : {"a", "b", "c"}) {
    store.Add(MakeRecord(id), 0)->Fail(Error(ErrorCode::kInternal, "x"));
  }
  store.Add(MakeRecord("d"), 0);
  store.Sweep();
  EXPECT_FALSE(Knows(store, "a")) << "the oldest";
  EXPECT_EQ(store.List("").size(), 3u);

  JobStore short_lived(&archive_, {0, 10, 0});
  AddVideo(short_lived, "e", 10);
  short_lived.Sweep();
  EXPECT_TRUE(short_lived.List("").empty());
}

TEST_F(JobStoreTest, VideosAreBoundedInBytesAndFetchedOnesGoFirst) {
  JobStore store(&archive_, {1000, 100, 250});
  AddVideo(store, "a", 100);
  const auto fetched = AddVideo(store, "b", 100);
  AddVideo(store, "c", 100);
  ReadPosition position;
  v1::GenerateVideoResponse message;
  grpc::Status status;
  while (fetched->Read(&position, &message, &status) == JobRecord::Next::kMessage) message.Clear();
  EXPECT_TRUE(fetched->fetched());
  EXPECT_EQ(store.kept().video_bytes, 300);
  store.Sweep();
  EXPECT_FALSE(Knows(store, "b"));
  EXPECT_EQ(store.kept().video_bytes, 200);
  AddVideo(store, "d", 100);
  const int reader = store.Find("a", "")->AddReader([] {});
  store.Sweep();
  EXPECT_TRUE(Knows(store, "a")) << "somebody is reading it";
  EXPECT_FALSE(Knows(store, "c"));
  store.Find("a", "")->RemoveReader(reader, Error(ErrorCode::kCancelled, ""));
}

}  // namespace
}  // namespace slalom
