#include "server/wire.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/empty.pb.h>
#include <google/protobuf/unknown_field_set.h>
#include <utf8proc.h>

#include <string>
#include <utility>
#include <vector>

#include "kernels/core/error.h"

namespace slalom {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::UnknownField;
using google::protobuf::UnknownFieldSet;

// The offset of the first byte that is not UTF-8, or -1.
std::int64_t FirstBadByte(const std::string& text) {
  const auto* data = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  auto left = static_cast<utf8proc_ssize_t>(text.size());
  for (utf8proc_ssize_t at = 0; left > 0;) {
    utf8proc_int32_t codepoint = 0;
    const utf8proc_ssize_t length = utf8proc_iterate(data + at, left, &codepoint);
    if (length <= 0) return at;
    at += length;
    left -= length;
  }
  return -1;
}

// Walks fields that were parsed without a schema, along the schema.
void FindBadStrings(const UnknownFieldSet& fields, const Descriptor& descriptor,
                    const std::string& prefix, std::vector<FieldViolation>* violations) {
  for (int i = 0; i < fields.field_count(); ++i) {
    const UnknownField& value = fields.field(i);
    const FieldDescriptor* field = descriptor.FindFieldByNumber(value.number());
    if (field == nullptr || value.type() != UnknownField::TYPE_LENGTH_DELIMITED) continue;
    const std::string path = prefix + field->name();
    if (field->type() == FieldDescriptor::TYPE_STRING) {
      const std::int64_t bad = FirstBadByte(value.length_delimited());
      if (bad >= 0) {
        violations->push_back(
            {path, "byte " + std::to_string(bad) + " is not valid UTF-8; send UTF-8 text"});
      }
    } else if (field->type() == FieldDescriptor::TYPE_MESSAGE) {
      google::protobuf::Empty nested;
      if (nested.ParseFromString(value.length_delimited())) {
        FindBadStrings(nested.GetReflection()->GetUnknownFields(nested), *field->message_type(),
                       path + ".", violations);
      }
    }
  }
}

}  // namespace

void ParseMessage(const grpc::ByteBuffer& bytes, google::protobuf::Message* message) {
  grpc::Slice slice;
  if (!bytes.DumpToSingleSlice(&slice).ok()) {
    throw Error(ErrorCode::kInvalidArgument, "the request cannot be read");
  }
  const int size = static_cast<int>(slice.size());
  if (message->ParseFromArray(slice.begin(), size)) return;
  std::vector<FieldViolation> violations;
  google::protobuf::Empty untyped;
  if (untyped.ParseFromArray(slice.begin(), size)) {
    FindBadStrings(untyped.GetReflection()->GetUnknownFields(untyped), *message->GetDescriptor(),
                   "", &violations);
  }
  if (!violations.empty()) throw Error(std::move(violations));
  throw Error(ErrorCode::kInvalidArgument,
              "the bytes sent are no " + message->GetDescriptor()->full_name());
}

grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message) {
  const std::string bytes = message.SerializeAsString();
  const grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

}  // namespace slalom
