#include "tests/unit/scheduler/fake_pipeline.h"

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <utility>

#include "kernels/core/error.h"

namespace slalom {
namespace {

// The order that a prompt carries for a place, if any.
std::string OrderFor(const ClipSpec& spec, const std::string& place) {
  std::istringstream words(spec.prompt);
  for (std::string word; words >> word;) {
    const auto at = word.find('@');
    if (at != std::string::npos && word.substr(at + 1) == place) return word.substr(0, at);
  }
  return "";
}

void Obey(const FakeOptions& options, const std::string& order, const std::string& place) {
  if (order == "oom") {
    throw Error(ErrorCode::kResourceExhausted, "out of device memory at " + place);
  }
  if (order == "lost" && !options.lasting)
    throw Error(ErrorCode::kUnavailable, "sticky device error at " + place);
  if (order == "error") throw Error(ErrorCode::kInternal, "ordered to fail at " + place);
  if (order == "throw") throw std::runtime_error("ordered to throw at " + place);
}

}  // namespace

// --- FakeJournal ---

std::vector<std::string> FakeJournal::lines() const {
  const std::lock_guard lock(mutex_);
  return lines_;
}

std::size_t FakeJournal::CountLocked(const std::string& prefix) const {
  return static_cast<std::size_t>(
      std::count_if(lines_.begin(), lines_.end(),
                    [&](const std::string& line) { return line.starts_with(prefix); }));
}

std::size_t FakeJournal::CountStartingWith(const std::string& prefix) const {
  const std::lock_guard lock(mutex_);
  return CountLocked(prefix);
}

void FakeJournal::HoldAt(const std::string& prefix, std::size_t count) {
  const std::lock_guard lock(mutex_);
  hold_prefix_ = prefix;
  hold_count_ = count;
}

void FakeJournal::Hold() {
  const std::lock_guard lock(mutex_);
  held_ = true;
}

void FakeJournal::Release() {
  const std::lock_guard lock(mutex_);
  held_ = false;
  changed_.notify_all();
}

bool FakeJournal::WaitFor(const std::string& prefix, std::size_t count,
                          std::chrono::milliseconds patience) const {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, patience, [&] { return CountLocked(prefix) >= count; });
}

int FakeJournal::live_generations() const {
  const std::lock_guard lock(mutex_);
  return live_generations_;
}

int FakeJournal::thread_violations() const {
  const std::lock_guard lock(mutex_);
  return thread_violations_;
}

void FakeJournal::Write(const std::string& line) {
  std::unique_lock lock(mutex_);
  lines_.push_back(line);
  if (hold_count_ > 0 && CountLocked(hold_prefix_) >= hold_count_) {
    held_ = true;
    hold_count_ = 0;
  }
  changed_.notify_all();
  changed_.wait(lock, [&] { return !held_; });
}

// --- FakeGeneration ---

class FakeGeneration : public Generation {
 public:
  FakeGeneration(ClipSpec spec, std::shared_ptr<FakeJournal> journal)
      : spec_(std::move(spec)), journal_(std::move(journal)) {
    Count(1);
    statistics_.tokenize_seconds = 1e-6;
    if (spec_.attention != AttentionKind::kDense) {
      statistics_.layer_sparsity = {0.5, 0.7};
      statistics_.layer_mass_kept = {0.9, 0.8};
    }
  }
  ~FakeGeneration() override { Count(-1); }

  const ClipSpec& spec() const override { return spec_; }
  int step() const override { return step_; }
  bool decoded() const override { return frames_ >= spec_.num_frames; }
  const ClipStatistics& statistics() const override { return statistics_; }
  std::string batch_key() const override {
    return std::to_string(spec_.width) + "x" + std::to_string(spec_.height) + "x" +
           std::to_string(spec_.num_frames) + "/" +
           std::to_string(static_cast<int>(spec_.attention));
  }

  ClipSpec spec_;
  std::shared_ptr<FakeJournal> journal_;
  ClipStatistics statistics_;
  int step_ = 0;
  int frames_ = 0;
  int decodes_ = 0;

 private:
  void Count(int change) {
    const std::lock_guard lock(journal_->mutex_);
    journal_->live_generations_ += change;
  }
};

// --- FakePipeline ---

struct FakePipeline::Occupancy {
  std::mutex mutex;
  bool inside = false;
  std::optional<std::thread::id> thread;
};

