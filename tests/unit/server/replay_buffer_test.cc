#include "server/replay_buffer.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <thread>

#include "kernels/core/error.h"

namespace slalom {
namespace {

std::span<const std::byte> Bytes(const std::string& text) { return std::as_bytes(std::span(text)); }

TEST(ReplayBufferTest, GivesBackAnyRange) {
  ReplayBuffer buffer;
  EXPECT_EQ(buffer.Read(0, 10), "");
  buffer.Append(Bytes("hello "));
  buffer.Append(Bytes("world"));
  EXPECT_EQ(buffer.size(), 11);
  EXPECT_EQ(buffer.Read(0, 100), "hello world");
  EXPECT_EQ(buffer.Read(3, 5), "lo wo");
  EXPECT_EQ(buffer.Read(11, 5), "");
  EXPECT_EQ(buffer.Read(99, 5), "");
}

TEST(ReplayBufferTest, ReadersSeeWholePrefixesWhileItGrows) {
  ReplayBuffer buffer;
  constexpr int kBlocks = 2000;
  std::thread writer([&] {
    for (int i = 0; i < kBlocks; ++i) {
      buffer.Append(Bytes(std::string(64, static_cast<char>('a' + i % 26))));
    }
  });
  std::string all;
  while (static_cast<int>(all.size()) < kBlocks * 64) {
    all += buffer.Read(static_cast<std::int64_t>(all.size()), 1000);
  }
  writer.join();
  for (int i = 0; i < kBlocks; ++i) {
    ASSERT_EQ(all[static_cast<std::size_t>(i) * 64 + 63], static_cast<char>('a' + i % 26));
  }
}

TEST(ReplayBufferTest, ANamedFileOutlivesItAndCanBeOpenedAgain) {
  const std::string path = testing::TempDir() + "/slalom_replay.mp4";
  std::filesystem::remove(path);
  { ReplayBuffer(path).Append(Bytes("kept")); }
  ReplayBuffer again(path);
  EXPECT_EQ(again.Read(0, 10), "kept");
  again.Remove();
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_THROW(again.Append(Bytes("more")), Error);
  EXPECT_FALSE(std::filesystem::exists(path)) << "and it stays so";
}

TEST(ReplayBufferTest, ASecondMakingIsComparedWithTheFirst) {
  const std::string path = testing::TempDir() + "/slalom_replay_again.mp4";
  std::filesystem::remove(path);
  { ReplayBuffer(path).Append(Bytes("0123456789")); }
  ReplayBuffer again(path);
  EXPECT_EQ(again.size(), 10);
  again.Append(Bytes("0123"));
  EXPECT_EQ(again.size(), 10) << "readers lose nothing meanwhile";
  EXPECT_EQ(again.Read(0, 100), "0123456789");
  again.Append(Bytes("456789abc"));
  EXPECT_EQ(again.Read(8, 100), "89abc");
  again.Close(true);
  EXPECT_EQ(again.Read(0, 100), "0123456789abc") << "closed, it is read by its name";

  ReplayBuffer other(path);
  other.Append(Bytes("01"));
  try {
    other.Append(Bytes("2X4"));
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kDataLoss);
  }
  EXPECT_EQ(other.Read(0, 100), "0123456789abc");
  other.Remove();
}

TEST(ReplayBufferTest, TakesNoFileBeforeItsFirstByte) {
  const auto open_files = [] {
    const std::filesystem::directory_iterator files("/proc/self/fd");
    return std::distance(begin(files), end(files));
  };
  const auto before = open_files();
  std::vector<std::unique_ptr<ReplayBuffer>> buffers;
  for (int i = 0; i < 10; ++i) buffers.push_back(std::make_unique<ReplayBuffer>());
  EXPECT_EQ(open_files(), before);
  buffers[0]->Append(Bytes("x"));
  EXPECT_EQ(open_files(), before + 1);
}

TEST(ReplayBufferTest, AFullDiskIsResourceExhausted) {
  const auto old = std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  rlimit small = before;
  small.rlim_cur = 4096;
  ReplayBuffer buffer;
  buffer.Append(Bytes(std::string(4000, 'x')));
  setrlimit(RLIMIT_FSIZE, &small);
  try {
    for (int i = 0; i < 4; ++i) buffer.Append(Bytes(std::string(100, 'y')));
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kResourceExhausted);
    EXPECT_NE(std::string(error.what()).find("state_dir"), std::string::npos);
  }
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, old);
  EXPECT_EQ(buffer.Read(0, 4000), std::string(4000, 'x'));
}

TEST(ReplayBufferTest, AFolderThatIsNotThereIsAnError) {
  ReplayBuffer buffer("/no/such/folder/x.mp4");
  EXPECT_THROW(buffer.Append(Bytes("x")), Error);
}

}  // namespace
}  // namespace slalom
