#include "kernels/cpu/parallel.h"

#include <omp.h>

namespace slalom {

void Parallel::Run(std::int64_t n, void (*call)(void*, std::int64_t, int), void* context) const {
  if (n <= 1 || threads_ <= 1) {
    for (std::int64_t i = 0; i < n; ++i) call(context, i, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads_)
  for (std::int64_t i = 0; i < n; ++i) call(context, i, omp_get_thread_num());
}

ThreadCountScope::ThreadCountScope(int threads) : previous_(omp_get_max_threads()) {
  omp_set_num_threads(threads);
}

ThreadCountScope::~ThreadCountScope() { omp_set_num_threads(previous_); }

}  // namespace slalom
