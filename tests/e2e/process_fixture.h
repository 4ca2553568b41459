// The two programs as people run them, around a tiny random model. A target with these tests says
// where they are: SLALOMD and SLALOM.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/e2e/process.h"

namespace slalom {

// A clip that takes long enough to be interrupted.
inline const std::vector<std::string> kLongClip = {"--size", "256x256", "--frames",
                                                   "33",     "--steps", "50"};

class ProcessTest : public testing::Test {
 protected:
  static void SetUpTestSuite();
  static void TearDownTestSuite();

  static std::string Model() { return folder_ + "/model"; }
  static std::string Path(const std::string& name) { return folder_ + "/" + name; }

  // On the CPU, unless `more` says otherwise.
  static std::unique_ptr<Process> Daemon(std::vector<std::string> more = {},
                                         const std::string& model = Model());
  // Starts the daemon and reads its addresses from the ready line.
  void Start(std::vector<std::string> more = {});

  std::unique_ptr<Process> Slalom(std::vector<std::string> arguments, Process::Limits limits = {});
  std::unique_ptr<Process> LongGenerate(const std::string& output,
                                        std::vector<std::string> more = {});

  static std::string JobId(const Process& process);
  // Polls `slalom job` until the state shows up.
  bool JobBecomes(const std::string& id, const std::string& state);

  static std::string ReadFile(const std::string& path);

  static inline std::string folder_;
  std::unique_ptr<Process> daemon_;
  std::string address_;
  std::string http_address_;
};

}  // namespace slalom
