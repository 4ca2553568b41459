// Checks that a statement throws slalom::Error with a code and with words in its message.
#pragma once

#include <gtest/gtest.h>

#include <initializer_list>
#include <string>

#include "kernels/core/error.h"

namespace slalom {

template <typename Function>
void ExpectError(ErrorCode code, std::initializer_list<std::string> words, Function&& function) {
  try {
    function();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    for (const std::string& word : words) {
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos)
          << "no '" << word << "' in: " << error.what();
    }
    return;
  }
  ADD_FAILURE() << "nothing was thrown; expected " << ErrorCodeName(code);
}

}  // namespace slalom
