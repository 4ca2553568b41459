#include "scheduler/worker.h"

#include <pthread.h>

#include <algorithm>
#include <new>
#include <utility>

namespace slalom {
namespace {

// Calls what may throw; the seam where exceptions become values.
template <typename Call>
std::optional<Error> Attempt(Call&& call) {
  try {
    call();
    return std::nullopt;
  } catch (const Error& error) {
    return error;
  } catch (const std::bad_alloc&) {
    return Error(ErrorCode::kResourceExhausted, "out of host memory");
  } catch (const std::exception& error) {
    return Error(ErrorCode::kInternal, error.what());
  } catch (...) {
    return Error(ErrorCode::kInternal, "an exception of unknown type");
  }
}

bool DeviceLost(const std::optional<Error>& error) {
  return error && error->code() == ErrorCode::kUnavailable;
}

bool OutOfMemory(const std::optional<Error>& error) {
  return error && error->code() == ErrorCode::kResourceExhausted;
}

// What a piece of work held at its peak, if it set a new peak: then, and only then, it is known.
class PeakMeter {
 public:
  explicit PeakMeter(const Pipeline& pipeline) : pipeline_(pipeline), before_(pipeline.Memory()) {}
  std::optional<std::size_t> bytes() const {
    const std::size_t peak = pipeline_.Memory().bytes_peak;
    if (peak <= before_.bytes_peak || peak <= before_.bytes_in_use) return std::nullopt;
    return peak - before_.bytes_in_use;
  }

 private:
  const Pipeline& pipeline_;
  const MemoryStats before_;
};

// The frames from number `first` on.
FrameBatch WithoutFirst(FrameBatch frames, int first) {
  const int skipped = std::min(first - frames.first_frame, frames.num_frames());
  if (skipped <= 0) return frames;
  FrameBatch rest;
  rest.first_frame = first;
  if (skipped < frames.num_frames()) {
    rest.pixels = frames.pixels.Slice(skipped, frames.num_frames());
  }
  return rest;
}

std::vector<std::string> Names(const std::vector<std::unique_ptr<Pipeline>>& pipelines) {
  std::vector<std::string> names;
  for (const auto& pipeline : pipelines) names.push_back(pipeline->info().name);
  return names;
}

// A checkpoint that is damaged costs the steps that it stood for, not the job.
std::unique_ptr<Generation> BeginOrGoOn(const Pipeline& pipeline, const Job& job) {
  if (job.checkpoint) {
    try {
      return pipeline.Restore(job.request.spec, *job.checkpoint);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kDataLoss) throw;
    }
  }
  return pipeline.Begin(job.request.spec);
}

}  // namespace

Worker::Worker(std::vector<std::unique_ptr<Pipeline>> pipelines, const SchedulerOptions& options,
               std::shared_ptr<JobTable> table)
    : pipelines_(std::move(pipelines)),
      options_(options),
      table_(std::move(table)),
      device_(ToString(pipelines_.front()->device())),
      index_(table_->AddWorker(device_, pipelines_.front()->device_description(),
                               Names(pipelines_))) {}

Worker::~Worker() {
  if (thread_.joinable()) thread_.join();
}

void Worker::Start() {
  thread_ = std::thread([this] {
    // Seen by top, gdb and perf.
    pthread_setname_np(pthread_self(), ("device " + device_).c_str());
    Loop();
  });
}

const Pipeline* Worker::Find(const std::string& model) const {
  for (const auto& pipeline : pipelines_) {
    if (pipeline->info().name == model) return pipeline.get();
  }
  return nullptr;
}

MemoryStats Worker::Memory() const {
  MemoryStats sum;
  for (const auto& pipeline : pipelines_) {
    const MemoryStats one = pipeline->Memory();
    sum.bytes_in_use += one.bytes_in_use;
    sum.bytes_reserved += one.bytes_reserved;
    sum.bytes_peak += one.bytes_peak;
    sum.bytes_total = std::max(sum.bytes_total, one.bytes_total);
  }
  return sum;
}

CacheStats Worker::PromptCacheUse() const {
  CacheStats sum;
  for (const auto& pipeline : pipelines_) {
    const CacheStats one = pipeline->PromptCacheUse();
    sum.hits += one.hits;
    sum.misses += one.misses;
    sum.entries += one.entries;
    sum.bytes += one.bytes;
  }
  return sum;
}

