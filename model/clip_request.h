// From what was asked to what will be made: defaults filled in, every field checked.
#pragma once

#include "model/config.h"
#include "model/pipeline.h"

namespace slalom {

// Pixels per token along each side: the VAE's scale times the transformer's patch.
int SizeMultiple(const ModelConfig& config);

// Pure. Throws Error(kInvalidArgument) that lists every field at fault with its value and what is
// allowed, or Error(kFailedPrecondition) when `info` offers no attention of the kind asked for.
ClipSpec ResolveClip(const ModelConfig& config, const ModelInfo& info, const ClipRequest& request);

}  // namespace slalom
