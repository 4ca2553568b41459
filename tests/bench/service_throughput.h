// What of a device's throughput is left when a server stands before it.
#pragma once

#include "tests/bench/service_options.h"

namespace slalom::bench {

// Clips made by the pipeline alone and by slalomd at saturation, in turns, and their ratio. Prints
// a table.
void BenchThroughput(const ServiceBenchOptions& options);

}  // namespace slalom::bench
