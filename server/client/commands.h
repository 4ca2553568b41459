// What the `slalom` program does, one function per subcommand. Each returns the exit code: 0 on
// success, 1 after a failure (reported on standard error), 130 when interrupted.
#pragma once

#include <optional>
#include <string>

#include "server/client/client.h"

namespace slalom::client {

inline constexpr int kExitFailure = 1;
inline constexpr int kExitInterrupted = 130;

struct GenerateOptions {
  v1::GenerateVideoRequest request;
  std::string output;  // may be empty when detached: only submits then
  std::optional<double> deadline_seconds;
};

int RunGenerate(Client& client, const GenerateOptions& options, bool json);
int RunResume(Client& client, const std::string& job_id, const std::string& output, bool json);
int RunCancel(Client& client, const std::string& job_id, bool json);
int RunJob(Client& client, const std::string& job_id, bool json);
int RunJobs(Client& client, bool json);
int RunModels(Client& client, bool json);

}  // namespace slalom::client
