// run_network NET IN.safetensors OUT.safetensors [options]: see README.md.
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "kernels/core/error.h"
#include "model/safetensors_writer.h"
#include "tests/parity/run_network.h"

int main(int argc, char** argv) {
  using namespace slalom;
  try {
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    const NetworkOptions options = ParseNetworkOptions(arguments);
    const NetworkInputs inputs = options.in == "-" ? NetworkInputs() : NetworkInputs(options.in);
    const std::unique_ptr<Backend> backend = MakeBackend(options.device);
    WriteSafetensors(options.out, RunNetwork(*backend, options, inputs));
    return 0;
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kCancelled) {
      std::cout << error.what();
      return 0;
    }
    std::cerr << "run_network: " << error.what() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "run_network: " << error.what() << "\n";
  }
  return 1;
}
