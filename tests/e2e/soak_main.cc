// The long form of the soak, as a command. Prints what happened; exit code 0 when all is well.
//
//   build/cpu/tests/e2e/soak --jobs 10000
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <string>

#include "tests/e2e/soak.h"
#include "tests/unit/model/tiny_model.h"

int main(int argc, char** argv) {
  slalom::SoakOptions options;
  options.slalomd = SLALOMD;
  options.jobs = 10000;
  options.clients = 16;
  options.seconds_per_kill = 5;
  options.folder =
      (std::filesystem::temp_directory_path() / ("slalom_soak_" + std::to_string(getpid())))
          .string();
  bool keep = false;
  CLI::App app{"Jobs of mixed fate against a slalomd that is killed now and then", "soak"};
  app.add_option("--jobs", options.jobs, "how many (10000)");
  app.add_option("--clients", options.clients, "at the same time (16)");
  app.add_option("--seconds-per-kill", options.seconds_per_kill, "mean; 0: never (5)");
  app.add_option("--seed", options.seed, "of everything random (1)");
  app.add_option("--slalomd", options.slalomd, "the program");
  app.add_option("--folder", options.folder, "scratch");
  app.add_flag("--keep", keep, "leave the scratch folder");
  CLI11_PARSE(app, argc, argv);
  try {
    options.model = options.folder + "/model";
    slalom::WriteTinyModel(options.model);
    const slalom::SoakReport report = slalom::Soak(options);
    for (const auto& [what, count] : report.counts) std::printf("%7d  %s\n", count, what.c_str());
    std::printf("%.1f s; resident %.1f MiB before the last fifth, %.1f MiB after\n", report.seconds,
                report.resident_mib_before, report.resident_mib_after);
    for (const std::string& problem : report.problems) std::printf("PROBLEM %s\n", problem.c_str());
    if (!keep) std::filesystem::remove_all(options.folder);
    return report.problems.empty() ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "soak: %s\n", error.what());
    return 1;
  }
}
