#include "server/auth.h"

#include <utility>

#include "kernels/core/error.h"

namespace slalom {
namespace {

bool EqualInConstantTime(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  unsigned char difference = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference |= static_cast<unsigned char>(a[i] ^ b[i]);
  }
  return difference == 0;
}

}  // namespace

Auth::Auth(std::vector<TenantOptions> tenants) : tenants_(std::move(tenants)) {}

const TenantOptions& Auth::Authenticate(std::string_view authorization) const {
  if (tenants_.empty()) return everybody_;
  constexpr std::string_view kBearer = "Bearer ";
  if (!authorization.starts_with(kBearer)) {
    throw Error(ErrorCode::kUnauthenticated,
                "authorization: send the metadata 'authorization: Bearer TOKEN'");
  }
  authorization.remove_prefix(kBearer.size());
  const TenantOptions* found = nullptr;
  for (const TenantOptions& tenant : tenants_) {
    if (EqualInConstantTime(tenant.token, authorization)) found = &tenant;
  }
  if (found == nullptr) {
    throw Error(ErrorCode::kUnauthenticated, "authorization: the token is not known");
  }
  return *found;
}

}  // namespace slalom
