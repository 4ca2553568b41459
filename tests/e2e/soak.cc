#include "tests/e2e/soak.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <functional>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <thread>
#include <utility>

#include "kernels/core/error.h"
#include "slalom/v1/video_generation.grpc.pb.h"
#include "tests/e2e/soak_server.h"

namespace slalom {
namespace {

namespace fs = std::filesystem;
using grpc::StatusCode;
using std::chrono::milliseconds;
using Random = std::mt19937_64;
using Clock = std::chrono::steady_clock;

constexpr int kTwins = 8;  // different clips, each made many times
constexpr auto kRetryPause = milliseconds(30);
constexpr auto kPatience = std::chrono::minutes(5);
constexpr double kMemoryGrowthMib = 48;
constexpr int kSpareThreads = 8;  // gRPC's own come and go
constexpr int kSpareDescriptors = 16;

enum class Fate { kFetch, kRepeat, kDetached, kSlow, kCancel, kDisconnect, kDeadline, kBadInput };
constexpr const char* kFateNames[] = {"fetch",  "repeat",     "detached", "slow",
                                      "cancel", "disconnect", "deadline", "bad input"};
const char* NameOf(Fate fate) { return kFateNames[static_cast<int>(fate)]; }

bool MustSucceed(Fate fate) { return fate <= Fate::kSlow; }

v1::GenerateVideoRequest Twin(int index) {
  v1::GenerateVideoRequest request;
  request.set_prompt("clip number " + std::to_string(index));
  request.set_seed(static_cast<std::uint64_t>(index));
  request.set_width(index % 2 == 0 ? 64 : 96);
  request.set_height(32);
  request.set_num_frames(index % 4 == 3 ? 13 : 5);
  request.set_steps(2 + index);
  request.set_sampler(index % 3 == 0 ? v1::SAMPLER_EULER : v1::SAMPLER_UNIPC);
  return request;
}

// What became of one call.
struct Ending {
  grpc::Status status;
  std::string job_id;
  std::string bytes;  // so far
};

// Returns false to leave the call.
using OnEvent = std::function<bool(const v1::GenerateVideoResponse&)>;

class Soaker {
 public:
  explicit Soaker(const SoakOptions& options)
      : options_(options), server_(options.slalomd, options.model, options.folder) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(-1);
    // A server that comes back is found at once.
    arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 20);
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 100);
    // What one attempt may take, despite its name: under a sanitizer a start is slow.
    arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 20'000);
    stub_ = v1::VideoGeneration::NewStub(grpc::CreateCustomChannel(
        server_.address(), grpc::InsecureChannelCredentials(), arguments));
  }

  SoakReport Run() {
    const auto start = Clock::now();
    MakeTwins();
    const int threads = server_.Threads();
    const int descriptors = server_.Descriptors();
    const int calm = options_.jobs / 5;  // the last ones: no more kills, memory is watched
    RunJobs(options_.jobs - calm, options_.seconds_per_kill > 0);
    WaitUntilIdle();
    report_.resident_mib_before = server_.ResidentMib();
    RunJobs(calm, false);
    WaitUntilIdle();
    report_.resident_mib_after = server_.ResidentMib();
    CheckJobs();
    CheckFiles();
    std::this_thread::sleep_for(std::chrono::seconds(3));  // ended encoders are joined
    CheckLeftOvers(threads, descriptors);
    if (const int code = server_.Stop(); code != 0) {
      Problem("the server ended with " + std::to_string(code) + ": " + server_.log());
    }
    if (!server_.sanitizer_reports().empty()) Problem(server_.sanitizer_reports());
    report_.seconds = std::chrono::duration<double>(Clock::now() - start).count();
    return report_;
  }

 private:
  struct Accepted {
    int twin = 0;
    Fate fate = Fate::kFetch;
  };

  void Problem(const std::string& what) {
    std::lock_guard lock(mutex_);
    report_.problems.push_back(what);
  }
  void Count(const std::string& what) {
    std::lock_guard lock(mutex_);
    ++report_.counts[what];
  }

  // --- calls ---

  template <typename Start>
  void Stream(const Start& start, std::optional<milliseconds> deadline, const OnEvent& on_event,
              Ending* ending) {
    grpc::ClientContext context;
    if (deadline) context.set_deadline(std::chrono::system_clock::now() + *deadline);
    // A call that fails at once while the channel connects lets nobody drive the connecting.
    context.set_wait_for_ready(true);
    const auto reader = start(&context);
    v1::GenerateVideoResponse event;
    bool stay = true;
    while (reader->Read(&event)) {
      if (event.has_accepted()) ending->job_id = event.accepted().job_id();
      if (event.has_video_chunk()) {
        if (event.video_chunk().offset() != std::ssize(ending->bytes)) Problem("a gap in a video");
        ending->bytes += event.video_chunk().data();
      }
      if (stay && on_event && !on_event(event)) {
        stay = false;
        context.TryCancel();
      }
    }
    ending->status = reader->Finish();
  }

  void Generate(const v1::GenerateVideoRequest& request, std::optional<milliseconds> deadline,
                const OnEvent& on_event, Ending* ending) {
    Stream([&](grpc::ClientContext* context) { return stub_->GenerateVideo(context, request); },
           deadline, on_event, ending);
  }

  void Resume(const OnEvent& on_event, Ending* ending) {
    v1::ResumeVideoRequest request;
    request.set_job_id(ending->job_id);
    request.set_byte_offset(std::ssize(ending->bytes));
    Stream([&](grpc::ClientContext* context) { return stub_->ResumeVideo(context, request); }, {},
           on_event, ending);
  }

  // Not accepted, or the stream broke because the server was killed.
  static bool ServerGone(const grpc::Status& status) {
    return status.error_code() == StatusCode::UNAVAILABLE;
  }

  // Until the server takes the job or has a reason not to; a full queue and a dead server are none.
  void Submit(const v1::GenerateVideoRequest& request, std::optional<milliseconds> deadline,
              const OnEvent& on_event, Ending* ending) {
    const auto give_up = Clock::now() + kPatience;
    while (Clock::now() < give_up) {
      Generate(request, deadline, on_event, ending);
      const StatusCode code = ending->status.error_code();
      const bool again = code == StatusCode::UNAVAILABLE || code == StatusCode::RESOURCE_EXHAUSTED;
      if (!again || !ending->job_id.empty()) return;
      std::this_thread::sleep_for(kRetryPause);
    }
  }

  // Whatever it takes to get the whole clip of a job that was accepted.
  void Fetch(const v1::GenerateVideoRequest& request, bool by_request_id, Ending* ending) {
    const auto give_up = Clock::now() + kPatience;
    while (ServerGone(ending->status) && Clock::now() < give_up) {
      std::this_thread::sleep_for(kRetryPause);
      if (!by_request_id) {
        Resume({}, ending);
        continue;
      }
      Ending again;
      Generate(request, {}, {}, &again);
      if (!again.job_id.empty() && again.job_id != ending->job_id) {
        Problem("request_id " + request.request_id() + " became two jobs");
      }
      if (again.job_id.empty()) again.job_id = ending->job_id;
      *ending = std::move(again);
    }
  }

  // --- jobs ---

  void MakeTwins() {
    for (int i = 0; i < kTwins; ++i) {
      Ending ending;
      Submit(Twin(i), {}, {}, &ending);
      if (!ending.status.ok()) {
        throw Error(ErrorCode::kInternal, "soak: " + ending.status.error_message());
      }
      expected_.push_back(ending.bytes);
      Note(ending.job_id, i, Fate::kFetch);
    }
  }

  void Note(const std::string& job_id, int twin, Fate fate) {
    if (job_id.empty()) return;
    std::lock_guard lock(mutex_);
    accepted_[job_id] = {twin, fate};
  }

  void RunJobs(int count, bool kill) {
    std::atomic<int> left = count;
    std::atomic<bool> done = false;
    std::vector<std::thread> clients;
    for (int c = 0; c < options_.clients; ++c) {
      clients.emplace_back([&] {
        while (left-- > 0) {
          RunJob(next_job_++);
          ++ended_jobs_;
        }
      });
    }
    std::thread killer([&] {
      Random random(options_.seed);
      double mean = options_.seconds_per_kill;
      int ended_at_kill = -1;
      while (kill && !done) {
        const double pause =
            std::exponential_distribution<double>(1 / std::max(mean, 1e-3))(random);
        const auto when = Clock::now() + std::chrono::duration<double>(pause);
        while (!done && (Clock::now() < when || ended_jobs_ == ended_at_kill)) {
          std::this_thread::sleep_for(milliseconds(5));
        }
        if (done) return;
        ended_at_kill = ended_jobs_;
        const auto start = Clock::now();
        server_.KillAndRestart();
        // Where starting takes long (a sanitizer, a busy machine) a server must live longer, or
        // nothing would ever be done: for twice its start, and until a job at least has ended.
        const std::chrono::duration<double> starting = Clock::now() - start;
        mean = std::max(options_.seconds_per_kill, 2 * starting.count());
        Count("kills");
      }
    });
    for (std::thread& client : clients) client.join();
    done = true;
    killer.join();
  }

  void RunJob(int number) {
    Random random(options_.seed * 1'000'003 + static_cast<std::uint64_t>(number));
    const auto roll = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    std::discrete_distribution<int> fates({50, 10, 10, 3, 9, 9, 4, 5});
    const auto fate = static_cast<Fate>(fates(random));
    const int twin = roll(kTwins);
    v1::GenerateVideoRequest request = Twin(twin);
    request.set_priority(static_cast<v1::Priority>(1 + roll(3)));
    request.set_previews(roll(4) == 0);
    if (fate == Fate::kRepeat) request.set_request_id("soak-" + std::to_string(number));
    if (fate == Fate::kDetached) request.set_detached(true);
    if (fate == Fate::kBadInput) request.set_width(7);
    Ending ending;
    const int leave_after = 1 + roll(6);
    Submit(request,
           fate == Fate::kDeadline ? std::optional(milliseconds(1 + roll(60))) : std::nullopt,
           Behaviour(fate, leave_after), &ending);
    Note(ending.job_id, twin, fate);
    if (MustSucceed(fate) && fate != Fate::kDetached) {
      Fetch(request, fate == Fate::kRepeat, &ending);
      CheckBytes(NameOf(fate), twin, ending);
    }
    const auto code = static_cast<int>(ending.status.error_code());
    Count(std::string(NameOf(fate)) + " " +
          (code == 0 ? "OK" : ErrorCodeName(static_cast<ErrorCode>(code))));
    if (fate == Fate::kBadInput && code != StatusCode::INVALID_ARGUMENT) {
      Problem("bad input: " + ending.status.error_message());
    }
  }

  OnEvent Behaviour(Fate fate, int leave_after) {
    switch (fate) {
      case Fate::kDetached:
        return [](const auto& event) { return !event.has_accepted(); };
      case Fate::kSlow:
        return [](const auto&) {
          std::this_thread::sleep_for(milliseconds(30));
          return true;
        };
      case Fate::kDisconnect:
        return [left = leave_after](const auto&) mutable { return --left > 0; };
      case Fate::kCancel:
        return [this, left = leave_after, id = std::string()](const auto& event) mutable {
          if (event.has_accepted()) id = event.accepted().job_id();
          if (--left == 0) Cancel(id);
          return true;
        };
      default:
        return {};
    }
  }

  void Cancel(const std::string& job_id) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    v1::CancelVideoRequest request;
    request.set_job_id(job_id);
    v1::CancelVideoResponse response;
    const grpc::Status status = stub_->CancelVideo(&context, request, &response);
    if (status.error_code() == StatusCode::NOT_FOUND) Problem("to be cancelled: lost " + job_id);
  }

  // The bytes that a client has put together are those of the same clip, made without disturbance.
  void CheckBytes(const std::string& what, int twin, const Ending& ending) {
    if (!ending.status.ok()) {
      Problem(what + " " + ending.job_id + ": " + std::to_string(ending.status.error_code()) + " " +
              ending.status.error_message());
      return;
    }
    if (ending.bytes == expected_[static_cast<std::size_t>(twin)]) return;
    Problem(what + " " + ending.job_id + ": other bytes than its twin");
  }

  // --- checks ---

  // The first call after a restart may find the connection to the process that was killed.
  std::vector<v1::Job> ListJobs() {
    const auto give_up = Clock::now() + kPatience;
    std::vector<v1::Job> jobs;
    v1::ListJobsRequest request;
    while (true) {
      grpc::ClientContext context;
      v1::ListJobsResponse response;
      const grpc::Status status = stub_->ListJobs(&context, request, &response);
      if (status.ok()) {
        jobs.insert(jobs.end(), response.jobs().begin(), response.jobs().end());
        request.set_page_token(response.next_page_token());
        if (request.page_token().empty()) return jobs;
        continue;
      }
      if (status.error_code() != StatusCode::UNAVAILABLE || Clock::now() >= give_up) {
        Problem("ListJobs: " + status.error_message());
        return {};
      }
      std::this_thread::sleep_for(milliseconds(50));
    }
  }

  void WaitUntilIdle() {
    const auto give_up = Clock::now() + kPatience;
    while (Clock::now() < give_up) {
      const auto jobs = ListJobs();
      const bool idle = std::all_of(jobs.begin(), jobs.end(), [](const v1::Job& job) {
        return job.state() >= v1::JOB_STATE_SUCCEEDED;
      });
      if (idle) return;
      std::this_thread::sleep_for(milliseconds(50));
    }
    Problem("jobs are still live");
  }

  void CheckJobs() {
    std::map<std::string, v1::Job> known;
    for (v1::Job& job : ListJobs()) known[job.job_id()] = std::move(job);
    Random random(options_.seed);
    for (const auto& [id, accepted] : accepted_) {
      const auto found = known.find(id);
      if (found == known.end()) {
        Problem(std::string(NameOf(accepted.fate)) + ": accepted and lost: " + id);
        continue;
      }
      const v1::Job& job = found->second;
      const bool succeeded = job.state() == v1::JOB_STATE_SUCCEEDED;
      if (MustSucceed(accepted.fate) && !succeeded) {
        Problem(std::string(NameOf(accepted.fate)) + " " + id + ": " + job.error().message());
      }
      const int code = job.error().code();
      if (!succeeded && code != StatusCode::CANCELLED && code != StatusCode::DEADLINE_EXCEEDED) {
        Problem(std::string(NameOf(accepted.fate)) + " " + id + ": " + job.error().message());
      }
      if (!succeeded || (accepted.fate != Fate::kDetached && random() % 8 != 0)) continue;
      Ending whole;
      whole.job_id = id;
      Resume({}, &whole);
      // From any byte on.
      Ending rest;
      rest.job_id = id;
      rest.bytes = whole.bytes.substr(0, random() % (whole.bytes.size() + 1));
      Resume({}, &rest);
      if (whole.bytes.empty() || rest.bytes != whole.bytes)
        Problem("resume " + id + ": wrong bytes");
    }
    Count("accepted " + std::to_string(accepted_.size()));
  }

  void CheckFiles() {
    std::set<std::string> wanted;
    for (const v1::Job& job : ListJobs()) {
      if (job.state() == v1::JOB_STATE_SUCCEEDED) wanted.insert(job.job_id() + ".mp4");
    }
    for (const auto& file : fs::directory_iterator(server_.jobs_folder())) {
      const std::string name = file.path().filename();
      if (wanted.erase(name) == 0) Problem("a file is left over: " + name);
    }
    for (const std::string& name : wanted) Problem("a file is missing: " + name);
  }

  void CheckLeftOvers(int threads, int descriptors) {
    const int more_threads = server_.Threads() - threads;
    const int more_descriptors = server_.Descriptors() - descriptors;
    if (more_threads > kSpareThreads) Problem(std::to_string(more_threads) + " threads more");
    if (more_descriptors > kSpareDescriptors) {
      Problem(std::to_string(more_descriptors) + " descriptors more");
    }
    const double growth = report_.resident_mib_after - report_.resident_mib_before;
    if (options_.check_memory && growth > kMemoryGrowthMib) {
      Problem("memory grew by " + std::to_string(growth) + " MiB");
    }
  }

  const SoakOptions options_;
  SoakServer server_;
  std::unique_ptr<v1::VideoGeneration::Stub> stub_;
  std::vector<std::string> expected_;  // bytes, by twin
  std::atomic<int> next_job_ = 0;
  std::atomic<int> ended_jobs_ = 0;

  std::mutex mutex_;
  std::map<std::string, Accepted> accepted_;  // by job
  SoakReport report_;
};

}  // namespace

SoakReport Soak(const SoakOptions& options) { return Soaker(options).Run(); }

}  // namespace slalom
