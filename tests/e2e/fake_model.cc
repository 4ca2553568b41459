// Instead of the model: whatever the folder, a pipeline that sleeps and paints.
#include <memory>
#include <string>

#include "tests/unit/scheduler/fake_pipeline.h"

namespace slalom {

std::unique_ptr<Pipeline> LoadPipeline(const std::string& /*folder*/,
                                       const PipelineOptions& options) {
  FakeOptions fake;
  fake.device = options.device;
  fake.begin_time = std::chrono::milliseconds(1);
  fake.step_time = std::chrono::milliseconds(3);
  fake.decode_time = std::chrono::milliseconds(3);
  return std::make_unique<FakePipeline>(fake);
}

}  // namespace slalom
