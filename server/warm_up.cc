#include "server/warm_up.h"

#include <algorithm>
#include <regex>
#include <sstream>

#include "kernels/core/error.h"

namespace slalom {
namespace {

constexpr int kAutoFrames = 5;
constexpr int kSteps = 2;

ClipSpec Resolve(const Pipeline& pipeline, const ClipRequest& request) {
  try {
    return pipeline.Resolve(request);
  } catch (const Error& error) {
    if (error.violations().empty()) throw;
    throw Error({{"warm_up", pipeline.info().name + " does not take it: " + error.what()}});
  }
}

void RunClip(const Pipeline& pipeline, const WarmUpShape& shape) {
  const ModelInfo& info = pipeline.info();
  ClipRequest request;
  request.prompt = "a calm sea at dawn";
  request.width = shape.width > 0 ? shape.width : info.defaults.width;
  request.height = shape.height > 0 ? shape.height : info.defaults.height;
  request.num_frames =
      shape.num_frames > 0 ? shape.num_frames : std::min(kAutoFrames, info.max_frames);
  request.steps = std::min(kSteps, info.max_steps);
  request.seed = 1;
  const auto clip = pipeline.Begin(Resolve(pipeline, request));
  Generation* batch[] = {clip.get()};
  while (!clip->denoised()) {
    const auto failures = pipeline.DenoiseStep(batch);
    if (!failures.empty()) {
      throw Error(ErrorCode::kInternal, "warm_up: " + info.name + ": " + failures.front().message);
    }
  }
  while (!clip->decoded()) pipeline.DecodeNext(*clip);
}

}  // namespace

std::vector<WarmUpShape> ParseWarmUp(const std::string& field, const std::string& text) {
  if (text == "none") return {};
  if (text == "auto") return {{}};
  static const std::regex kShape("([0-9]{1,5})x([0-9]{1,5})x([0-9]{1,4})");
  std::vector<WarmUpShape> shapes;
  std::istringstream list(text);
  for (std::string part; std::getline(list, part, ',');) {
    std::smatch match;
    if (!std::regex_match(part, match, kShape)) {
      throw Error({{field, "'" + part + "' is not allowed; give auto, none or WxHxFRAMES[,...]"}});
    }
    shapes.push_back({std::stoi(match[1]), std::stoi(match[2]), std::stoi(match[3])});
  }
  if (shapes.empty()) throw Error({{field, "is empty; give auto, none or WxHxFRAMES[,...]"}});
  return shapes;
}

void WarmUp(const Pipeline& pipeline, const std::vector<WarmUpShape>& shapes) {
  for (const WarmUpShape& shape : shapes) RunClip(pipeline, shape);
}

}  // namespace slalom
