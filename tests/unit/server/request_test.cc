#include "server/request.h"

#include <google/protobuf/wrappers.pb.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>
#include <string>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "kernels/core/error.h"
#include "server/auth.h"
#include "server/status.h"
#include "server/wire.h"
#include "tests/unit/scheduler/fake_pipeline.h"

namespace slalom {
namespace {

std::set<std::string> BadFields(const v1::GenerateVideoRequest& request) {
  const FakePipeline pipeline({});
  try {
    ResolveRequest(request, pipeline);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    std::set<std::string> fields;
    for (const FieldViolation& violation : error.violations()) {
      EXPECT_TRUE(fields.insert(violation.field).second) << violation.field << " twice";
      EXPECT_NE(std::string(error.what()).find(violation.field), std::string::npos);
    }
    return fields;
  }
  return {};
}

v1::GenerateVideoRequest Good() {
  v1::GenerateVideoRequest request;
  request.set_prompt("a red ball");
  return request;
}

TEST(RequestTest, UnsetFieldsTakeTheModelsDefaults) {
  const FakePipeline pipeline({});
  const ClipSpec spec = ResolveRequest(Good(), pipeline);
  const v1::GenerateVideoRequest resolved = ToResolved(Good(), spec, "fake");
  EXPECT_EQ(resolved.width(), 64);
  EXPECT_EQ(resolved.height(), 48);
  EXPECT_EQ(resolved.num_frames(), 9);
  EXPECT_EQ(resolved.output().quality(), 75);
  EXPECT_EQ(resolved.output().codec(), v1::CODEC_H264);
  EXPECT_EQ(resolved.priority(), v1::PRIORITY_NORMAL);
  EXPECT_NE(resolved.sampler(), v1::SAMPLER_UNSPECIFIED);
  EXPECT_TRUE(resolved.has_seed());
  EXPECT_TRUE(BadFields(resolved).empty()) << "a resolved request can be sent again";
}

TEST(RequestTest, EveryFieldAtFaultIsNamed) {
  v1::GenerateVideoRequest request;
  request.set_width(100);
  request.set_num_frames(6);
  request.set_guidance_scale(std::nan(""));
  request.set_flow_shift(std::numeric_limits<double>::infinity());
  request.set_sampler(static_cast<v1::Sampler>(77));
  request.mutable_attention()->set_mode(static_cast<v1::AttentionMode>(9));
  request.mutable_attention()->set_topk(std::nan(""));
  request.mutable_output()->set_quality(0);
  request.mutable_output()->set_codec(static_cast<v1::Codec>(4));
  request.mutable_output()->set_container(static_cast<v1::Container>(4));
  request.set_priority(static_cast<v1::Priority>(9));
  request.set_request_id("two words");
  EXPECT_EQ(BadFields(request),
            (std::set<std::string>{"prompt", "width", "num_frames", "guidance_scale", "flow_shift",
                                   "sampler", "attention.mode", "attention.topk", "output.quality",
                                   "output.codec", "output.container", "priority", "request_id"}));
}

TEST(RequestTest, TopkNeedsSparseAttention) {
  v1::GenerateVideoRequest request = Good();
  request.mutable_attention()->set_mode(v1::ATTENTION_MODE_DENSE);
  request.mutable_attention()->set_topk(0.2);
  EXPECT_EQ(BadFields(request), std::set<std::string>{"attention.topk"});
  request.mutable_attention()->set_mode(v1::ATTENTION_MODE_SLA);
  EXPECT_TRUE(BadFields(request).empty());
}

TEST(RequestTest, AMissingAdapterIsFailedPrecondition) {
  v1::GenerateVideoRequest request = Good();
  request.mutable_attention()->set_mode(v1::ATTENTION_MODE_SALAD);
  const FakePipeline pipeline({});
  try {
    ResolveRequest(request, pipeline);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kFailedPrecondition);
  }
}

grpc::ByteBuffer Raw(const std::string& bytes) {
  const grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

TEST(WireTest, BadUtf8NamesItsField) {
  // Field 1 (prompt) and field 17 (request_id), length-delimited.
  const std::string bytes = std::string("\x0a\x03") + "a\xff" + "b" + "\x8a\x01\x02" + "\xc0\x80";
  v1::GenerateVideoRequest request;
  try {
    ParseMessage(Raw(bytes), &request);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    ASSERT_EQ(error.violations().size(), 2u);
    EXPECT_EQ(error.violations()[0].field, "prompt");
    EXPECT_NE(error.violations()[0].description.find("byte 1"), std::string::npos);
    EXPECT_EQ(error.violations()[1].field, "request_id");
  }
}

TEST(WireTest, GarbageIsInvalidArgument) {
  v1::GenerateVideoRequest request;
  for (const std::string bytes : {"\xff\xff\xff\xff", "\x0a\x7f", "\x0b"}) {
    try {
      ParseMessage(Raw(bytes), &request);
      ADD_FAILURE();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    }
  }
}

TEST(WireTest, RoundTrip) {
  v1::GenerateVideoRequest request;
  ParseMessage(SerializeMessage(Good()), &request);
  EXPECT_EQ(request.prompt(), "a red ball");
  ParseMessage(Raw(""), &request);
  EXPECT_EQ(request.prompt(), "");
}

TEST(StatusTest, CarriesBadRequestAndRetryInfo) {
  const grpc::Status bad =
      ToStatus(Error(std::vector<FieldViolation>{{"width", "7 is not a multiple of 16"}}));
  EXPECT_EQ(bad.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(bad.error_details()));
  EXPECT_EQ(details.code(), 3);
  google::rpc::BadRequest bad_request;
  ASSERT_EQ(details.details_size(), 1);
  EXPECT_EQ(details.details(0).type_url(), "type.googleapis.com/google.rpc.BadRequest");
  ASSERT_TRUE(details.details(0).UnpackTo(&bad_request));
  EXPECT_EQ(bad_request.field_violations(0).field(), "width");

  const grpc::Status full = ToStatus(Error(ErrorCode::kResourceExhausted, "full"), 2.3);
  ASSERT_TRUE(details.ParseFromString(full.error_details()));
  google::rpc::RetryInfo retry;
  ASSERT_TRUE(details.details(0).UnpackTo(&retry));
  EXPECT_EQ(retry.retry_delay().seconds(), 3);
  EXPECT_TRUE(ToStatus(Error(ErrorCode::kInternal, "x")).error_details().empty());
}

TEST(AuthTest, TokensAreTenants) {
  const Auth auth({{"one", "token-of-one", 3}, {"two", "token-of-two", 0}});
  EXPECT_EQ(auth.Authenticate("Bearer token-of-two").name, "two");
  EXPECT_EQ(auth.Authenticate("Bearer token-of-one").max_jobs, 3);
  for (const char* wrong : {"", "token-of-one", "Bearer ", "Bearer token-of-onf",
                            "Bearer token-of-one ", "Basic token-of-one"}) {
    try {
      auth.Authenticate(wrong);
      ADD_FAILURE() << wrong;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnauthenticated);
    }
  }
  EXPECT_EQ(Auth({}).Authenticate("").name, "");
}

}  // namespace
}  // namespace slalom
