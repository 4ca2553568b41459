// The program run_network: what it writes, and how it fails.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "model/safetensors_writer.h"
#include "model/weights.h"
#include "tests/parity/golden.h"

namespace slalom {
namespace {

const std::string kGoldens = SLALOM_SOURCE_DIR "/tests/parity/goldens";

struct Outcome {
  int exit_code = -1;
  std::string output;  // stdout and stderr
};

class RunNetworkProgram : public testing::Test {
 protected:
  RunNetworkProgram() {
    std::string pattern = testing::TempDir() + "run_network_XXXXXX";
    folder_ = mkdtemp(pattern.data());
  }
  ~RunNetworkProgram() override { std::filesystem::remove_all(folder_); }

  std::string Path(const std::string& name) const { return folder_ + "/" + name; }

  // Arguments as in a shell.
  static Outcome Run(const std::string& arguments) {
    Outcome outcome;
    FILE* pipe = popen((std::string(SLALOM_RUN_NETWORK " ") + arguments + " 2>&1").c_str(), "r");
    std::array<char, 4096> buffer;
    while (std::fgets(buffer.data(), buffer.size(), pipe)) outcome.output += buffer.data();
    outcome.exit_code = WEXITSTATUS(pclose(pipe));
    return outcome;
  }

  // Runs and expects exit code 1 and a message with `part` in it, and no output file.
  void ExpectFailure(const std::string& arguments, const std::string& part) {
    SCOPED_TRACE(arguments);
    const Outcome outcome = Run(arguments);
    EXPECT_EQ(outcome.exit_code, 1);
    EXPECT_NE(outcome.output.find(part), std::string::npos) << outcome.output;
    EXPECT_FALSE(std::filesystem::exists(Path("out")));
  }

  std::string folder_;
};

Tensor Filled(const Shape& shape, DType dtype = DType::kF32) {
  Tensor tensor = Tensor::Host(shape, dtype);
  std::fill_n(tensor.data<std::byte>(), tensor.NumBytes(), std::byte{0});
  return tensor;
}

std::map<std::string, Tensor> SlaInputs() {
  return {{"q", Filled({1, 2, 20, 64})}, {"k", Filled({1, 2, 20, 64})},
          {"v", Filled({1, 2, 20, 64})}, {"proj_weight", Filled({64, 64})},
          {"proj_bias", Filled({64})},   {"map", Filled({1, 2, 2, 2}, DType::kU8)}};
}

TEST_F(RunNetworkProgram, WritesWhatTheGoldenHolds) {
  const Outcome outcome =
      Run("transformer " + kGoldens + "/cases/transformer_one_frame.in.safetensors " + Path("out") +
          " --model " + kGoldens + "/odd --dtype f32");
  ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
  const Weights ours = Weights::OpenFile(Path("out"));
  const Weights golden =
      Weights::OpenFile(kGoldens + "/cases/transformer_one_frame.out.safetensors");
  EXPECT_EQ(ours.Names(), std::vector<std::string>{"sample"});
  EXPECT_LE(MaxRelativeError(ours.Get("sample"), golden.Get("sample")), kF32Tolerance);
}

TEST_F(RunNetworkProgram, TokenizerTakesTextInsteadOfAFile) {
  const Outcome outcome =
      Run("tokenizer - " + Path("out") + " --text '' --model " + kGoldens + "/odd");
  ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
  const Weights ours = Weights::OpenFile(Path("out"));
  EXPECT_EQ(ours.Get("input_ids").data<std::int64_t>()[0], 1);
  EXPECT_EQ(ToString(ours.Get("attention_mask").shape()), "[1, 512]");
}

TEST_F(RunNetworkProgram, NamesAMissingTensor) {
  std::map<std::string, Tensor> inputs = SlaInputs();
  inputs.erase("v");
  WriteSafetensors(Path("in"), inputs);
  ExpectFailure("sla " + Path("in") + " " + Path("out"),
                "tensor 'v' is not there; expected F32 [1, 2, 20, 64]");
}

TEST_F(RunNetworkProgram, NamesAWrongShape) {
  std::map<std::string, Tensor> inputs = SlaInputs();
  inputs["k"] = Filled({1, 2, 19, 64});
  WriteSafetensors(Path("in"), inputs);
  ExpectFailure("sla " + Path("in") + " " + Path("out"),
                "tensor 'k' is F32 [1, 2, 19, 64]; expected F32 [1, 2, 20, 64]");
}

TEST_F(RunNetworkProgram, NamesAWrongType) {
  std::map<std::string, Tensor> inputs = SlaInputs();
  inputs["proj_bias"] = Filled({64}, DType::kF64);
  WriteSafetensors(Path("in"), inputs);
  ExpectFailure("sla " + Path("in") + " " + Path("out"),
                "tensor 'proj_bias' is F64 [64]; expected F32 [64]");
}

TEST_F(RunNetworkProgram, ChecksAForcedMap) {
  std::map<std::string, Tensor> inputs = SlaInputs();
  WriteSafetensors(Path("in"), inputs);
  ExpectFailure("sla " + Path("in") + " " + Path("out") + " --block-q 8 --block-k 10",
                "tensor 'map' is U8 [1, 2, 2, 2]; expected U8 [1, 2, 3, 2]");
  inputs["map"].data<std::uint8_t>()[3] = 7;
  WriteSafetensors(Path("in"), inputs);
  ExpectFailure("sla " + Path("in") + " " + Path("out") + " --block-q 10 --block-k 10",
                "tensor 'map': expected 1 (critical)");
}

TEST_F(RunNetworkProgram, ChecksTheGrid) {
  WriteSafetensors(Path("in"), SlaInputs());
  ExpectFailure("salad " + Path("in") + " " + Path("out") + " --grid 2,3,4", "F * H * W = 20");
}

TEST_F(RunNetworkProgram, ChecksTheCommandLine) {
  ExpectFailure("", "NET is required");
  ExpectFailure("diffusion in " + Path("out"), "diffusion");
  ExpectFailure("sla " + Path("in") + " " + Path("out") + " --scope some", "some");
  ExpectFailure("transformer " + Path("in") + " " + Path("out"), "No such file");
  ExpectFailure("tokenizer - " + Path("out") + " --text x", "tokenizer needs --model");
  ExpectFailure("text_encoder - " + Path("out") + " --model " + kGoldens + "/odd",
                "tensor 'input_ids': no input file");
}

TEST_F(RunNetworkProgram, TheBackwardPassNeedsTheOutputsGradient) {
  WriteSafetensors(Path("in"), SlaInputs());
  ExpectFailure("sla_backward " + Path("in") + " " + Path("out"), "tensor 'do'");
}

TEST_F(RunNetworkProgram, HelpIsNotAnError) {
  const Outcome outcome = Run("--help");
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_NE(outcome.output.find("--feature-map"), std::string::npos);
}

}  // namespace
}  // namespace slalom
