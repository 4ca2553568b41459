// Messages from and to raw bytes. The service takes raw requests, because gRPC answers one that
// protobuf cannot parse (bad UTF-8 in a string is the usual case) with a bare UNIMPLEMENTED.
#pragma once

#include <google/protobuf/message.h>
#include <grpcpp/support/byte_buffer.h>

namespace slalom {

// Throws Error(kInvalidArgument): with a violation for each string that is not UTF-8, else saying
// that the bytes are no such message.
void ParseMessage(const grpc::ByteBuffer& bytes, google::protobuf::Message* message);

grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message);

}  // namespace slalom
