// What a load consists of: classes of clips with their shares.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "slalom/v1/video_generation.pb.h"

namespace slalom::bench {

struct LoadClass {
  std::string name;
  double share = 1;  // of the jobs, relative to the others'
  v1::GenerateVideoRequest request;
};

// "NAME:SHARE:WxHxFRAMES:STEPS[:PRIORITY],...", for example
// "short:80:64x32x5:3,long:20:64x32x33:12:low". Throws std::invalid_argument.
std::vector<LoadClass> ParseMix(const std::string& text);

// The index of a class, drawn by the shares.
std::size_t Draw(const std::vector<LoadClass>& mix, std::mt19937_64& random);

}  // namespace slalom::bench
