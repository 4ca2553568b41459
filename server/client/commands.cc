#include "server/client/commands.h"

#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <grpcpp/support/status_code_enum.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <utility>

#include "server/client/output_file.h"
#include "server/client/progress.h"

namespace slalom::client {
namespace {

std::string ToJson(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string json;
  return google::protobuf::util::MessageToJsonString(message, &json, options).ok() ? json : "{}";
}

std::string Quoted(const std::string& text) {
  google::protobuf::Value value;
  value.set_string_value(text);
  return ToJson(value);
}

void Report(const CallError& error, const std::string& job_id, bool json) {
  if (json) {
    std::printf("{\"error\":{\"code\":%s,\"message\":%s,\"advice\":%s},\"job_id\":%s}\n",
                Quoted(error.code_name()).c_str(), Quoted(error.what()).c_str(),
                Quoted(error.advice()).c_str(), Quoted(job_id).c_str());
  }
  std::fprintf(stderr, "slalom: %s: %s\n  what to try: %s\n", error.code_name(), error.what(),
               error.advice().c_str());
}

// Runs a command, reports what it throws.
int Guarded(bool json, const std::function<void()>& command) {
  try {
    command();
    return 0;
  } catch (const CallError& error) {
    Report(error, "", json);
    return kExitFailure;
  }
}

ProgressView::Style StyleFor(bool json) {
  if (json) return ProgressView::Style::kSilent;
  return isatty(STDERR_FILENO) ? ProgressView::Style::kBar : ProgressView::Style::kLines;
}

// One stream into one file.
class Receiver {
 public:
  Receiver(const std::string& output, bool json) : output_(output), json_(json) {
    if (!output.empty()) file_.emplace(output);
    view_.emplace(stderr, StyleFor(json));
  }

  void OnEvent(const v1::GenerateVideoResponse& event) {
    if (event.has_accepted()) {
      accepted_ = event.accepted();
      view_->OnAccepted(accepted_);
    } else if (event.has_progress()) {
      view_->OnProgress(event.progress());
    } else if (event.has_video_chunk() && file_) {
      file_->Write(event.video_chunk().offset(), event.video_chunk().data());
    } else if (event.has_completed()) {
      statistics_ = event.completed().statistics();
    }
  }

  // After the stream has ended well.
  void Commit() {
    view_.reset();
    if (!file_) return;
    if (!statistics_ || file_->size() != statistics_->bytes()) {
      throw CallError(grpc::StatusCode::DATA_LOSS,
                      "the stream ended after " + std::to_string(file_->size()) + " bytes of " +
                          std::to_string(statistics_ ? statistics_->bytes() : 0));
    }
    file_->Commit();
    if (json_) {
      std::printf("{\"job_id\":%s,\"file\":%s,\"resolved\":%s,\"statistics\":%s}\n",
                  Quoted(job_id()).c_str(), Quoted(output_).c_str(),
                  ToJson(accepted_.resolved()).c_str(), ToJson(*statistics_).c_str());
    } else {
      std::printf("%s: %s", output_.c_str(),
                  StatisticsText(*statistics_, accepted_.resolved().fps()).c_str());
    }
  }

  void EndView() { view_.reset(); }
  const std::string& job_id() const { return accepted_.job_id(); }

