// Frames in, a fragmented MP4 out: H.264 by libx264, on the calling thread.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>

namespace slalom {

struct VideoFormat {
  int width = 0;     // pixels, even
  int height = 0;    // pixels, even
  int fps = 16;      // 1 to 120
  int quality = 75;  // 1 to 100, see CrfOf
  int threads = 1;   // frames encoded side by side; each but the first holds one frame back
};

// x264's constant rate factor for a quality of 1 (crf 40) to 100 (crf 10).
double CrfOf(int quality);

// Owns the FFmpeg contexts. The file starts with ftyp and moov at the first frame; Flush then ends
// a fragment (moof and mdat), so that what came out so far is playable. The same frames and format
// give the same bytes. Not thread-safe; used by one thread at a time.
class Mp4Encoder {
 public:
  // Takes the next piece of the file. It may throw; the exception comes out of the call that made
  // the piece, and the encoder is then of no more use.
  using Output = std::function<void(std::span<const std::byte>)>;

  // Throws Error(kInvalidArgument) on a format that it cannot make, kInternal when FFmpeg lacks a
  // part.
  Mp4Encoder(const VideoFormat& format, Output output);
  ~Mp4Encoder();

  Mp4Encoder(const Mp4Encoder&) = delete;
  Mp4Encoder& operator=(const Mp4Encoder&) = delete;

  // One frame, [height, width, 3] u8 RGB, without padding.
  void AddFrame(std::span<const std::byte> rgb);
  // Puts what has been encoded so far into a fragment of its own. x264 holds back a few frames.
  void Flush();
  // The frames held back, the last fragment, the trailer. Nothing may follow.
  void Finish();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace slalom
