// Who is calling: bearer tokens to tenants.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "server/config.h"

namespace slalom {

// Immutable, thread-safe.
class Auth {
 public:
  // Without tenants everybody may call, as the tenant "".
  explicit Auth(std::vector<TenantOptions> tenants);

  // `authorization` is the value of that metadata key, empty when there was none. Throws
  // Error(kUnauthenticated). The comparison takes the same time for every wrong token of a length.
  const TenantOptions& Authenticate(std::string_view authorization) const;

 private:
  std::vector<TenantOptions> tenants_;
  TenantOptions everybody_;
};

}  // namespace slalom
