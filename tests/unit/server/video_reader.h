// Decodes an MP4 back to RGB frames, for tests.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace slalom {

struct DecodedVideo {
  int width = 0;
  int height = 0;
  double fps = 0;
  std::string codec;                              // "h264"
  bool bt709 = false;                             // matrix, limited range
  std::vector<std::vector<std::uint8_t>> frames;  // each [height, width, 3] RGB
  std::vector<double> times;                      // seconds
};

// Decodes as much as there is (a JPEG is a video of one frame): a file that is cut off gives the
// frames before the cut. Throws std::runtime_error when it is no video at all.
DecodedVideo DecodeVideo(const std::string& bytes);

// Peak signal-to-noise ratio of two frames in dB.
double Psnr(const std::vector<std::uint8_t>& a, const std::vector<std::uint8_t>& b);

}  // namespace slalom
