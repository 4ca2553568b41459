#include "server/grpc_log.h"

#include <grpc/support/log.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <cstring>

namespace slalom {
namespace {

std::atomic<bool> stopped_accepting = false;

void Forward(gpr_log_func_args* line) {
  if (line->severity == GPR_LOG_SEVERITY_ERROR &&
      std::strncmp(line->message, "Failed accept4", 14) == 0) {
    stopped_accepting = true;
    spdlog::error(
        "listen: {}: no connection is accepted any more; allow more descriptors "
        "(ulimit -n) and restart",
        line->message);
    return;
  }
  const auto level =
      line->severity == GPR_LOG_SEVERITY_DEBUG ? spdlog::level::trace : spdlog::level::debug;
  spdlog::log(level, "grpc {}:{}: {}", line->file, line->line, line->message);
}

}  // namespace

void ForwardGrpcLog() { gpr_set_log_function(Forward); }

bool GrpcStoppedAccepting() { return stopped_accepting; }

}  // namespace slalom
