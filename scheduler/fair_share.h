// FairShare: what each tenant has used of the devices, by its weight.
#pragma once

#include <cstddef>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace slalom {

// Device seconds divided by weight, per tenant: the virtual time of weighted fair queueing, with
// the start tags of Goyal, Vin, Cheng: Start-time Fair Queueing (1996). The level is the tag of
// what was begun last, or of who waits with less. A tenant whose first job comes into the queue
// starts at the level or at what it has used, whichever is more: nobody saves up by staying away,
// and nobody owes for what was used while nobody else waited.
//
// A state machine without clock or threads. Tenants that are away and owe nothing are forgotten;
// where thousands come and go, also those that owe.
class FairShare {
 public:
  // A job of the tenant's comes; returns the tenant's number, valid until its last job has left.
  // The weight counts from now on; it must be positive.
  int Enter(const std::string& tenant, double weight);
  void Leave(int tenant);
  // One of its jobs waits, or no more: because it begins, or for another reason.
  void Wait(int tenant);
  void StopWaiting(int tenant, bool begins);
  // Adds to what the tenant has used; negative: gives back.
  void Charge(int tenant, double device_seconds);

  double used(int tenant) const { return tenants_[Index(tenant)].used; }
  double weight(int tenant) const { return tenants_[Index(tenant)].weight; }
  double level() const { return level_; }
  std::size_t known() const { return numbers_.size(); }

 private:
  struct Tenant {
    std::string name;
    double weight = 1.0;
    double used = 0;
    int jobs = 0;
    int waiting = 0;
  };

  static std::size_t Index(int tenant) { return static_cast<std::size_t>(tenant); }
  void ForgetAbsentOnes();

  std::vector<Tenant> tenants_;  // by number; those that are forgotten have their number in free_
  std::vector<int> free_;
  std::unordered_map<std::string, int> numbers_;
  std::set<std::pair<double, int>> waiting_;  // by what they have used
  double level_ = 0;                          // never sinks
  std::size_t forget_at_ = 256;
};

}  // namespace slalom
