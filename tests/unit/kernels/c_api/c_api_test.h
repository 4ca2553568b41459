// What the C ABI's tests share: a context, random values and maps, and the error rule.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/c_api/slalom_attention.h"
#include "tests/reference/attention_backward.h"

namespace slalom {

class CApiTest : public testing::Test {
 protected:
  void CreateContext(const char* device) {
    char error[256] = "";
    ASSERT_EQ(slalom_context_create(device, 2, &context_, error, sizeof(error)), SLALOM_OK)
        << error;
  }
  void TearDown() override { slalom_context_destroy(context_); }

  reference::Array Random(const Shape& shape, double scale = 1.0) {
    reference::Array a(shape);
    std::normal_distribution<float> normal(0.0f, static_cast<float>(scale));
    for (double& x : a.values) x = normal(random_);
    return a;
  }
  static std::vector<float> Floats(const reference::Array& a) {
    return {a.values.begin(), a.values.end()};
  }

  // Of one sample.
  reference::Classes RandomMap(std::int64_t heads, std::int64_t length, int block_q, int block_k) {
    reference::Classes map{block_q,
                           block_k,
                           1,
                           heads,
                           (length + block_q - 1) / block_q,
                           (length + block_k - 1) / block_k,
                           {},
                           {}};
    for (std::int64_t i = 0; i < heads * map.query_blocks * map.key_blocks; ++i) {
      map.values.push_back(static_cast<std::uint8_t>(random_() % 3));
    }
    return map;
  }

  static void ExpectNear(const std::vector<float>& actual, const reference::Array& exact,
                         const char* name) {
    ASSERT_EQ(static_cast<std::int64_t>(actual.size()), exact.size()) << name;
    double largest = 0, error = 0;
    for (std::size_t i = 0; i < actual.size(); ++i) {
      ASSERT_TRUE(std::isfinite(actual[i])) << name << " element " << i;
      largest = std::max(largest, std::abs(exact.values[i]));
      error = std::max(error, std::abs(actual[i] - exact.values[i]));
    }
    EXPECT_LE(error, 1e-4 * largest) << name;
  }

  slalom_context* context_ = nullptr;
  std::mt19937 random_{3};
};

}  // namespace slalom
