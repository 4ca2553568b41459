#include "server/media/video_writer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <condition_variable>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "server/media/jpeg.h"
#include "tests/unit/server/video_reader.h"

namespace slalom {
namespace {

// Smooth colours that move: what a codec keeps well, so that a wrong matrix or range shows.
Tensor MakeFrames(int first, int count, int width, int height) {
  Tensor frames = Tensor::Host({count, height, width, 3}, DType::kU8);
  auto* out = frames.data<std::uint8_t>();
  for (int f = first; f < first + count; ++f) {
    for (int y = 0; y < height; ++y) {
      for (int x = 0; x < width; ++x) {
        const auto wave = [&](double phase) {
          return static_cast<std::uint8_t>(
              127.5 + 120 * std::sin(phase + 3.0 * x / width + 2.0 * y / height + 0.15 * f));
        };
        *out++ = wave(0);
        *out++ = wave(2);
        *out++ = wave(4);
      }
    }
  }
  return frames;
}

std::vector<std::uint8_t> FrameBytes(const Tensor& frames, int index) {
  const std::size_t size = frames.NumBytes() / static_cast<std::size_t>(frames.dim(0));
  const auto* begin = frames.data<std::uint8_t>() + index * size;
  return {begin, begin + size};
}

std::string ToString(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::string Encode(const VideoFormat& format, int frames) {
  std::string file;
  Mp4Encoder encoder(format, [&](std::span<const std::byte> bytes) { file += ToString(bytes); });
  const Tensor pixels = MakeFrames(0, frames, format.width, format.height);
  for (int i = 0; i < frames; ++i) {
    const std::vector<std::uint8_t> frame = FrameBytes(pixels, i);
    encoder.AddFrame(std::as_bytes(std::span(frame)));
    if (i % 4 == 0) encoder.Flush();
  }
  encoder.Finish();
  return file;
}

struct Case {
  int width, height, frames, fps, quality;
  double min_psnr;
};

class Mp4EncoderTest : public testing::TestWithParam<Case> {};

TEST_P(Mp4EncoderTest, DecodesBackToTheSameFrames) {
  const Case& c = GetParam();
  const DecodedVideo video =
      DecodeVideo(Encode({c.width, c.height, c.fps, c.quality, 1}, c.frames));
  EXPECT_EQ(video.codec, "h264");
  EXPECT_TRUE(video.bt709);
  EXPECT_EQ(video.width, c.width);
  EXPECT_EQ(video.height, c.height);
  EXPECT_NEAR(video.fps, c.fps, 1e-6);
  ASSERT_EQ(static_cast<int>(video.frames.size()), c.frames);
  const Tensor pixels = MakeFrames(0, c.frames, c.width, c.height);
  for (int i = 0; i < c.frames; ++i) {
    EXPECT_GT(Psnr(video.frames[static_cast<std::size_t>(i)], FrameBytes(pixels, i)), c.min_psnr)
        << "frame " << i;
    EXPECT_NEAR(video.times[static_cast<std::size_t>(i)], static_cast<double>(i) / c.fps, 1e-3);
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, Mp4EncoderTest,
                         testing::Values(Case{64, 48, 1, 16, 75, 38}, Case{64, 48, 5, 8, 75, 38},
                                         Case{256, 256, 33, 16, 75, 44},
                                         Case{208, 112, 21, 24, 100, 45}, Case{16, 16, 9, 1, 1, 22},
                                         Case{400, 16, 9, 120, 75, 32}));

TEST(Mp4EncoderTest, EqualFramesGiveEqualBytes) {
  EXPECT_EQ(Encode({96, 64, 16, 75, 1}, 17), Encode({96, 64, 16, 75, 1}, 17));
}

// Of this clip x264's AVX-512 code makes another file about once in 450 times.
TEST(Mp4EncoderTest, NoiseGivesEqualBytesEachTime) {
  constexpr int kTimes = 1500;
  std::mt19937 random(13);
  std::vector<std::vector<std::byte>> frames(5, std::vector<std::byte>(32 * 32 * 3));
  for (auto& frame : frames) {
    for (std::byte& value : frame) value = static_cast<std::byte>(random() % 256);
  }
  std::set<std::string> files;
  for (int i = 0; i < kTimes; ++i) {
    std::string file;
    Mp4Encoder encoder({.width = 32, .height = 32},
                       [&](std::span<const std::byte> bytes) { file += ToString(bytes); });
    for (const auto& frame : frames) encoder.AddFrame(frame);
    encoder.Finish();
    files.insert(std::move(file));
  }
  EXPECT_EQ(files.size(), 1u);
}

// Frames encoded side by side hold each other back, and finish in no order: the file must not tell.
TEST(Mp4EncoderTest, FrameThreadsLeaveNoTrace) {
  for (const int threads : {4, 7}) {
    const VideoFormat format = {416, 240, 16, 75, threads};
    const std::string file = Encode(format, 33);
    for (int i = 0; i < 3; ++i) EXPECT_EQ(Encode(format, 33), file) << threads << " threads";
    EXPECT_EQ(DecodeVideo(file).frames.size(), 33u);
  }
}

TEST(Mp4EncoderTest, LowerQualityGivesASmallerFile) {
  EXPECT_LT(Encode({256, 256, 16, 20, 1}, 17).size(), Encode({256, 256, 16, 90, 1}, 17).size());
}

// Cut anywhere after a fragment, the file plays up to there.
TEST(Mp4EncoderTest, PlaysFromTheFirstFragmentOn) {
  const VideoFormat format{128, 96, 16, 75, 1};
  std::string file;
  std::vector<std::size_t> ends;
  Mp4Encoder encoder(format, [&](std::span<const std::byte> bytes) { file += ToString(bytes); });
  ASSERT_GT(file.size(), 0u) << "the header comes first";
  const Tensor pixels = MakeFrames(0, 33, format.width, format.height);
  for (int i = 0; i < 33; ++i) {
    const std::vector<std::uint8_t> frame = FrameBytes(pixels, i);
    encoder.AddFrame(std::as_bytes(std::span(frame)));
    if (i % 4 == 0) {
      encoder.Flush();
      ends.push_back(file.size());
    }
  }
  const std::size_t before_finish = DecodeVideo(file).frames.size();
  // x264 holds back its lookahead, the B-frames and a few more.
  EXPECT_GE(before_finish, 16u);
  EXPECT_LT(before_finish, 33u);
  std::size_t last = 0;
  for (std::size_t i = 4; i < ends.size(); ++i) {
    const std::size_t frames = DecodeVideo(file.substr(0, ends[i])).frames.size();
    EXPECT_GE(frames, last);
    last = frames;
  }
  encoder.Finish();
  EXPECT_EQ(DecodeVideo(file).frames.size(), 33u);
}

TEST(Mp4EncoderTest, RefusesFormatsThatItCannotMake) {
  const auto ignore = [](std::span<const std::byte>) {};
  for (const VideoFormat& format : {VideoFormat{63, 48, 16, 75, 1}, VideoFormat{64, 0, 16, 75, 1},
                                    VideoFormat{64, 48, 0, 75, 1}, VideoFormat{64, 48, 16, 0, 1},
                                    VideoFormat{64, 48, 16, 101, 1}}) {
    try {
      Mp4Encoder encoder(format, ignore);
      FAIL() << format.width << "x" << format.height;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_EQ(error.violations().size(), 1u);
    }
  }
}

TEST(Mp4EncoderTest, ReportsWhatItsOutputThrows) {
  std::size_t taken = 0;
  Mp4Encoder encoder({64, 48, 16, 75, 1}, [&](std::span<const std::byte> bytes) {
    taken += bytes.size();
    if (taken > 2000) throw Error(ErrorCode::kResourceExhausted, "the disk is full");
  });
  const Tensor pixels = MakeFrames(0, 64, 64, 48);
  try {
    for (int i = 0; i < 64; ++i) {
      const std::vector<std::uint8_t> frame = FrameBytes(pixels, i);
      encoder.AddFrame(std::as_bytes(std::span(frame)));
      encoder.Flush();
    }
    encoder.Finish();
    FAIL() << "the error was swallowed after " << taken << " bytes";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kResourceExhausted);
  }
}

// A job that is cancelled when its first frames come: there is nowhere to write the header. That
// nothing is left behind, address sanitizer says.
TEST(Mp4EncoderTest, ReportsAnOutputThatThrowsAtOnce) {
  const auto refuse = [](std::span<const std::byte>) {
    throw Error(ErrorCode::kCancelled, "the video has been removed");
  };
  try {
    Mp4Encoder encoder({64, 48, 16, 75, 1}, refuse);
    FAIL() << "the error was swallowed";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kCancelled);
  }
}

// What a writer called back with.
struct Collected {
  std::mutex mutex;
  std::condition_variable changed;
  std::string file;
  int rooms = 0;
  int ends = 0;
  std::optional<Error> error;
  std::size_t limit = SIZE_MAX;
  bool hold = false;

