// Warm-up: a tiny clip per shape before the first request, so that nobody's clip pays for what a
// device and its libraries prepare once per shape; and so that the first estimates are measured.
#pragma once

#include <string>
#include <vector>

#include "model/pipeline.h"

namespace slalom {

struct WarmUpShape {
  int width = 0;
  int height = 0;
  int num_frames = 0;
};

// What the option warm_up says. "none" is no shape. "auto" is one shape of zeros, which stands for
// the model's default size at 5 frames: the decoder's two kinds of pieces, little else. Else a list
// "832x480x81,480x832x81". Throws Error(kInvalidArgument) that names `field`.
std::vector<WarmUpShape> ParseWarmUp(const std::string& field, const std::string& text);

// Two denoising steps and the whole decoding of each shape, with the model's default attention.
// Call it before the pipeline goes to its worker. A shape that the model does not take is an error
// of the configuration: throws Error(kInvalidArgument). Other errors come through as they are.
void WarmUp(const Pipeline& pipeline, const std::vector<WarmUpShape>& shapes);

}  // namespace slalom
