// Previews: a latent as a small RGB image, without the decoder.
#pragma once

#include <vector>

#include "kernels/backend.h"
#include "kernels/core/tensor.h"
#include "model/video_decoder.h"

namespace slalom {

// The best linear guess of a latent position's mean colour. Immutable after Fit.
class PreviewMap {
 public:
  // Least squares against what the decoder itself makes of random patches of constant latent
  // values: every model gets its own map, and no file has to hold one. Costs the decoding of one
  // small frame, once at load.
  static PreviewMap Fit(Backend& backend, const VideoDecoder& decoder);

  // The middle frame of latent [C, F, h, w] f32 (normalised) as host [h, w, 3] u8.
  Tensor Render(Backend& backend, const Tensor& latent) const;

 private:
  std::vector<float> factors_;  // [C + 1, 3]; the last row is the constant
};

}  // namespace slalom
