#include "scheduler/fair_share.h"

#include <algorithm>

namespace slalom {
namespace {

constexpr std::size_t kFirstLook = 256;
// Beyond so many, what absent ones owe is forgiven.
constexpr std::size_t kMostKnown = 4096;

}  // namespace

int FairShare::Enter(const std::string& name, double weight) {
  auto found = numbers_.find(name);
  if (found == numbers_.end()) {
    ForgetAbsentOnes();
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
  ++tenant.jobs;
  return found->second;
}

void FairShare::Leave(int number) { --tenants_[Index(number)].jobs; }

void FairShare::Wait(int number) {
  Tenant& tenant = tenants_[Index(number)];
  if (tenant.waiting++ > 0) return;
  tenant.used = std::max(tenant.used, level_);
  waiting_.emplace(tenant.used, number);
}

void FairShare::StopWaiting(int number, bool begins) {
  Tenant& tenant = tenants_[Index(number)];
  // What it begins at, unless somebody who waits has used less.
  if (begins) level_ = std::max(level_, waiting_.begin()->first);
  if (--tenant.waiting == 0) waiting_.erase({tenant.used, number});
}

void FairShare::Charge(int number, double device_seconds) {
  Tenant& tenant = tenants_[Index(number)];
  double used = tenant.used + device_seconds / tenant.weight;
  if (tenant.waiting > 0) {
    used = std::max(used, level_);  // as if it came now
    waiting_.erase({tenant.used, number});
    waiting_.emplace(used, number);
  }
  tenant.used = used;
}

void FairShare::ForgetAbsentOnes() {
  if (numbers_.size() < forget_at_) return;
  const bool forgive = numbers_.size() >= kMostKnown;
  for (auto each = numbers_.begin(); each != numbers_.end();) {
    const Tenant& tenant = tenants_[Index(each->second)];
    if (tenant.jobs == 0 && (forgive || tenant.used <= level_)) {
      free_.push_back(each->second);
      each = numbers_.erase(each);
    } else {
      ++each;
    }
  }
  // Doubling keeps the cost per tenant constant however many stay.
  forget_at_ = std::max<std::size_t>(kFirstLook, 2 * numbers_.size());
}

}  // namespace slalom
