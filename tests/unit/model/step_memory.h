// What one guided denoising step takes of a device's memory, beside what was predicted.
#pragma once

#include "kernels/backend.h"
#include "model/pipeline.h"
#include "tests/unit/model/tiny_model.h"

namespace slalom {

struct StepMemory {
  double waiting = 0;  // bytes between steps
  double predicted_waiting = 0;
  double peak = 0;  // bytes more during a step
  double predicted_peak = 0;
};

// Runs one forward pass of a model with `options` on the backend, in its preferred type. `spec`
// gives size and attention; it is guided whatever it says. `block` is that of SLA and SALAD.
StepMemory MeasureStepMemory(Backend& backend, const TinyModelOptions& options, ClipSpec spec,
                             int block = 64);

}  // namespace slalom
