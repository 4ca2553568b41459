// The two programs as people run them: slalomd with a tiny random model, and slalom.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "tests/e2e/process_fixture.h"
#include "tests/unit/server/video_reader.h"

namespace slalom {
namespace {

namespace fs = std::filesystem;

TEST_F(ProcessTest, GeneratesAFileThatFfprobeAndADecoderAccept) {
  Start();
  const std::string file = Path("ball.mp4");
  const auto generate = Slalom({"generate", "a red ball", "-o", file, "--size", "64x32", "--frames",
                                "9", "--fps", "8", "--steps", "4", "--seed", "5"});
  ASSERT_EQ(generate->Wait(), 0) << generate->err();
  EXPECT_NE(generate->out().find("where the time went"), std::string::npos);
  EXPECT_NE(generate->out().find("measured sparsity"), std::string::npos);
  EXPECT_EQ(generate->err().find('\r'), std::string::npos) << "no bar without a terminal";
  EXPECT_NE(generate->err().find(", 4 steps, dense"), std::string::npos) << generate->err();
  // Which steps it hears of is a matter of who is faster.
  EXPECT_NE(generate->err().find(" s left\n"), std::string::npos) << generate->err();

  Process probe({"/usr/bin/ffprobe", "-v", "error", "-count_frames", "-show_entries",
                 "stream=codec_name,width,height,pix_fmt,color_space,nb_read_frames,r_frame_rate",
                 "-of", "default=noprint_wrappers=1", file});
  ASSERT_EQ(probe.Wait(), 0) << probe.err();
  EXPECT_EQ(probe.err(), "");
  for (const char* line : {"codec_name=h264", "width=64", "height=32", "pix_fmt=yuv420p",
                           "color_space=bt709", "r_frame_rate=8/1", "nb_read_frames=9"}) {
    EXPECT_NE(probe.out().find(line), std::string::npos) << line << " in " << probe.out();
  }
  const DecodedVideo video = DecodeVideo(ReadFile(file));
  ASSERT_EQ(video.frames.size(), 9u);
  EXPECT_EQ(video.frames[8].size(), 64u * 32 * 3);

  // The same seed makes the same file; another seed another one.
  const std::string same = Path("same.mp4");
  ASSERT_EQ(Slalom({"generate", "a red ball", "-o", same, "--size", "64x32", "--frames", "9",
                    "--fps", "8", "--steps", "4", "--seed", "5"})
                ->Wait(),
            0);
  EXPECT_EQ(ReadFile(same), ReadFile(file));
  const std::string other = Path("other.mp4");
  ASSERT_EQ(Slalom({"generate", "a red ball", "-o", other, "--size", "64x32", "--frames", "9",
                    "--fps", "8", "--steps", "4", "--seed", "6"})
                ->Wait(),
            0);
  EXPECT_NE(ReadFile(other), ReadFile(file));
}

TEST_F(ProcessTest, JsonHasTheStatistics) {
  Start();
  const auto generate = Slalom({"generate", "a ball", "-o", Path("json.mp4"), "--json"});
  ASSERT_EQ(generate->Wait(), 0) << generate->err();
  EXPECT_EQ(generate->err(), "");
  const std::string json = generate->out();
  EXPECT_EQ(json.front(), '{');
  for (const char* key : {"\"job_id\"", "\"statistics\"", "\"denoise_seconds\"", "\"resolved\"",
                          "\"sparsity\"", "\"seed\""}) {
    EXPECT_NE(json.find(key), std::string::npos) << key << " in " << json;
  }
  const auto bad = Slalom({"generate", "a ball", "-o", Path("x.mp4"), "--size", "7x7", "--json"});
  EXPECT_EQ(bad->Wait(), 1);
  EXPECT_NE(bad->out().find("\"INVALID_ARGUMENT\""), std::string::npos) << bad->out();
}

TEST_F(ProcessTest, ListsModelsAndJobs) {
  Start();
  const auto models = Slalom({"models"});
  ASSERT_EQ(models->Wait(), 0) << models->err();
  EXPECT_NE(models->out().find("tiny (default)"), std::string::npos) << models->out();
  const auto generate = Slalom({"generate", "a ball", "-o", Path("listed.mp4")});
  ASSERT_EQ(generate->Wait(), 0) << generate->err();
  const auto jobs = Slalom({"jobs"});
  ASSERT_EQ(jobs->Wait(), 0);
  EXPECT_NE(jobs->out().find("succeeded"), std::string::npos) << jobs->out();
  EXPECT_NE(jobs->out().find("a ball"), std::string::npos);
}

TEST_F(ProcessTest, FailuresPrintCodeMessageAndAdviceAndLeaveNoFile) {
  Start();
  const auto bad = Slalom({"generate", "a ball", "-o", Path("bad.mp4"), "--frames", "8"});
  EXPECT_EQ(bad->Wait(), 1);
  EXPECT_NE(bad->err().find("INVALID_ARGUMENT"), std::string::npos) << bad->err();
  EXPECT_NE(bad->err().find("num_frames"), std::string::npos) << bad->err();
  EXPECT_NE(bad->err().find("what to try"), std::string::npos) << bad->err();
  EXPECT_FALSE(fs::exists(Path("bad.mp4")));
  EXPECT_FALSE(fs::exists(Path("bad.mp4.part")));
  EXPECT_EQ(Slalom({"generate", "a ball", "-o", Path("bad.mp4"), "--size", "big"})->Wait(), 2);
  EXPECT_EQ(Slalom({"generate", "a ball"})->Wait(), 2);
  for (const char* deadline : {"0", "-1", "inf", "nan"}) {
    EXPECT_EQ(Slalom({"generate", "a ball", "-o", Path("bad.mp4"), "--deadline", deadline})->Wait(),
              2)
        << deadline;
  }
  address_ = "127.0.0.1:1";
  const auto nobody = Slalom({"models"});
  EXPECT_EQ(nobody->Wait(), 1);
  EXPECT_NE(nobody->err().find("UNAVAILABLE"), std::string::npos) << nobody->err();
}

TEST_F(ProcessTest, CtrlCCancelsTheJob) {
  Start();
  const auto generate = LongGenerate(Path("interrupted.mp4"));
  ASSERT_TRUE(generate->WaitForOutput("denoise")) << generate->err();
  generate->Signal(SIGINT);
  EXPECT_EQ(generate->Wait(), 130);
  EXPECT_FALSE(fs::exists(Path("interrupted.mp4")));
  EXPECT_FALSE(fs::exists(Path("interrupted.mp4.part")));
  EXPECT_TRUE(JobBecomes(JobId(*generate), "cancelled"));
}

TEST_F(ProcessTest, AKilledClientsJobIsCancelledAndTheServerGoesOn) {
  Start();
  const auto generate = LongGenerate(Path("killed.mp4"));
  ASSERT_TRUE(generate->WaitForOutput("denoise")) << generate->err();
  generate->Signal(SIGKILL);
  EXPECT_EQ(generate->Wait(), 128 + SIGKILL);
  EXPECT_FALSE(fs::exists(Path("killed.mp4")));
  EXPECT_TRUE(JobBecomes(JobId(*generate), "cancelled"));
  const auto next = Slalom({"generate", "a ball", "-o", Path("next.mp4")});
  EXPECT_EQ(next->Wait(), 0) << next->err();
}

TEST_F(ProcessTest, ADetachedJobSurvivesItsClientAndIsResumed) {
  Start();
  const auto submit = Slalom({"generate", "a ball", "--detach"});
  ASSERT_EQ(submit->Wait(), 0) << submit->err();
  std::string id = submit->out();
  ASSERT_FALSE(id.empty());
  id.pop_back();
  const auto resume = Slalom({"resume", id, "-o", Path("resumed.mp4")});
  ASSERT_EQ(resume->Wait(), 0) << resume->err();
  EXPECT_EQ(DecodeVideo(ReadFile(Path("resumed.mp4"))).frames.size(), 5u);
  const auto cancel = Slalom({"cancel", id});
  EXPECT_EQ(cancel->Wait(), 0);
  EXPECT_EQ(Slalom({"cancel", "nobody"})->Wait(), 1);
}

TEST_F(ProcessTest, AFullDiskOfTheClientIsReportedAndLeavesNoFile) {
  Start();
  Process::Limits limits;
  limits.file_bytes = 512;
  const auto generate = Slalom({"generate", "a ball", "-o", Path("full.mp4")}, limits);
  EXPECT_EQ(generate->Wait(), 1);
  EXPECT_NE(generate->err().find("RESOURCE_EXHAUSTED"), std::string::npos) << generate->err();
  EXPECT_NE(generate->err().find("full.mp4"), std::string::npos) << generate->err();
  EXPECT_FALSE(fs::exists(Path("full.mp4")));
  EXPECT_FALSE(fs::exists(Path("full.mp4.part")));
  const auto device = Slalom({"generate", "a ball", "-o", "/dev/full"});
  EXPECT_EQ(device->Wait(), 1);
  EXPECT_TRUE(fs::is_character_file("/dev/full"));
}

TEST_F(ProcessTest, SigtermFinishesWhatRunsAndExitsWithZero) {
  Start();
  const std::string file = Path("drained.mp4");
  const auto generate = Slalom(
      {"generate", "a ball", "-o", file, "--size", "128x128", "--frames", "9", "--steps", "20"});
  ASSERT_TRUE(generate->WaitForOutput("denoise")) << generate->err();
  daemon_->Signal(SIGTERM);
  EXPECT_EQ(generate->Wait(), 0) << generate->err();
  EXPECT_EQ(daemon_->Wait(), 0) << daemon_->err();
  EXPECT_EQ(DecodeVideo(ReadFile(file)).frames.size(), 9u);
}

TEST_F(ProcessTest, ASecondSignalEndsItNow) {
  Start();
  const auto generate = LongGenerate(Path("hurried.mp4"));
  ASSERT_TRUE(generate->WaitForOutput("denoise")) << generate->err();
  daemon_->Signal(SIGTERM);
  ASSERT_TRUE(daemon_->WaitForOutput("draining"));
  daemon_->Signal(SIGTERM);
  EXPECT_EQ(daemon_->Wait(), 1) << "a job was lost";
  EXPECT_EQ(generate->Wait(), 1);
  EXPECT_NE(generate->err().find("UNAVAILABLE"), std::string::npos) << generate->err();
  EXPECT_FALSE(fs::exists(Path("hurried.mp4")));
}

TEST_F(ProcessTest, ABusyPortIsAClearFailure) {
  Start();
  Process second(
      {SLALOMD, "--models", Model(), "--listen", address_, "--http-listen", "127.0.0.1:0"});
  EXPECT_EQ(second.Wait(), 1);
  EXPECT_NE(second.err().find("cannot bind " + address_), std::string::npos) << second.err();
}

// gRPC's listener does not survive it, so whoever restarts servers must hear of it.
TEST_F(ProcessTest, RunningOutOfDescriptorsIsSeenByTheProbes) {
  if (std::string(SANITIZE).find("undefined") != std::string::npos) {
    GTEST_SKIP() << "the undefined-behaviour sanitizer looks at types by means of a pipe";
  }
  Start();
  httplib::Client http("http://" + http_address_);
  ASSERT_EQ(http.Get("/healthz")->status, 200);
  rlimit before{};
  ASSERT_EQ(prlimit(daemon_->pid(), RLIMIT_NOFILE, nullptr, &before), 0);
  const rlimit few{40, before.rlim_max};
  ASSERT_EQ(prlimit(daemon_->pid(), RLIMIT_NOFILE, &few, nullptr), 0);
  {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port =
        htons(static_cast<std::uint16_t>(std::stoi(address_.substr(address_.rfind(':') + 1))));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    std::vector<int> sockets;
    for (int i = 0; i < 60; ++i) {
      sockets.push_back(socket(AF_INET, SOCK_STREAM, 0));
      connect(sockets.back(), reinterpret_cast<const sockaddr*>(&address), sizeof(address));
    }
    EXPECT_TRUE(daemon_->WaitForOutput("no connection is accepted any more")) << daemon_->err();
    for (const int each : sockets) close(each);
  }
  prlimit(daemon_->pid(), RLIMIT_NOFILE, &before, nullptr);
  for (const char* path : {"/healthz", "/readyz"}) {
    const auto response = http.Get(path);
    ASSERT_TRUE(response) << path;
    EXPECT_EQ(response->status, 503) << path;
  }
  daemon_->Signal(SIGTERM);
  EXPECT_EQ(daemon_->Wait(), 0) << daemon_->err();
}

TEST_F(ProcessTest, BadConfigurationExitsWithTwo) {
  for (const std::vector<std::string>& arguments :
       std::vector<std::vector<std::string>>{{"--no-such-flag"},
                                             {"--listen", "nonsense"},
                                             {"--config", "/no/such/file"},
                                             {"--config", "/tmp"},
                                             {"--device", "tpu"}}) {
    std::vector<std::string> all = {SLALOMD};
    all.insert(all.end(), arguments.begin(), arguments.end());
    Process daemon(all);
    EXPECT_EQ(daemon.Wait(), 2) << arguments[0];
    EXPECT_FALSE(daemon.err().empty());
  }
  const auto no_model = Daemon({}, "/no/such/model");
  EXPECT_EQ(no_model->Wait(), 2);
  EXPECT_NE(no_model->err().find("/no/such/model"), std::string::npos) << no_model->err();
  const auto bad_shape = Daemon({"--warm-up", "100x100x5"});
  EXPECT_EQ(bad_shape->Wait(), 2);
  EXPECT_NE(bad_shape->err().find("warm_up"), std::string::npos) << bad_shape->err();
}

TEST_F(ProcessTest, ADamagedModelFileIsAClearFailure) {
  const std::string damaged = Path("damaged");
  fs::copy(Model(), damaged, fs::copy_options::recursive);
  std::string victim;
  for (const auto& entry : fs::directory_iterator(damaged + "/transformer")) {
    if (entry.path().extension() == ".safetensors") victim = entry.path().string();
  }
  ASSERT_FALSE(victim.empty());
  fs::resize_file(victim, fs::file_size(victim) / 2);
  const auto daemon = Daemon({}, damaged);
  EXPECT_EQ(daemon->Wait(), 1);
  EXPECT_NE(daemon->err().find(fs::path(victim).filename().string()), std::string::npos)
      << daemon->err();
}

}  // namespace
}  // namespace slalom
