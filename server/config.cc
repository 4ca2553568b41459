#include "server/config.h"

#include <yaml-cpp/yaml.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <sstream>

#include "kernels/core/error.h"
#include "server/version.h"
#include "server/warm_up.h"

namespace slalom {
namespace {

[[noreturn]] void Fail(const std::string& field, const std::string& value,
                       const std::string& allowed) {
  throw Error({{field, "'" + value + "' is not allowed; " + allowed}});
}

std::vector<std::string> SplitCommas(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    if (!part.empty()) parts.push_back(part);
  }
  return parts;
}

int ParseInt(const std::string& field, const std::string& text, int low, int high) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < low || value > high) {
    Fail(field, text,
         "give a whole number from " + std::to_string(low) + " to " + std::to_string(high));
  }
  return value;
}

double ParseNumber(const std::string& field, const std::string& text, double low, double high,
                   const char* allowed) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value) ||
      value < low || value > high) {
    Fail(field, text, allowed);
  }
  return value;
}

double ParseSeconds(const std::string& field, const std::string& text) {
  return ParseNumber(field, text, 0, 1e7, "give seconds, 0 to 10000000");
}

std::string ParseChoice(const std::string& field, const std::string& text,
                        const std::set<std::string>& choices) {
  if (choices.contains(text)) return text;
  std::string allowed = "give one of";
  for (const std::string& choice : choices) allowed += " " + choice;
  Fail(field, text, allowed);
}

std::vector<Device> ParseDevices(const std::string& field, const std::string& text) {
  if (text == "auto") return {};
  std::vector<Device> devices;
  for (const std::string& part : SplitCommas(text)) {
    try {
      devices.push_back(ParseDevice(part));
    } catch (const Error&) {
      Fail(field, part, "give auto, cpu, cuda or cuda:N[,cuda:M...]");
    }
    for (std::size_t i = 0; i + 1 < devices.size(); ++i) {
      if (devices[i] == devices.back()) Fail(field, text, "name each device once");
    }
  }
  if (devices.empty()) Fail(field, text, "give auto, cpu, cuda or cuda:N[,cuda:M...]");
  return devices;
}

// One row makes both the flag (--http-listen) and the key of the file (http_listen).
struct Option {
  const char* key;
  const char* value;  // what --help shows for it
  const char* help;
  std::function<void(ServerConfig&, const std::string& key, const std::string& text)> set;
};

const std::vector<Option>& Options() {
  using C = ServerConfig;
  using S = const std::string&;
  static const std::vector<Option> options = {
      {"models", "DIR[,DIR...]", "model folders; the first is the default (the demo model)",
       [](C& c, S k, S t) {
         c.models = SplitCommas(t);
         if (c.models.empty()) Fail(k, t, "give at least one folder");
       }},
      {"listen", "HOST:PORT", "gRPC address (127.0.0.1:8500); port 0: any free one",
       [](C& c, S k, S t) { c.listen = ParseHostPort(k, t); }},
      {"http_listen", "HOST:PORT", "metrics and health address (127.0.0.1:9500)",
       [](C& c, S k, S t) { c.http_listen = ParseHostPort(k, t); }},
      {"device", "DEVICE[,DEVICE...]", "auto, cpu, cuda or cuda:N[,cuda:M...] (auto)",
       [](C& c, S k, S t) { c.devices = ParseDevices(k, t); }},
      {"dtype", "TYPE", "compute type: auto, f32 or bf16 (auto)",
       [](C& c, S k, S t) {
         c.dtype = ParseChoice(k, t, {"auto", "f32", "bf16"});
       }},
      {"cpu_threads", "N", "threads of a cpu device (0: one per core)",
       [](C& c, S k, S t) { c.cpu_threads = ParseInt(k, t, 0, 1024); }},
      {"max_batch", "N", "clips per denoising step (0: what the device takes)",
       [](C& c, S k, S t) { c.max_batch = ParseInt(k, t, 0, 256); }},
      {"max_in_flight", "N", "clips begun and not done, per device (8)",
       [](C& c, S k, S t) { c.max_in_flight = ParseInt(k, t, 1, 1024); }},
      {"max_decoding", "N", "decoders at a time, per device (1)",
       [](C& c, S k, S t) { c.max_decoding = ParseInt(k, t, 1, 64); }},
      {"clip_memory_mib", "N", "device memory for clips in flight (0: what the device has)",
       [](C& c, S k, S t) { c.clip_memory_mib = ParseInt(k, t, 0, 1 << 30); }},
      {"state_dir", "DIR", "where jobs and videos survive a restart (nothing does)",
       [](C& c, S, S t) { c.state_dir = t; }},
      {"checkpoint_seconds", "S", "a job's denoising between checkpoints, with state_dir (10)",
       [](C& c, S k, S t) { c.checkpoint_seconds = ParseSeconds(k, t); }},
      {"prompt_cache_mib", "N", "host memory for prompts' embeddings, per model and device (64)",
       [](C& c, S k, S t) { c.prompt_cache_mib = ParseInt(k, t, 0, 1 << 20); }},
      {"warm_up", "SHAPES", "auto, none or WxHxFRAMES[,...]: clips run before readiness (auto)",
       [](C& c, S k, S t) {
         ParseWarmUp(k, t);
         c.warm_up = t;
       }},
      {"max_streams", "N", "open streams at a time (4096)",
       [](C& c, S k, S t) { c.max_streams = ParseInt(k, t, 1, 1000000); }},
      {"max_queue", "N", "jobs that may wait (64)",
       [](C& c, S k, S t) { c.max_queue = ParseInt(k, t, 1, 100000); }},
      {"drain_seconds", "S", "how long running jobs may finish after SIGTERM (300)",
       [](C& c, S k, S t) { c.drain_seconds = ParseSeconds(k, t); }},
      {"stall_seconds", "S", "an encoder that takes no frames for so long loses its job (120)",
       [](C& c, S k, S t) { c.stall_seconds = ParseSeconds(k, t); }},
      {"job_retention_seconds", "S", "how long ended jobs and their videos are kept (3600)",
       [](C& c, S k, S t) { c.job_retention_seconds = ParseSeconds(k, t); }},
      {"max_kept_jobs", "N", "ended jobs kept at most (1000)",
       [](C& c, S k, S t) { c.max_kept_jobs = ParseInt(k, t, 0, 1000000); }},
      {"max_kept_mib", "N", "their videos at most, fetched ones go first (0: no limit)",
       [](C& c, S k, S t) { c.max_kept_mib = ParseInt(k, t, 0, 1 << 30); }},
      {"log_level", "LEVEL", "trace, debug, info, warn or error (info)",
       [](C& c, S k, S t) {
         c.log_level = ParseChoice(k, t, {"trace", "debug", "info", "warn", "error"});
       }},
  };
  return options;
}

