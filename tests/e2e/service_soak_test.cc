// The short form of the soak with a pipeline that needs no model: all of scheduler and server, none
// of model and kernels, so that it is built under a sanitizer in minutes.
#include <gtest/gtest.h>
#include <unistd.h>

#include <string>

#include "tests/e2e/soak.h"

namespace slalom {
namespace {

TEST(ServiceSoakTest, NothingAcceptedIsLostAndNothingIsLeftOver) {
  const std::string folder =
      testing::TempDir() + "/slalom_service_soak_" + std::to_string(getpid());
  TestShortSoak(SLALOMD, "no-model", folder);
}

}  // namespace
}  // namespace slalom
