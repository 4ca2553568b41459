// Soak: many jobs of mixed fate against slalomd, which is killed (-9) at random moments and started
// again. In the end nothing that was accepted may be missing, and nothing may be left over.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace slalom {

struct SoakOptions {
  std::string slalomd;  // the program
  std::string model;    // its model folder
  std::string folder;   // scratch: the state folder comes to lie here
  int jobs = 200;
  int clients = 6;                // at the same time
  double seconds_per_kill = 1.5;  // mean; 0: the server is never killed
  std::uint64_t seed = 1;
  bool check_memory = true;  // not under a sanitizer, which keeps what is freed
};

struct SoakReport {
  // What went wrong, empty when all is well.
  std::vector<std::string> problems;
  // "fetch OK" -> 77: how many calls of each fate ended how; and "kills".
  std::map<std::string, int> counts;
  double seconds = 0;
  // Of the last server, before and after the last fifth of the jobs.
  double resident_mib_before = 0;
  double resident_mib_after = 0;
};

// The fates, at random: fetch the clip (half of all; after a broken stream by ResumeVideo where it
// broke), send it again by its request_id after a broken stream, leave it detached and fetch it at
// the end from any byte, read slowly, cancel, disconnect, a deadline too short, bad input.
//
// Checks: a clip that is fetched, over however many kills and streams, has the bytes of the whole
// video as ResumeVideo then gives it; every job that was accepted is known and has ended as its
// fate allows; the state folder holds the videos of the jobs that succeeded and nothing else; the
// server's threads, descriptors and memory are what they were; it drains with exit code 0.
SoakReport Soak(const SoakOptions& options);

// The short form, for a test: every fate and a few kills, fewer under a sanitizer. Adds what went
// wrong to the test's failures.
void TestShortSoak(const std::string& slalomd, const std::string& model, const std::string& folder);

}  // namespace slalom
