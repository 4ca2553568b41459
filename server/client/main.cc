// slalom: the command line client.
#include <google/protobuf/stubs/logging.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <map>
#include <string>
#include <thread>

#include "server/client/client.h"
#include "server/client/commands.h"

namespace slalom::client {
namespace {

constexpr int kExitUsage = 2;

// Takes Ctrl-C and SIGTERM on a thread of its own, where the client may be called.
class InterruptOnSignal {
 public:
  explicit InterruptOnSignal(Client& client) : thread_([this, &client] { Watch(client); }) {}
  ~InterruptOnSignal() {
    done_ = true;
    thread_.join();
  }

  // Before any thread starts: all inherit the mask.
  static void Block() {
    const sigset_t set = Set();
    pthread_sigmask(SIG_BLOCK, &set, nullptr);
    // Full disks and closed pipes are reported, they do not kill.
    std::signal(SIGPIPE, SIG_IGN);
    std::signal(SIGXFSZ, SIG_IGN);
  }

 private:
  static sigset_t Set() {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    return set;
  }

  void Watch(Client& client) {
    const sigset_t set = Set();
    const timespec pause{0, 50'000'000};
    while (!done_) {
      if (sigtimedwait(&set, nullptr, &pause) > 0) client.Interrupt();
    }
  }