void Worker::Loop() {
  while (!lost_) {
    const std::uint64_t epoch = table_->epoch();
    for (const JobPtr& job : jobs_) {
      job->wants_frames.store(job->request.sink->WantsFrames(), std::memory_order_relaxed);
    }
    const JobTable::Turn turn = table_->NextTurn(index_, epoch);
    if (turn.stop) return;
    for (const auto& [job, reason] : turn.endings) End(job, reason);
    switch (turn.kind) {
      case Action::Kind::kWait:
        break;
      case Action::Kind::kBegin:
        Begin(turn.jobs.front());
        break;
      case Action::Kind::kDenoise:
        Denoise(turn.jobs);
        break;
      case Action::Kind::kDecode:
        Decode(turn.jobs.front());
        break;
    }
  }
}

// Runs one piece of work on the device and measures it.
template <typename Work>
Worker::Outcome Worker::OnDevice(Work&& work) {
  const auto start = SchedulerClock::now();
  Outcome outcome;
  outcome.error = Attempt(std::forward<Work>(work));
  outcome.seconds = std::chrono::duration<double>(SchedulerClock::now() - start).count();
  table_->AddBusy(index_, outcome.seconds);
  return outcome;
}

// Calls the sink; false when that failed, and with it the job.
template <typename Call>
bool Worker::Tell(const JobPtr& job, Call&& call) {
  const auto error = Attempt([&] { call(*job->request.sink); });
  if (error) End(job, error);
  return !error;
}

void Worker::Begin(const JobPtr& job) {
  jobs_.push_back(job);
  const auto waited = SchedulerClock::now() - job->submitted;
  // After the loss of a device: as it was the first time.
  if (job->result.begin_seconds == 0) {
    job->result.queue_seconds = std::chrono::duration<double>(waited).count();
  }
  const Progress encoding = table_->CurrentProgress(job);
  if (!Tell(job, [&](JobSink& sink) { sink.OnProgress(encoding); })) return;

  const Pipeline& pipeline = *Find(job->request.model);
  int max_batch = 1;
  const Outcome outcome = OnDevice([&] {
    job->generation = BeginOrGoOn(pipeline, *job);
    max_batch = pipeline.MaxBatch(job->request.spec);
  });
  job->result.begin_seconds += outcome.seconds;
  if (outcome.error) return Failed(job, *outcome.error);
  if (!job->checkpoint) table_->ObserveBegin(*job, outcome.seconds);
  const Progress begun = table_->ReportBegun(job, max_batch);
  Tell(job, [&](JobSink& sink) { sink.OnProgress(begun); });
}

void Worker::Denoise(const std::vector<JobPtr>& jobs) {
  const Pipeline& pipeline = *Find(jobs.front()->request.model);
  std::vector<Generation*> batch;
  std::vector<int> steps_before;
  for (const JobPtr& job : jobs) {
    batch.push_back(job->generation.get());
    steps_before.push_back(job->generation->step());
  }
  std::vector<Pipeline::StepFailure> failures;
  const PeakMeter peak(pipeline);
  const Outcome outcome = OnDevice([&] { failures = pipeline.DenoiseStep(batch); });
  const double share = outcome.seconds / static_cast<double>(jobs.size());
  const int size = static_cast<int>(jobs.size());
  for (const JobPtr& job : jobs) job->result.denoise_seconds += share;
  if (DeviceLost(outcome.error)) return LoseDevice(*outcome.error, jobs);
  if (!outcome.error && failures.empty()) {
    table_->ObserveStep(*jobs.front(), size, outcome.seconds);
    if (peak.bytes()) table_->ObserveBytes(*jobs.front(), CostPhase::kStep, size, *peak.bytes());
  } else if (OutOfMemory(outcome.error) && size == 1) {
    table_->ObserveOutOfMemory(*jobs.front(), CostPhase::kStep);
  }
  if (!outcome.error && options_.on_step) {
    options_.on_step({device_, jobs.front()->request.model, jobs.front()->request.spec.attention,
                      size, outcome.seconds});
  }

  for (std::size_t i = 0; i < jobs.size() && !lost_; ++i) {
    const auto failure = std::find_if(failures.begin(), failures.end(),
                                      [&](const auto& f) { return f.generation == batch[i]; });
    if (failure != failures.end()) {
      End(jobs[i], Error(ErrorCode::kInternal, failure->message));
    } else if (!outcome.error || batch[i]->step() > steps_before[i]) {
      Stepped(jobs[i], size, share);
    } else if (jobs.size() > 1) {
      // Nobody knows whose fault it was. Those that have not moved try again, each by itself: who
      // fails then has failed alone.
      table_->StepAlone(jobs[i]);
    } else {
      End(jobs[i], outcome.error);
    }
  }
}

