#include "server/config.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <string>
#include <vector>

#include "kernels/core/error.h"

namespace slalom {
namespace {

CommandLine Read(std::initializer_list<const char*> flags) {
  std::vector<const char*> argv = {"slalomd"};
  argv.insert(argv.end(), flags);
  return ReadCommandLine(static_cast<int>(argv.size()), argv.data());
}

class ConfigTest : public testing::Test {
 protected:
  std::string Write(const std::string& text, const std::string& name = "config.yaml") {
    const auto path = std::filesystem::path(testing::TempDir()) / ("slalom_" + name);
    std::ofstream(path) << text;
    return path.string();
  }
  // The message of the error that the file gives.
  std::string FileError(const std::string& text) {
    try {
      ReadConfigFile(Write(text), {});
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      return error.what();
    }
    ADD_FAILURE() << "no error for: " << text;
    return "";
  }
};

TEST_F(ConfigTest, Defaults) {
  const ServerConfig config = Read({}).config;
  EXPECT_EQ(config.listen.ToString(), "127.0.0.1:8500");
  EXPECT_EQ(config.http_listen.ToString(), "127.0.0.1:9500");
  EXPECT_TRUE(config.models.empty());
  EXPECT_TRUE(config.devices.empty());
  EXPECT_TRUE(config.tenants.empty());
}

TEST_F(ConfigTest, ReadsEveryFlag) {
  const ServerConfig config = Read({"--models",
                                    "a,b",
                                    "--listen",
                                    "0.0.0.0:0",
                                    "--http-listen",
                                    "[::1]:80",
                                    "--device",
                                    "cuda:0,cuda:2",
                                    "--dtype",
                                    "bf16",
                                    "--cpu-threads",
                                    "3",
                                    "--max-in-flight",
                                    "6",
                                    "--max-decoding",
                                    "3",
                                    "--clip-memory-mib",
                                    "512",
                                    "--max-batch",
                                    "2",
                                    "--state-dir",
                                    "/s",
                                    "--max-queue",
                                    "7",
                                    "--drain-seconds",
                                    "1.5",
                                    "--stall-seconds",
                                    "2",
                                    "--job-retention-seconds",
                                    "3",
                                    "--max-kept-jobs",
                                    "4",
                                    "--log-level",
                                    "warn"})
                                  .config;
  EXPECT_EQ(config.models, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(config.listen.ToString(), "0.0.0.0:0");
  EXPECT_EQ(config.http_listen.ToString(), "[::1]:80");
  ASSERT_EQ(config.devices.size(), 2u);
  EXPECT_EQ(ToString(config.devices[1]), "cuda:2");
  EXPECT_EQ(config.dtype, "bf16");
  EXPECT_EQ(config.cpu_threads, 3);
  EXPECT_EQ(config.max_batch, 2);
  EXPECT_EQ(config.max_in_flight, 6);
  EXPECT_EQ(config.max_decoding, 3);
  EXPECT_EQ(config.clip_memory_mib, 512);
  EXPECT_EQ(config.state_dir, "/s");
  EXPECT_EQ(config.max_queue, 7);
  EXPECT_EQ(config.drain_seconds, 1.5);
  EXPECT_EQ(config.stall_seconds, 2);
  EXPECT_EQ(config.job_retention_seconds, 3);
  EXPECT_EQ(config.max_kept_jobs, 4);
  EXPECT_EQ(config.log_level, "warn");
}

TEST_F(ConfigTest, ReadsYamlAndJsonAlike) {
  const std::string yaml = Write(
      "models: [a, b]\nlisten: 127.0.0.1:1\nmax_queue: 9\ntenants:\n"
      "  - {name: one, token: secret-one, max_jobs: 2}\n");
  const std::string json = Write(
      R"({"models": ["a", "b"], "listen": "127.0.0.1:1", "max_queue": 9,
          "tenants": [{"name": "one", "token": "secret-one", "max_jobs": 2}]})",
      "config.json");
  for (const std::string& path : {yaml, json}) {
    const ServerConfig config = ReadConfigFile(path, {});
    EXPECT_EQ(config.models, (std::vector<std::string>{"a", "b"}));
    EXPECT_EQ(config.listen.port, 1);
    EXPECT_EQ(config.max_queue, 9);
    ASSERT_EQ(config.tenants.size(), 1u);
    EXPECT_EQ(config.tenants[0].name, "one");
    EXPECT_EQ(config.tenants[0].token, "secret-one");
    EXPECT_EQ(config.tenants[0].max_jobs, 2);
  }
}

TEST_F(ConfigTest, AFlagWinsOverTheFile) {
  const std::string path = Write("max_queue: 9\nlog_level: debug\n");
  const ServerConfig config = Read({"--max-queue", "5", "--config", path.c_str()}).config;
  EXPECT_EQ(config.max_queue, 5);
  EXPECT_EQ(config.log_level, "debug");
}

TEST_F(ConfigTest, ATokenCanLieInAFile) {
  const std::string token = Write("a-long-token\n", "token");
  const std::string path = Write("tenants: [{name: x, token_file: " + token + "}]");
  EXPECT_EQ(ReadConfigFile(path, {}).tenants.at(0).token, "a-long-token");
}

TEST_F(ConfigTest, AnEmptyFileChangesNothing) {
  EXPECT_EQ(ReadConfigFile(Write(""), {}).max_queue, 64);
}

TEST_F(ConfigTest, BadFlagsNameFieldValueAndWhatIsAllowed) {
  struct Case {
    const char* flag;
    const char* value;
    const char* allowed;
  };
  for (const Case& c :
       {Case{"--listen", "8500", "HOST:PORT"}, Case{"--listen", "a:70000", "65535"},
        Case{"--listen", ":80", "HOST:PORT"}, Case{"--listen", "::1:80", "[ADDRESS]"},
        Case{"--device", "tpu", "cuda:N"}, Case{"--device", "cpu,cpu", "once"},
        Case{"--dtype", "f16", "bf16"}, Case{"--max-queue", "0", "from 1"},
        Case{"--max-queue", "ten", "whole number"}, Case{"--drain-seconds", "nan", "seconds"},
        Case{"--drain-seconds", "-1", "seconds"}, Case{"--log-level", "loud", "info"},
        Case{"--models", ",", "folder"}}) {
    try {
      Read({c.flag, c.value});
      ADD_FAILURE() << c.flag << " " << c.value;
    } catch (const Error& error) {
      const std::string message = error.what();
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_NE(message.find(c.flag), std::string::npos) << message;
      const std::string port = std::string(c.value).substr(std::string(c.value).find(':') + 1);
      EXPECT_NE(message.find(port), std::string::npos) << message;
      EXPECT_NE(message.find(c.allowed), std::string::npos) << message;
    }
  }
  EXPECT_THROW(Read({"--no-such-flag"}), Error);
}

TEST_F(ConfigTest, BadFilesNameTheKey) {
  EXPECT_NE(FileError("max_quue: 3").find("max_quue"), std::string::npos);
  EXPECT_NE(FileError("max_queue: many").find("many"), std::string::npos);
  EXPECT_NE(FileError("[1, 2]").find("map"), std::string::npos);
  EXPECT_NE(FileError("a: [").find("config"), std::string::npos);
  EXPECT_NE(FileError("tenants: [{name: x, token: short}]").find("8 bytes"), std::string::npos);
  EXPECT_NE(FileError("tenants: [{token: long-enough}]").find("name"), std::string::npos);
  EXPECT_NE(FileError("tenants: [{name: a, token: same-token}, {name: b, token: same-token}]")
                .find("shares"),
            std::string::npos);
  EXPECT_NE(FileError("tenants: [{name: a, token: token-one}, {name: a, token: token-two}]")
                .find("unique"),
            std::string::npos);
  // A token never shows up in a message.
  EXPECT_EQ(FileError("tenants: [{name: x, token: geheim}]").find("geheim"), std::string::npos);
}

TEST_F(ConfigTest, AMissingFileIsNotFound) {
  try {
    Read({"--config", "/no/such/file"});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kNotFound);
  }
}

TEST_F(ConfigTest, HelpNamesEveryOption) {
  const CommandLine help = Read({"--help"});
  ASSERT_TRUE(help.message);
  for (const char* flag : {"--models", "--listen", "--http-listen", "--device", "--state-dir",
                           "--config", "--drain-seconds"}) {
    EXPECT_NE(help.message->find(flag), std::string::npos) << flag;
  }
  EXPECT_NE(Read({"--version"}).message->find("slalomd"), std::string::npos);
}

}  // namespace
}  // namespace slalom