  std::atomic<bool> done_ = false;
  std::thread thread_;  // last: it uses the above
};

struct Arguments {
  ClientOptions client;
  std::string token_file;
  bool json = false;
  GenerateOptions generate;
  std::string size;
  std::string job_id;
  std::string output;
};

template <typename Value, typename Setter>
CLI::Option* AddSetter(CLI::App* app, const std::string& flag, const std::string& help,
                       Setter set) {
  return app->add_option_function<Value>(flag, set, help);
}

void ParseSize(const std::string& text, v1::GenerateVideoRequest* request) {
  int width = 0;
  int height = 0;
  char rest = 0;
  if (std::sscanf(text.c_str(), "%dx%d%c", &width, &height, &rest) != 2) {
    throw CLI::ValidationError("--size", "'" + text + "' is not WIDTHxHEIGHT, for example 256x256");
  }
  request->set_width(width);
  request->set_height(height);
}

void AddGenerate(CLI::App& app, Arguments& arguments) {
  CLI::App* command = app.add_subcommand("generate", "make a video");
  v1::GenerateVideoRequest* request = &arguments.generate.request;
  command->add_option("prompt", *request->mutable_prompt(), "what to show")->required();
  command->add_option("-o,--output", arguments.generate.output, "the MP4 file");
  command->add_option("--model", *request->mutable_model(), "see `slalom models`");
  command->add_option("--negative", *request->mutable_negative_prompt(), "what to avoid");
  AddSetter<std::string>(command, "--size", "WIDTHxHEIGHT in pixels, multiples of 16",
                         [request](const std::string& text) { ParseSize(text, request); });
  AddSetter<int>(command, "--frames", "number of frames, 4n+1",
                 [request](int value) { request->set_num_frames(value); });
  AddSetter<int>(command, "--fps", "frames per second",
                 [request](int value) { request->set_fps(value); });
  AddSetter<int>(command, "--steps", "denoising steps",
                 [request](int value) { request->set_steps(value); });
  AddSetter<double>(command, "--guidance", "guidance scale, 1 turns it off",
                    [request](double value) { request->set_guidance_scale(value); });
  AddSetter<double>(command, "--shift", "flow shift",
                    [request](double value) { request->set_flow_shift(value); });
  AddSetter<std::uint64_t>(command, "--seed", "equal seeds make equal clips",
                           [request](std::uint64_t value) { request->set_seed(value); })
      ->check([](const std::string& text) { return text.starts_with('-') ? "is negative" : ""; });
  AddSetter<double>(command, "--topk", "share of key blocks attended exactly, in (0, 1]",
                    [request](double value) { request->mutable_attention()->set_topk(value); });
  AddSetter<int>(command, "--quality", "1 to 100",
                 [request](int value) { request->mutable_output()->set_quality(value); });
  const auto choice = [&](const std::string& flag, const std::string& help,
                          const std::map<std::string, int>& values, auto set) {
    std::vector<std::string> names;
    for (const auto& [name, value] : values) names.push_back(name);
    command
        ->add_option_function<std::string>(
            flag, [values, set](const std::string& text) { set(values.at(text)); }, help)
        ->check(CLI::IsMember(names));
  };
  choice("--sampler", "how steps are integrated",
         {{"unipc", v1::SAMPLER_UNIPC}, {"euler", v1::SAMPLER_EULER}, {"rcm", v1::SAMPLER_RCM}},
         [request](int value) { request->set_sampler(static_cast<v1::Sampler>(value)); });
  choice("--attention", "which attention",
         {{"auto", v1::ATTENTION_MODE_AUTO},
          {"dense", v1::ATTENTION_MODE_DENSE},
          {"sla", v1::ATTENTION_MODE_SLA},
          {"salad", v1::ATTENTION_MODE_SALAD}},
         [request](int value) {
           request->mutable_attention()->set_mode(static_cast<v1::AttentionMode>(value));
         });
  choice("--priority", "who goes first",
         {{"low", v1::PRIORITY_LOW}, {"normal", v1::PRIORITY_NORMAL}, {"high", v1::PRIORITY_HIGH}},
         [request](int value) { request->set_priority(static_cast<v1::Priority>(value)); });
  AddSetter<double>(command, "--deadline", "seconds the video may take, waiting included",
                    [&arguments](double value) { arguments.generate.deadline_seconds = value; })
      ->check([](const std::string& text) {
        const double seconds = std::atof(text.c_str());  // a NaN compares false
        return seconds >= 1e-3 && seconds <= 1e7 ? "" : "must be 0.001 to 10000000 seconds";
      });
  command->add_option("--request-id", *request->mutable_request_id(),
                      "idempotency key: repeating it makes nothing twice");
  command->add_flag_callback(
      "--detach", [request] { request->set_detached(true); },
      "the job goes on when this program ends; without -o, print its id and leave");
  command->add_flag("--json", arguments.json, "the result as JSON");
}

int Dispatch(const CLI::App& app, Client& client, const Arguments& arguments) {
  const bool json = arguments.json;
  if (app.got_subcommand("generate")) return RunGenerate(client, arguments.generate, json);
  if (app.got_subcommand("resume")) {
    return RunResume(client, arguments.job_id, arguments.output, json);
  }
  if (app.got_subcommand("cancel")) return RunCancel(client, arguments.job_id, json);
  if (app.got_subcommand("job")) return RunJob(client, arguments.job_id, json);
  if (app.got_subcommand("jobs")) return RunJobs(client, json);
  return RunModels(client, json);
}

int Run(int argc, char** argv) {
  Arguments arguments;
  CLI::App app{"slalom: prompts in, video out", "slalom"};
  app.require_subcommand(1);
  app.fallthrough();  // --server may come after the subcommand
  app.add_option("--server", arguments.client.server, "HOST:PORT of slalomd")
      ->capture_default_str();
  app.add_option("--token-file", arguments.token_file, "file with the bearer token");
  AddGenerate(app, arguments);
  const std::map<std::string, const char*> of_a_job = {
      {"job", "what a job is doing"},
      {"cancel", "end a job"},
      {"resume", "fetch a job's video, from wherever a stream broke off"}};
  for (const auto& [name, help] : of_a_job) {
    CLI::App* command = app.add_subcommand(name, help);
    command->add_option("id", arguments.job_id, "the job")->required();
    command->add_flag("--json", arguments.json, "the answer as JSON");
    if (name == "resume") {
      command->add_option("-o,--output", arguments.output, "the MP4 file")->required();
    }
  }
  app.add_subcommand("models", "what the server can make: sizes, limits, attention modes")
      ->add_flag("--json", arguments.json, "the answer as JSON");
  app.add_subcommand("jobs", "your jobs, newest first")
      ->add_flag("--json", arguments.json, "the answer as JSON");
  try {
    app.parse(argc, argv);
    if (app.got_subcommand("generate") && arguments.generate.output.empty() &&
        !arguments.generate.request.detached()) {
      throw CLI::RequiredError("-o FILE (or --detach)");
    }
    if (!arguments.token_file.empty()) {
      std::ifstream file(arguments.token_file);
      if (!file || !std::getline(file, arguments.client.token)) {
        throw CLI::ValidationError("--token-file", "cannot read '" + arguments.token_file + "'");
      }
    }
  } catch (const CLI::ParseError& error) {
    const int code = app.exit(error);
    return code == 0 ? 0 : kExitUsage;
  }
  InterruptOnSignal::Block();
  Client client(arguments.client);
  const InterruptOnSignal watch(client);
  return Dispatch(app, client, arguments);
}

}  // namespace
}  // namespace slalom::client

int main(int argc, char** argv) {
  // The server's answer names a field that is not UTF-8; protobuf's own line says it worse.
  google::protobuf::SetLogHandler(nullptr);
  return slalom::client::Run(argc, argv);
}
