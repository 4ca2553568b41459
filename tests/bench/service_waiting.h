// What clients that wait cost those that are served.
#pragma once

#include "tests/bench/service_options.h"

namespace slalom::bench {

// The server's memory and its steps' time with and without `options.clients` connected clients
// whose jobs wait, in turns. Prints a table.
void BenchWaiting(const ServiceBenchOptions& options);

}  // namespace slalom::bench
