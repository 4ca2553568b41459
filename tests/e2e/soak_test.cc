// The short form of the soak with a tiny model.
#include "tests/e2e/soak.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <string>

#include "tests/unit/model/tiny_model.h"

namespace slalom {
namespace {

TEST(SoakTest, NothingAcceptedIsLostAndNothingIsLeftOver) {
  const std::string folder = testing::TempDir() + "/slalom_soak_" + std::to_string(getpid());
  WriteTinyModel(folder + "/model");
  TestShortSoak(SLALOMD, folder + "/model", folder);
}

}  // namespace
}  // namespace slalom