  VideoWriter::Callbacks Callbacks() {
    return {[this](std::span<const std::byte> bytes) {
              std::unique_lock lock(mutex);
              changed.wait(lock, [this] { return !hold; });
              file += ToString(bytes);
              if (file.size() > limit) throw Error(ErrorCode::kResourceExhausted, "full");
            },
            [this] {
              std::lock_guard lock(mutex);
              ++rooms;
              changed.notify_all();
            },
            [this](const std::optional<Error>& e) {
              std::lock_guard lock(mutex);
              ++ends;
              error = e;
              changed.notify_all();
            }};
  }
  bool WaitForEnd() {
    std::unique_lock lock(mutex);
    return changed.wait_for(lock, std::chrono::seconds(20), [this] { return ends > 0; });
  }
};

TEST(VideoWriterTest, EncodesOnItsThread) {
  Collected collected;
  VideoWriter writer({64, 48, 16, 75, 1}, 4, collected.Callbacks());
  for (int f = 0; f < 33; f += f == 0 ? 1 : 4) {
    writer.Push(MakeFrames(f, f == 0 ? 1 : 4, 64, 48));
  }
  writer.Finish();
  ASSERT_TRUE(collected.WaitForEnd());
  EXPECT_FALSE(collected.error);
  EXPECT_EQ(DecodeVideo(collected.file).frames.size(), 33u);
  EXPECT_GT(writer.encode_seconds(), 0);
}

TEST(VideoWriterTest, SaysWhenItsQueueIsFullAndWhenThereIsRoomAgain) {
  Collected collected;
  collected.hold = true;
  VideoWriter writer({64, 48, 16, 75, 1}, 2, collected.Callbacks());
  EXPECT_TRUE(writer.has_room());
  for (int i = 0; i < 4; ++i) writer.Push(MakeFrames(i, 1, 64, 48));
  EXPECT_FALSE(writer.has_room());
  {
    std::lock_guard lock(collected.mutex);
    collected.hold = false;
  }
  collected.changed.notify_all();
  {
    std::unique_lock lock(collected.mutex);
    EXPECT_TRUE(collected.changed.wait_for(lock, std::chrono::seconds(20),
                                           [&] { return collected.rooms > 0; }));
  }
  EXPECT_TRUE(writer.has_room());
  writer.Finish();
  ASSERT_TRUE(collected.WaitForEnd());
}

TEST(VideoWriterTest, ReportsAnErrorOnceAndTakesFramesAfterwards) {
  Collected collected;
  collected.limit = 1000;
  VideoWriter writer({64, 48, 16, 75, 1}, 2, collected.Callbacks());
  writer.Push(MakeFrames(0, 33, 64, 48));
  writer.Finish();
  ASSERT_TRUE(collected.WaitForEnd());
  ASSERT_TRUE(collected.error);
  EXPECT_EQ(collected.error->code(), ErrorCode::kResourceExhausted);
  writer.Push(MakeFrames(0, 1, 64, 48));
  EXPECT_TRUE(writer.has_room());
  EXPECT_EQ(collected.ends, 1);
}

TEST(VideoWriterTest, AbortEndsInSilence) {
  Collected collected;
  {
    VideoWriter writer({256, 256, 16, 75, 1}, 2, collected.Callbacks());
    writer.Push(MakeFrames(0, 65, 256, 256));
    writer.Abort();
  }
  EXPECT_EQ(collected.ends, 0);
}

TEST(JpegTest, IsAPictureOfTheImage) {
  const Tensor frames = MakeFrames(0, 1, 80, 48);
  const std::string jpeg = EncodeJpeg(frames.Reshape({48, 80, 3}));
  ASSERT_GT(jpeg.size(), 200u);
  EXPECT_EQ(jpeg.substr(0, 2), "\xff\xd8");
  EXPECT_EQ(jpeg.substr(jpeg.size() - 2), "\xff\xd9");
  EXPECT_LT(jpeg.size(), frames.NumBytes());
  const DecodedVideo decoded = DecodeVideo(jpeg);
  ASSERT_EQ(decoded.frames.size(), 1u);
  EXPECT_GT(Psnr(decoded.frames[0], FrameBytes(frames, 0)), 36);
}

}  // namespace
}  // namespace slalom