 private:
  const std::string output_;
  const bool json_;
  std::optional<OutputFile> file_;
  std::optional<ProgressView> view_;
  v1::Accepted accepted_;
  std::optional<v1::Statistics> statistics_;
};

// Thrown out of a stream whose job is meant to go on without us.
struct Submitted {};

// The job must not go on for nobody: says so to the server, whatever state the call is in.
void CancelQuietly(Client& client, const std::string& job_id) {
  if (job_id.empty()) return;
  try {
    client.Cancel(job_id);
  } catch (const CallError&) {
    // The server cancels the job of a broken call by itself.
  }
}

int Receive(Client& client, const std::string& output, bool json,
            const std::function<void(const Client::OnEvent&)>& call, bool ours) {
  std::optional<Receiver> receiver;
  try {
    receiver.emplace(output, json);
    call([&](const v1::GenerateVideoResponse& event) {
      receiver->OnEvent(event);
      if (output.empty() && event.has_accepted()) throw Submitted{};
    });
    receiver->Commit();
    return 0;
  } catch (const Submitted&) {
    receiver->EndView();
    if (json) {
      std::printf("{\"job_id\":%s}\n", Quoted(receiver->job_id()).c_str());
    } else {
      std::printf("%s\n", receiver->job_id().c_str());
    }
    return 0;
  } catch (const CallError& error) {
    const std::string job_id = receiver ? receiver->job_id() : "";
    receiver.reset();  // removes the partial file, ends the bar's line
    if (client.interrupted()) {
      CancelQuietly(client, job_id);
      std::fprintf(stderr, "slalom: interrupted%s\n",
                   job_id.empty() ? "" : "; the job is cancelled");
      return kExitInterrupted;
    }
    if (error.code() == grpc::StatusCode::UNAVAILABLE && !job_id.empty()) {
      // A server with a state folder comes back with the job.
      Report(CallError(error.code(), error.what(),
                       "`slalom resume " + job_id + " -o " + (output.empty() ? "FILE" : output) +
                           "` once the server is back: it goes on where it was if slalomd has a "
                           "--state-dir"),
             job_id, json);
      return kExitFailure;
    }
    // What failed may be on this side (a full disk): then the job is of no use to anybody.
    if (ours) CancelQuietly(client, job_id);
    Report(error, job_id, json);
    return kExitFailure;
  }
}

std::string Line(const v1::Job& job) {
  static constexpr const char* kStates[] = {"?",         "queued", "running",
                                            "succeeded", "failed", "cancelled"};
  char text[256];
  std::snprintf(text, sizeof(text), "%-26s %-10s %-12s %3d/%-3d %8.0f s  ", job.job_id().c_str(),
                job.state() < 6 ? kStates[job.state()] : "?",
                StageText(job.progress().stage()).c_str(), job.progress().step(),
                job.progress().steps(), job.progress().eta_seconds());
  // A prompt may have lines, and cutting it may halve a letter, which a terminal can show.
  std::string prompt = job.prompt().substr(0, 60);
  std::replace_if(
      prompt.begin(), prompt.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }, ' ');
  return text + prompt;
}

void PrintModel(const v1::Model& model) {
  std::printf("%s%s  %.1f M parameters, %d layers, on %s\n", model.name().c_str(),
              model.is_default() ? " (default)" : "", static_cast<double>(model.parameters()) / 1e6,
              model.layers(), model.device().c_str());
  const v1::ModelDefaults& defaults = model.defaults();
  const v1::ModelLimits& limits = model.limits();
  std::printf("  defaults   %dx%d, %d frames at %d fps, %d steps, guidance %g, shift %g\n",
              defaults.width(), defaults.height(), defaults.num_frames(), defaults.fps(),
              defaults.steps(), defaults.guidance_scale(), defaults.flow_shift());
  std::printf("  limits     %dx%d, %d frames, %lld pixels in all, %d steps, prompts of %d bytes\n",
              limits.max_width(), limits.max_height(), limits.max_frames(),
              static_cast<long long>(limits.max_pixels()), limits.max_steps(),
              limits.max_prompt_bytes());
  std::printf("  samplers  ");
  for (const int sampler : model.samplers()) {
    std::string name = v1::Sampler_Name(static_cast<v1::Sampler>(sampler)).substr(8);
    for (char& c : name) c = static_cast<char>(std::tolower(c));
    std::printf(" %s", name.c_str());
  }
  std::printf("\n  attention ");
  for (const v1::AttentionInfo& attention : model.attention()) {
    std::string name = v1::AttentionMode_Name(attention.mode()).substr(15);
    for (char& c : name) c = static_cast<char>(std::tolower(c));
    std::printf(" %s", name.c_str());
    if (attention.topk() > 0) {
      std::printf(" (top-k %g, sparsity %.1f %%)", attention.topk(), 100 * attention.sparsity());
    }
  }
  std::printf("\n");
}

}  // namespace

int RunGenerate(Client& client, const GenerateOptions& options, bool json) {
  return Receive(
      client, options.output, json,
      [&](const Client::OnEvent& on_event) {
        client.Generate(options.request, options.deadline_seconds, on_event);
      },
      !options.request.detached());
}

int RunResume(Client& client, const std::string& job_id, const std::string& output, bool json) {
  return Receive(
      client, output, json,
      [&](const Client::OnEvent& on_event) { client.Resume(job_id, 0, on_event); }, false);
}

int RunCancel(Client& client, const std::string& job_id, bool json) {
  return Guarded(json, [&] {
    const v1::Job job = client.Cancel(job_id);
    if (json) {
      std::printf("%s\n", ToJson(job).c_str());
    } else if (job.state() >= v1::JOB_STATE_SUCCEEDED) {
      std::printf("job %s had ended before\n", job_id.c_str());
    } else {
      std::printf("job %s is being cancelled\n", job_id.c_str());
    }
  });
}

int RunJob(Client& client, const std::string& job_id, bool json) {
  return Guarded(json, [&] {
    const v1::Job job = client.GetJob(job_id);
    if (json) {
      std::printf("%s\n", ToJson(job).c_str());
      return;
    }
    std::printf("%s\n  %dx%d, %d frames, %lld bytes so far\n", Line(job).c_str(), job.width(),
                job.height(), job.num_frames(), static_cast<long long>(job.bytes()));
    if (job.has_error()) std::printf("  %s\n", job.error().message().c_str());
    if (job.has_statistics()) {
      std::printf("%s", StatisticsText(job.statistics(), job.fps()).c_str());
    }
  });
}

int RunJobs(Client& client, bool json) {
  return Guarded(json, [&] {
    v1::ListJobsResponse all;
    for (v1::Job& job : client.ListJobs()) *all.add_jobs() = job;
    if (json) {
      std::printf("%s\n", ToJson(all).c_str());
      return;
    }
    if (all.jobs().empty()) std::printf("no jobs\n");
    for (const v1::Job& job : all.jobs()) std::printf("%s\n", Line(job).c_str());
  });
}

int RunModels(Client& client, bool json) {
  return Guarded(json, [&] {
    v1::ListModelsResponse all;
    for (v1::Model& model : client.ListModels()) *all.add_models() = model;
    if (json) {
      std::printf("%s\n", ToJson(all).c_str());
      return;
    }
    for (const v1::Model& model : all.models()) PrintModel(model);
  });
}

}  // namespace slalom::client
