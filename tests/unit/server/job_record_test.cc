#include "server/job_record.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace slalom {
namespace {

std::shared_ptr<JobRecord> MakeRecord(bool detached = false) {
  JobRecord::Origin origin;
  origin.id = "job1";
  origin.resolved.set_detached(detached);
  return std::make_shared<JobRecord>(std::move(origin), std::make_unique<ReplayBuffer>());
}

std::span<const std::byte> Bytes(const std::string& text) { return std::as_bytes(std::span(text)); }

// Everything that a reader would be sent now; the status, if its stream ends.
struct Reading {
  std::vector<v1::GenerateVideoResponse> messages;
  std::optional<grpc::Status> end;
  std::string bytes;
};

Reading ReadAll(const JobRecord& record, ReadPosition* position) {
  Reading reading;
  while (true) {
    v1::GenerateVideoResponse message;
    grpc::Status status;
    const JobRecord::Next next = record.Read(position, &message, &status);
    if (next == JobRecord::Next::kWait) return reading;
    if (next == JobRecord::Next::kEnd) {
      reading.end = status;
      return reading;
    }
    if (message.has_video_chunk()) {
      EXPECT_EQ(message.video_chunk().offset() + message.video_chunk().data().size(),
                static_cast<std::uint64_t>(position->offset));
      reading.bytes += message.video_chunk().data();
    }
    reading.messages.push_back(message);
  }
}

v1::Progress At(v1::Stage stage, int step) {
  v1::Progress progress;
  progress.set_stage(stage);
  progress.set_step(step);
  return progress;
}

TEST(JobRecordTest, AStreamStartsWithAcceptedAndEndsWithCompleted) {
  const auto record = MakeRecord();
  ReadPosition position;
  EXPECT_TRUE(ReadAll(*record, &position).messages.empty());
  record->Accept(JobHandle(), 3, 12.5);
  Reading first = ReadAll(*record, &position);
  ASSERT_EQ(first.messages.size(), 1u);
  EXPECT_EQ(first.messages[0].accepted().job_id(), "job1");
  EXPECT_EQ(first.messages[0].accepted().queue_position(), 3);
  record->SetProgress(At(v1::STAGE_DENOISE, 1));
  record->AppendVideo(Bytes("abc"));
  record->Succeed({});
  const Reading rest = ReadAll(*record, &position);
  ASSERT_GE(rest.messages.size(), 2u);
  EXPECT_EQ(rest.bytes, "abc");
  EXPECT_TRUE(rest.messages.back().has_completed());
  EXPECT_EQ(rest.messages.back().completed().statistics().bytes(), 3);
  ASSERT_TRUE(rest.end);
  EXPECT_TRUE(rest.end->ok());
}

TEST(JobRecordTest, ASlowReaderMissesProgressButNoByte) {
  const auto record = MakeRecord();
  record->Accept(JobHandle(), 0, 0);
  ReadPosition position;
  ReadAll(*record, &position);
  std::string all;
  for (int i = 0; i < 100; ++i) {
    record->SetProgress(At(v1::STAGE_DECODE, i));
    record->AppendVideo(Bytes(std::string(9000, static_cast<char>(i))));
    all += std::string(9000, static_cast<char>(i));
  }
  const Reading reading = ReadAll(*record, &position);
  EXPECT_EQ(reading.bytes, all);
  EXPECT_EQ(reading.messages[0].progress().step(), 99);
  EXPECT_LE(reading.messages.size(), 15u) << "chunks are merged up to 64 KiB";
}

TEST(JobRecordTest, ReadersResumeAtAnyByte) {
  const auto record = MakeRecord();
  record->Accept(JobHandle(), 0, 0);
  record->AppendVideo(Bytes("0123456789"));
  record->Succeed({});
  for (std::int64_t offset = 0; offset <= 10; ++offset) {
    ReadPosition position;
    position.offset = offset;
    const Reading reading = ReadAll(*record, &position);
    EXPECT_EQ(reading.bytes, std::string("0123456789").substr(static_cast<std::size_t>(offset)));
    EXPECT_TRUE(reading.messages.front().has_accepted());
    EXPECT_TRUE(reading.messages.back().has_completed());
  }
}

TEST(JobRecordTest, AnOffsetBeyondTheVideoIsOutOfRangeOnceItsLengthIsKnown) {
  const auto record = MakeRecord();
  record->Accept(JobHandle(), 0, 0);
  record->AppendVideo(Bytes("0123"));
  ReadPosition position;
  position.offset = 11;
  EXPECT_FALSE(ReadAll(*record, &position).end) << "it may come to that";
  record->AppendVideo(Bytes("456789"));
  record->Succeed({});
  const Reading reading = ReadAll(*record, &position);
  ASSERT_TRUE(reading.end);
  EXPECT_EQ(reading.end->error_code(), grpc::StatusCode::OUT_OF_RANGE);
  EXPECT_NE(reading.end->error_message().find("10 bytes"), std::string::npos);
  EXPECT_TRUE(reading.messages.empty());
}

TEST(JobRecordTest, AFailureEndsEveryReaderWithItsCode) {
  const auto record = MakeRecord();
  record->Accept(JobHandle(), 0, 0);
  record->AppendVideo(Bytes("part"));
  record->Fail(Error(ErrorCode::kInternal, "non-finite at step 3"));
  record->Succeed({});  // too late
  ReadPosition position;
  const Reading reading = ReadAll(*record, &position);
  ASSERT_TRUE(reading.end);
  EXPECT_EQ(reading.end->error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(record->Snapshot().state(), v1::JOB_STATE_FAILED);
  EXPECT_EQ(record->Snapshot().error().message(), "non-finite at step 3");
  EXPECT_TRUE(reading.messages.empty());
}

TEST(JobRecordTest, WakesEveryReaderUntilItLeaves) {
  const auto record = MakeRecord(true);
  int first = 0;
  int second = 0;
  const int a = record->AddReader([&] { ++first; });
  record->AddReader([&] { ++second; });
  record->Accept(JobHandle(), 0, 0);
  record->RemoveReader(a, Error(ErrorCode::kCancelled, "gone"));
  record->AppendVideo(Bytes("x"));
  EXPECT_EQ(first, 1);
  EXPECT_EQ(second, 2);
}

TEST(JobRecordTest, QueuePositionsAreToldWhileItWaits) {
  const auto record = MakeRecord();
  record->Accept(JobHandle(), 2, 30);
  ReadPosition position;
  ReadAll(*record, &position);
  record->SetQueuePosition(2, 29);
  EXPECT_TRUE(ReadAll(*record, &position).messages.empty()) << "nothing new";
  record->SetQueuePosition(1, 15);
  const Reading reading = ReadAll(*record, &position);
  ASSERT_EQ(reading.messages.size(), 1u);
  EXPECT_EQ(reading.messages[0].progress().queue_position(), 1);
  record->SetProgress(At(v1::STAGE_DENOISE, 0));
  EXPECT_EQ(record->Snapshot().state(), v1::JOB_STATE_RUNNING);
  record->SetQueuePosition(5, 1);
  EXPECT_EQ(record->Snapshot().progress().queue_position(), 0);
}

TEST(JobRecordTest, SmallMovesFarBackInTheQueueAreNotTold) {
  const auto record = MakeRecord();
  record->Accept(JobHandle(), 800, 30);
  ReadPosition position;
  ReadAll(*record, &position);
  record->SetQueuePosition(721, 29);
  EXPECT_TRUE(ReadAll(*record, &position).messages.empty());
  record->SetQueuePosition(720, 28);
  const Reading reading = ReadAll(*record, &position);
  ASSERT_EQ(reading.messages.size(), 1u);
  EXPECT_EQ(reading.messages[0].progress().queue_position(), 720);
  EXPECT_EQ(reading.messages[0].progress().eta_seconds(), 28);
}

}  // namespace
}  // namespace slalom
