// What the service costs, with slalomd as a child process.
//
//   service_bench throughput       the bare pipeline and the server at saturation, in turns
//   service_bench waiting          a thousand connected clients whose jobs wait
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>

#include "tests/bench/load_mix.h"
#include "tests/bench/service_options.h"
#include "tests/bench/service_throughput.h"
#include "tests/bench/service_waiting.h"

namespace slalom::bench {

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

}  // namespace slalom::bench

int main(int argc, char** argv) {
  slalom::bench::ServiceBenchOptions options;
  options.slalomd = SLALOMD;
  std::string clip = "128x128x9:8";
  CLI::App app{"What the service costs beside the bare pipeline", "service_bench"};
  app.require_subcommand(1);
  const CLI::App* throughput =
      app.add_subcommand("throughput", "the bare pipeline and the server, in turns");
  CLI::App* waiting = app.add_subcommand("waiting", "clients that are connected and wait");
  for (CLI::App* command : app.get_subcommands({})) {
    command->add_option("--slalomd", options.slalomd, "the program");
    command->add_option("--model", options.model, "model folder")->capture_default_str();
    command->add_option("--device", options.device, "cpu, cuda or cuda:N")->capture_default_str();
    command->add_option("--threads", options.threads, "of a CPU device")->capture_default_str();
    command->add_option("--clip", clip, "WxHxFRAMES:STEPS")->capture_default_str();
    command->add_option("--clips", options.clips, "per round")->check(CLI::PositiveNumber);
    command->add_option("--rounds", options.rounds, "that are counted")->check(CLI::PositiveNumber);
    command->add_option("--clients", options.clients, "4 at saturation, 1000 that wait")
        ->check(CLI::PositiveNumber);
  }
  waiting->preparse_callback([&](std::size_t) { options.clients = 1000; });
  CLI11_PARSE(app, argc, argv);
  try {
    options.clip = slalom::bench::ParseMix("clip:1:" + clip).front().request;
    if (*throughput) {
      slalom::bench::BenchThroughput(options);
    } else {
      slalom::bench::BenchWaiting(options);
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "service_bench: %s\n", error.what());
    return 1;
  }
}
