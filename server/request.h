// Between the public messages and the server's own types.
#pragma once

#include <string>

#include "model/pipeline.h"
#include "scheduler/job.h"
#include "slalom/v1/job.pb.h"
#include "slalom/v1/model.pb.h"
#include "slalom/v1/video_generation.pb.h"

namespace slalom {

// Checks everything about a request that does not depend on its model, then lets the pipeline
// resolve and check the rest. Throws Error; an INVALID_ARGUMENT names every field at fault.
ClipSpec ResolveRequest(const v1::GenerateVideoRequest& request, const Pipeline& pipeline);

// The request with every field decided. Sent again, it makes the same clip.
v1::GenerateVideoRequest ToResolved(const v1::GenerateVideoRequest& request, const ClipSpec& spec,
                                    const std::string& model);

Priority ToPriority(v1::Priority priority);

// "dense", "sla", "salad", or "auto" for a request that is not resolved: a metric's label.
std::string AttentionLabel(const v1::GenerateVideoRequest& request);

v1::Statistics ToStatistics(const JobResult& result, const v1::GenerateVideoRequest& resolved);

v1::Model ToModel(const ModelInfo& info, const std::string& device, bool is_default);

}  // namespace slalom
