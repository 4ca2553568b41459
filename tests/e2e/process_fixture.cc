#include "tests/e2e/process_fixture.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <regex>
#include <sstream>

#include "tests/unit/model/tiny_model.h"

namespace slalom {

void ProcessTest::SetUpTestSuite() {
  folder_ = testing::TempDir() + "/slalom_process_test_" + std::to_string(getpid());
  std::filesystem::create_directories(folder_);
  WriteTinyModel(Model());
}

void ProcessTest::TearDownTestSuite() { std::filesystem::remove_all(folder_); }

std::unique_ptr<Process> ProcessTest::Daemon(std::vector<std::string> more,
                                             const std::string& model) {
  std::vector<std::string> arguments = {SLALOMD,       "--models",      model,        "--listen",
                                        "127.0.0.1:0", "--http-listen", "127.0.0.1:0"};
  if (std::ranges::find(more, "--device") == more.end()) {
    more.insert(more.end(), {"--device", "cpu"});
  }
  arguments.insert(arguments.end(), more.begin(), more.end());
  return std::make_unique<Process>(arguments);
}

void ProcessTest::Start(std::vector<std::string> more) {
  daemon_ = Daemon(std::move(more));
  ASSERT_TRUE(daemon_->WaitForOutput("slalomd ready grpc=")) << daemon_->err();
  std::smatch match;
  const std::string out = daemon_->out();
  ASSERT_TRUE(std::regex_search(out, match,
                                std::regex("slalomd ready grpc=(\\S+) http=(\\S+) models=tiny\n")))
      << out;
  address_ = match[1];
  http_address_ = match[2];
}

std::unique_ptr<Process> ProcessTest::Slalom(std::vector<std::string> arguments,
                                             Process::Limits limits) {
  std::vector<std::string> all = {SLALOM, "--server", address_};
  all.insert(all.end(), arguments.begin(), arguments.end());
  return std::make_unique<Process>(all, limits);
}

std::unique_ptr<Process> ProcessTest::LongGenerate(const std::string& output,
                                                   std::vector<std::string> more) {
  std::vector<std::string> arguments = {"generate", "a red ball", "-o", output};
  arguments.insert(arguments.end(), kLongClip.begin(), kLongClip.end());
  arguments.insert(arguments.end(), more.begin(), more.end());
  return Slalom(arguments);
}

std::string ProcessTest::JobId(const Process& process) {
  std::smatch match;
  const std::string text = process.err();
  return std::regex_search(text, match, std::regex("job (\\w+):")) ? match[1] : std::string();
}

bool ProcessTest::JobBecomes(const std::string& id, const std::string& state) {
  for (int i = 0; i < 200; ++i) {
    const auto job = Slalom({"job", id});
    job->Wait();
    if (job->out().find(state) != std::string::npos) return true;
  }
  return false;
}

std::string ProcessTest::ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

}  // namespace slalom