void Worker::Stepped(const JobPtr& job, int batch, double share) {
  const Progress progress = table_->ReportStep(job, batch);
  if (!Tell(job, [&](JobSink& sink) { sink.OnProgress(progress); })) return;
  if (!MakeCheckpoint(job, share)) return;

  const int every = job->request.preview_every;
  if (every <= 0 || progress.step % every != 0 || progress.step == progress.steps) return;
  Tensor image;
  const Outcome outcome =
      OnDevice([&] { image = Find(job->request.model)->Preview(*job->generation); });
  if (outcome.error) return Failed(job, *outcome.error);
  Tell(job, [&](JobSink& sink) { sink.OnPreview(image); });
}

// Where one is due. False when the job has ended over it. One that cannot be made is not worth the
// job: the last one still stands.
bool Worker::MakeCheckpoint(const JobPtr& job, double share) {
  if (job->request.checkpoint_seconds <= 0) return true;
  job->unsaved_seconds += share;
  if (!job->generation->denoised() && job->unsaved_seconds < job->request.checkpoint_seconds) {
    return true;
  }
  Checkpoint checkpoint;
  const Outcome outcome = OnDevice([&] {
    checkpoint = std::make_shared<const std::vector<std::byte>>(
        Find(job->request.model)->Save(*job->generation));
  });
  if (DeviceLost(outcome.error)) {
    LoseDevice(*outcome.error, {job});
    return false;
  }
  if (outcome.error) return true;
  job->checkpoint = checkpoint;
  job->unsaved_seconds = 0;
  return Tell(job, [&](JobSink& sink) { sink.OnCheckpoint(checkpoint); });
}

void Worker::Decode(const JobPtr& job) {
  const Pipeline& pipeline = *Find(job->request.model);
  FrameBatch frames;
  const PeakMeter peak(pipeline);
  const Outcome outcome = OnDevice([&] { frames = pipeline.DecodeNext(*job->generation); });
  job->result.decode_seconds += outcome.seconds;
  job->decode_seconds += outcome.seconds;
  if (OutOfMemory(outcome.error)) table_->ObserveOutOfMemory(*job, CostPhase::kDecode);
  if (outcome.error) return Failed(job, *outcome.error);
  if (peak.bytes()) table_->ObserveBytes(*job, CostPhase::kDecode, 1, *peak.bytes());

  const bool last = frames.num_frames() == 0 || job->generation->decoded();
  job->decoded += frames.num_frames();
  // What another device had handed out before it was lost comes again, bit for bit: not twice.
  frames = WithoutFirst(std::move(frames), job->frames);
  const Progress progress = table_->ReportFrames(job, frames.num_frames());
  const bool told = Tell(job, [&](JobSink& sink) {
    sink.OnProgress(progress);
    if (frames.num_frames() > 0) sink.OnFrames(frames);
  });
  if (told && last) End(job, std::nullopt);
}

void Worker::End(const JobPtr& job, const std::optional<Error>& error) {
  if (job->generation) {
    job->result.statistics = job->generation->statistics();
    job->generation.reset();
  }
  table_->End(job, error);
  // Last: `job` may refer into jobs_.
  std::erase(jobs_, JobPtr(job));
}

void Worker::Failed(const JobPtr& job, const Error& error) {
  if (DeviceLost(error)) {
    LoseDevice(error, {job});
  } else {
    End(job, error);
  }
}

void Worker::LoseDevice(const Error& error, const std::vector<JobPtr>& at_work) {
  lost_ = true;
  table_->MarkLost(index_);
  // `at_work` may refer into jobs_.
  for (const JobPtr& job : std::vector<JobPtr>(at_work)) ++job->devices_lost;
  for (const JobPtr& job : std::exchange(jobs_, {})) {
    const Error lost(ErrorCode::kUnavailable, "device " + device_ + " is lost: " + error.what());
    // Two devices lost over one job are its fault, most likely: the third is not risked.
    if (job->devices_lost > 1 || !table_->CanRunElsewhere(job)) {
      End(job, lost);
      continue;
    }
    job->generation.reset();
    Progress progress;
    progress.steps = job->request.spec.steps;
    progress.num_frames = job->request.spec.num_frames;
    if (Tell(job, [&](JobSink& sink) { sink.OnProgress(progress); })) table_->Requeue(job);
  }
}

}  // namespace slalom