// One call of the worker's: checks that it is alone and always on the same thread.
class FakePipeline::Visit {
 public:
  explicit Visit(const FakePipeline& pipeline) : pipeline_(pipeline) {
    Occupancy& occupancy = *pipeline.occupancy_;
    const std::lock_guard lock(occupancy.mutex);
    if (!occupancy.thread) occupancy.thread = std::this_thread::get_id();
    if (occupancy.inside || occupancy.thread != std::this_thread::get_id()) {
      const std::lock_guard journal_lock(pipeline.options_.journal->mutex_);
      ++pipeline.options_.journal->thread_violations_;
    }
    occupancy.inside = true;
  }
  ~Visit() {
    const std::lock_guard lock(pipeline_.occupancy_->mutex);
    pipeline_.occupancy_->inside = false;
  }
  Visit(const Visit&) = delete;
  Visit& operator=(const Visit&) = delete;

 private:
  const FakePipeline& pipeline_;
};

FakePipeline::FakePipeline(FakeOptions options)
    : options_(std::move(options)), occupancy_(std::make_unique<Occupancy>()) {
  info_.name = options_.name;
  info_.defaults.width = 64;
  info_.defaults.height = 48;
  info_.defaults.num_frames = 9;
  info_.defaults.fps = 8;
  info_.defaults.steps = 4;
  info_.defaults.guidance_scale = 5.0;
  info_.defaults.flow_shift = 3.0;
  info_.max_width = 256;
  info_.max_height = 256;
  info_.max_frames = 65;
  info_.max_pixels = 256LL * 256 * 65;
  info_.max_steps = 100;
  info_.max_prompt_bytes = 200;
  info_.samplers = {SamplerKind::kUniPc, SamplerKind::kEuler};
  info_.attention = {{AttentionKind::kDense, 0.0, 0.0}, {AttentionKind::kSla, 0.1, 0.6}};
  info_.parameters = 1000;
  info_.layers = 2;
}

FakePipeline::~FakePipeline() = default;

ClipSpec FakePipeline::Resolve(const ClipRequest& request) const {
  ClipSpec spec = info_.defaults;
  spec.prompt = request.prompt;
  spec.negative_prompt = request.negative_prompt;
  spec.width = request.width.value_or(spec.width);
  spec.height = request.height.value_or(spec.height);
  spec.num_frames = request.num_frames.value_or(spec.num_frames);
  spec.fps = request.fps.value_or(spec.fps);
  spec.steps = request.steps.value_or(spec.steps);
  spec.guidance_scale = request.guidance_scale.value_or(spec.guidance_scale);
  spec.flow_shift = request.flow_shift.value_or(spec.flow_shift);
  spec.seed = request.seed.value_or(0);
  spec.sampler = request.sampler.value_or(spec.sampler);
  spec.attention = request.attention.value_or(spec.attention);
  if (spec.attention != AttentionKind::kDense) spec.topk = request.topk.value_or(0.1);

  std::vector<FieldViolation> violations;
  const auto check = [&](bool good, const char* field, const std::string& allowed) {
    if (!good) violations.push_back({field, std::string(field) + " must be " + allowed});
  };
  const auto size_ok = [](int size) { return size >= 16 && size <= 256 && size % 16 == 0; };
  check(!spec.prompt.empty() && spec.prompt.size() <= 200, "prompt", "1 to 200 bytes long");
  check(size_ok(spec.width), "width", "a multiple of 16 up to 256");
  check(size_ok(spec.height), "height", "a multiple of 16 up to 256");
  check(spec.num_frames >= 1 && spec.num_frames <= 65 && spec.num_frames % 4 == 1, "num_frames",
        "4n+1, at most 65");
  check(spec.fps >= 1 && spec.fps <= 60, "fps", "1 to 60");
  check(spec.steps >= 1 && spec.steps <= 100, "steps", "1 to 100");
  check(spec.guidance_scale >= 1.0 && spec.guidance_scale <= 20.0, "guidance_scale", "1 to 20");
  check(!request.topk || (*request.topk > 0 && *request.topk <= 1), "topk", "above 0, at most 1");
  if (!violations.empty()) throw Error(std::move(violations));
  if (spec.attention == AttentionKind::kSalad) {
    throw Error(ErrorCode::kFailedPrecondition, "the fake model has no SALAD adapter");
  }
  return spec;
}

std::unique_ptr<Generation> FakePipeline::Begin(const ClipSpec& spec) const {
  const Visit visit(*this);
  options_.journal->Write("begin " + spec.prompt);
  std::this_thread::sleep_for(options_.begin_time);
  Obey(options_, OrderFor(spec, "begin"), "begin");
  return std::make_unique<FakeGeneration>(spec, options_.journal);
}

