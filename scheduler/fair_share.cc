#include "scheduler/fair_share.h"

#include <algorithm>

namespace slalom {

double FairShare::least() const {
  return active_.empty() ? floor_ : std::max(floor_, active_.begin()->first);
}

int FairShare::Enter(const std::string& name, double weight) {
  auto found = numbers_.find(name);
  if (found == numbers_.end()) {
    ForgetLevelOnes();
    int number = static_cast<int>(tenants_.size());
    if (free_.empty()) {
      tenants_.emplace_back();
    } else {
      number = free_.back();
      free_.pop_back();
    }
    tenants_[Index(number)] = {.name = name};
    found = numbers_.emplace(name, number).first;
  }
  Tenant& tenant = tenants_[Index(found->second)];
  tenant.weight = weight;
  if (tenant.jobs++ == 0) {
    floor_ = least();
    tenant.used = std::max(tenant.used, floor_);
    active_.emplace(tenant.used, found->second);
  }
  return found->second;
}

void FairShare::Leave(int number) {
  Tenant& tenant = tenants_[Index(number)];
  if (--tenant.jobs > 0) return;
  floor_ = least();
  active_.erase({tenant.used, number});
}

void FairShare::Charge(int number, double device_seconds) {
  Tenant& tenant = tenants_[Index(number)];
  const double used = tenant.used + device_seconds / tenant.weight;
  if (tenant.jobs > 0) {
    active_.erase({tenant.used, number});
    active_.emplace(used, number);
  }
  tenant.used = used;
}

void FairShare::ForgetLevelOnes() {
  if (numbers_.size() < forget_at_) return;
  const double level = least();
  for (auto each = numbers_.begin(); each != numbers_.end();) {
    const Tenant& tenant = tenants_[Index(each->second)];
    if (tenant.jobs == 0 && tenant.used <= level) {
      free_.push_back(each->second);
      each = numbers_.erase(each);
    } else {
      ++each;
    }
  }
  // Doubling keeps the cost per tenant constant however many stay.
  forget_at_ = std::max<std::size_t>(256, 2 * numbers_.size());
}

}  // namespace slalom