std::string FlagOf(const char* key) {
  std::string flag = std::string("--") + key;
  std::replace(flag.begin(), flag.end(), '_', '-');
  return flag;
}

// A scalar's text; a list's parts joined by commas.
std::string TextOf(const std::string& key, const YAML::Node& node) {
  if (node.IsScalar()) return node.Scalar();
  if (!node.IsSequence()) Fail(key, "a map or null", "give a value or a list");
  std::string text;
  for (const YAML::Node& item : node) {
    if (!item.IsScalar()) Fail(key, "a nested list", "give a list of values");
    text += (text.empty() ? "" : ",") + item.Scalar();
  }
  return text;
}

constexpr const char* kTenantKeys =
    "give name, token (or token_file), max_jobs, requests_per_minute, burst, weight";

std::string ReadTokenFile(const std::string& path) {
  std::ifstream file(path);
  std::string token;
  if (!file || !std::getline(file, token)) {
    throw Error(ErrorCode::kNotFound, "tenants.token_file: cannot read '" + path + "'");
  }
  return token;
}

TenantOptions ParseTenant(const YAML::Node& node) {
  if (!node.IsMap()) Fail("tenants", "an entry", kTenantKeys);
  TenantOptions tenant;
  for (const auto& item : node) {
    const auto key = item.first.as<std::string>();
    const std::string text = TextOf("tenants." + key, item.second);
    if (key == "name") {
      tenant.name = text;
    } else if (key == "token") {
      tenant.token = text;
    } else if (key == "token_file") {
      tenant.token = ReadTokenFile(text);
    } else if (key == "max_jobs") {
      tenant.max_jobs = ParseInt("tenants.max_jobs", text, 0, 100000);
    } else if (key == "requests_per_minute") {
      tenant.requests_per_minute =
          ParseNumber("tenants." + key, text, 0, 1e6, "give 0 (no limit) to 1000000");
    } else if (key == "burst") {
      tenant.burst = ParseNumber("tenants." + key, text, 1, 1e6, "give 1 to 1000000");
    } else if (key == "weight") {
      tenant.weight = ParseNumber("tenants." + key, text, 0.01, 1000, "give 0.01 to 1000");
    } else {
      Fail("tenants", key, kTenantKeys);
    }
  }
  if (tenant.name.empty()) Fail("tenants.name", "", "give every tenant a name");
  if (tenant.token.size() < 8) {
    throw Error({{"tenants.token", "the token of '" + tenant.name + "' has fewer than 8 bytes"}});
  }
  return tenant;
}