// A fake checkpoint is the step's number, then the prompt.
std::vector<std::byte> FakePipeline::Save(const Generation& generation) const {
  const Visit visit(*this);
  options_.journal->Write("save " + generation.spec().prompt);
  const std::string text = std::to_string(generation.step()) + " " + generation.spec().prompt;
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

std::unique_ptr<Generation> FakePipeline::Restore(const ClipSpec& spec,
                                                  std::span<const std::byte> checkpoint) const {
  const Visit visit(*this);
  options_.journal->Write("restore " + spec.prompt);
  std::string text(reinterpret_cast<const char*>(checkpoint.data()), checkpoint.size());
  const auto space = text.find(' ');
  if (space == std::string::npos || text.substr(space + 1) != spec.prompt) {
    throw Error(ErrorCode::kDataLoss, "a damaged checkpoint");
  }
  auto generation = std::make_unique<FakeGeneration>(spec, options_.journal);
  generation->step_ = std::stoi(text);
  return generation;
}

std::vector<Pipeline::StepFailure> FakePipeline::DenoiseStep(
    std::span<Generation* const> batch) const {
  const Visit visit(*this);
  std::string line = "step ";
  for (const Generation* generation : batch) {
    line += (generation == batch.front() ? "" : "+") + generation->spec().prompt;
    if (generation->batch_key() != batch.front()->batch_key()) {
      throw Error(ErrorCode::kInternal, "a batch of clips that do not fit together");
    }
  }
  options_.journal->Write(line);
  std::this_thread::sleep_for(options_.step_time);
  for (const Generation* generation : batch) {
    const std::string place = "step" + std::to_string(generation->step() + 1);
    Obey(options_, OrderFor(generation->spec(), place), place);
    if (batch.size() > 1) Obey(options_, OrderFor(generation->spec(), "batch"), "batch");
  }
  std::vector<StepFailure> failures;
  for (Generation* generation : batch) {
    auto& fake = static_cast<FakeGeneration&>(*generation);
    const std::string place = "step" + std::to_string(++fake.step_);
    const double share = std::chrono::duration<double>(options_.step_time).count() /
                         static_cast<double>(batch.size());
    fake.statistics_.denoise_seconds += share;
    fake.statistics_.last_step_seconds = share;
    if (OrderFor(fake.spec_, place) == "nan") {
      failures.push_back({generation, "non-finite latent at " + place + ", layers 0 to 1"});
    }
  }
  return failures;
}

FrameBatch FakePipeline::DecodeNext(Generation& generation) const {
  const Visit visit(*this);
  auto& fake = static_cast<FakeGeneration&>(generation);
  options_.journal->Write("decode " + fake.spec_.prompt);
  std::this_thread::sleep_for(options_.decode_time);
  const std::string place = "decode" + std::to_string(++fake.decodes_);
  Obey(options_, OrderFor(fake.spec_, place), place);

  FrameBatch frames;
  frames.first_frame = fake.frames_;
  const int count = std::min(fake.frames_ == 0 ? 1 : options_.frames_per_decode,
                             fake.spec_.num_frames - fake.frames_);
  if (count <= 0) return frames;
  frames.pixels = Tensor::Host({count, fake.spec_.height, fake.spec_.width, 3}, DType::kU8);
  auto* out = frames.pixels.data<std::uint8_t>();
  for (int f = 0; f < count; ++f) {
    for (int y = 0; y < fake.spec_.height; ++y) {
      for (int x = 0; x < fake.spec_.width; ++x) {
        const auto pixel = Pixel(fake.spec_, fake.frames_ + f, x, y);
        out = std::copy(pixel.begin(), pixel.end(), out);
      }
    }
  }
  fake.frames_ += count;
  return frames;
}

Tensor FakePipeline::Preview(const Generation& generation) const {
  const Visit visit(*this);
  Obey(options_, OrderFor(generation.spec(), "preview"), "preview");
  const ClipSpec& spec = generation.spec();
  Tensor image = Tensor::Host({spec.height / 8, spec.width / 8, 3}, DType::kU8);
  std::fill_n(image.data<std::uint8_t>(), image.NumElements(),
              static_cast<std::uint8_t>(generation.step()));
  return image;
}

std::array<std::uint8_t, 3> FakePipeline::Pixel(const ClipSpec& spec, int frame, int x, int y) {
  return {static_cast<std::uint8_t>(16 + 224 * frame / std::max(1, spec.num_frames - 1)),
          static_cast<std::uint8_t>(255 * x / std::max(1, spec.width - 1)),
          static_cast<std::uint8_t>(255 * y / std::max(1, spec.height - 1))};
}

}  // namespace slalom
