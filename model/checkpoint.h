// Checkpoints: a clip between two denoising steps as bytes, so that another process can go on with
// it to the same video, bit for bit. Internal to the pipeline; see Pipeline::Save.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "model/wan_generation.h"

namespace slalom {

// What the bytes hold: the number of steps done, the latent and the sampler's history as f32, what
// has been measured so far, a fingerprint of who wrote them (`model` and the whole ClipSpec) and a
// checksum. Embeddings and angles are left out: they follow from the spec. Bytes in the machine's
// own order: a checkpoint is read where it was written.
std::vector<std::byte> SaveClip(Backend& backend, const std::string& model,
                                const WanGeneration& clip);

// Gives `clip`, made for the same spec, the state that was saved. Throws Error(kDataLoss), with
// `clip` in a state of no use, when the bytes are damaged or of another model or clip.
void RestoreClip(Backend& backend, const std::string& model, std::span<const std::byte> bytes,
                 WanGeneration& clip);

}  // namespace slalom