std::vector<TenantOptions> ParseTenants(const YAML::Node& node) {
  if (!node.IsSequence()) Fail("tenants", "this", "give a list of tenants");
  std::vector<TenantOptions> tenants;
  std::set<std::string> names;
  std::set<std::string> tokens;
  for (const YAML::Node& item : node) {
    tenants.push_back(ParseTenant(item));
    const TenantOptions& tenant = tenants.back();
    if (!names.insert(tenant.name).second) Fail("tenants.name", tenant.name, "names are unique");
    if (!tokens.insert(tenant.token).second) {
      throw Error({{"tenants.token", "'" + tenant.name + "' shares its token with another"}});
    }
  }
  return tenants;
}

void ApplyKey(ServerConfig& config, const std::string& key, const YAML::Node& value) {
  if (key == "tenants") {
    config.tenants = ParseTenants(value);
    return;
  }
  std::string known = "known keys are tenants";
  for (const Option& option : Options()) {
    if (key == option.key) return option.set(config, key, TextOf(key, value));
    known += std::string(", ") + option.key;
  }
  Fail("config", key, known);
}

}  // namespace

std::string HostPort::ToString() const {
  const bool ipv6 = host.find(':') != std::string::npos;
  return (ipv6 ? "[" + host + "]" : host) + ":" + std::to_string(port);
}

HostPort ParseHostPort(const std::string& field, const std::string& text) {
  const std::size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0) Fail(field, text, "give HOST:PORT");
  HostPort result;
  result.host = text.substr(0, colon);
  if (result.host.front() == '[' && result.host.back() == ']') {
    result.host = result.host.substr(1, result.host.size() - 2);
  } else if (result.host.find(':') != std::string::npos) {
    Fail(field, text, "write an IPv6 address as [ADDRESS]:PORT");
  }
  if (result.host.empty()) Fail(field, text, "give HOST:PORT");
  result.port = ParseInt(field, text.substr(colon + 1), 0, 65535);
  return result;
}

ServerConfig ReadConfigFile(const std::string& path, const ServerConfig& base) {
  std::ifstream file(path);
  if (!file || std::filesystem::is_directory(path)) {
    throw Error(ErrorCode::kNotFound, "config: cannot read '" + path + "'");
  }
  ServerConfig config = base;
  try {
    // JSON is a subset of YAML as far as a configuration goes.
    const YAML::Node root = YAML::Load(file);
    if (root.IsNull()) return config;
    if (!root.IsMap()) Fail("config", path, "the file is a map of options");
    for (const auto& item : root) ApplyKey(config, item.first.as<std::string>(), item.second);
  } catch (const YAML::Exception& e) {
    throw Error(ErrorCode::kInvalidArgument, "config: '" + path + "': " + e.what());
  }
  return config;
}

CommandLine ReadCommandLine(int argc, const char* const* argv) {
  CLI::App app{"slalomd: a server that turns prompts into video", "slalomd"};
  app.set_version_flag("--version", std::string("slalomd ") + kVersion);
  std::string config_file;
  app.add_option("--config", config_file, "YAML or JSON file; its keys are these options")
      ->type_name("FILE");
  std::map<std::string, std::string> flags;
  for (const Option& option : Options()) {
    app.add_option(FlagOf(option.key), flags[option.key], option.help)->type_name(option.value);
  }
  CommandLine result;
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    result.message = app.help();
    return result;
  } catch (const CLI::CallForVersion& e) {
    result.message = std::string(e.what()) + "\n";
    return result;
  } catch (const CLI::ParseError& e) {
    throw Error(ErrorCode::kInvalidArgument, std::string(e.what()) + " (see slalomd --help)");
  }
  if (!config_file.empty()) result.config = ReadConfigFile(config_file, result.config);
  for (const Option& option : Options()) {
    const std::string flag = FlagOf(option.key);
    if (app.count(flag) > 0) option.set(result.config, flag, flags[option.key]);
  }
  return result;
}

std::string DemoModelFolder() {
  namespace fs = std::filesystem;
  std::error_code ignored;
  const fs::path bin = fs::read_symlink("/proc/self/exe", ignored).parent_path();
  // Installed; then build/<preset>/bin in the source tree.
  const fs::path bases[] = {bin / "../share/slalom/models/demo", bin / "../../../model/demo"};
  std::string tried;
  for (const fs::path& base : bases) {
    const fs::path folder = base.lexically_normal();
    if (fs::exists(folder / "model_index.json", ignored)) return folder.string();
    for (const auto& entry : fs::directory_iterator(folder, ignored)) {
      if (fs::exists(entry.path() / "model_index.json", ignored)) return entry.path().string();
    }
    tried += (tried.empty() ? "" : ", ") + folder.string();
  }
  throw Error(ErrorCode::kNotFound, "models: the demo model is not there (looked at " + tried +
                                        "); name one by --models");
}

}  // namespace slalom
