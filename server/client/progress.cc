#include "server/client/progress.h"

#include <algorithm>
#include <cstdarg>

namespace slalom::client {
namespace {

constexpr int kBarWidth = 30;
constexpr auto kLinePause = std::chrono::seconds(1);

__attribute__((format(printf, 1, 2))) std::string Format(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  return text;
}

std::string AttentionText(v1::AttentionMode mode) {
  switch (mode) {
    case v1::ATTENTION_MODE_DENSE:
      return "dense";
    case v1::ATTENTION_MODE_SLA:
      return "sla";
    case v1::ATTENTION_MODE_SALAD:
      return "salad";
    default:
      return "auto";
  }
}

std::string Describe(const v1::Progress& progress, int num_frames) {
  std::string text = StageText(progress.stage());
  if (progress.stage() == v1::STAGE_QUEUED) {
    text += Format(", %d ahead", progress.queue_position());
  } else if (progress.stage() == v1::STAGE_DENOISE) {
    text += Format(" %d/%d", progress.step(), progress.steps());
    if (progress.step_seconds() > 0) text += Format(", %.2f s/step", progress.step_seconds());
    if (progress.sparsity() > 0) text += Format(", sparsity %.1f %%", 100 * progress.sparsity());
  } else if (progress.stage() == v1::STAGE_DECODE) {
    text += Format(", %d/%d frames", progress.frames(), num_frames);
  }
  if (progress.eta_seconds() > 0) text += Format(", %.0f s left", progress.eta_seconds());
  return text;
}

// Denoising and decoding share the bar: it never runs backwards.
double Fraction(const v1::Progress& progress, int num_frames) {
  constexpr double kDenoise = 0.85;
  switch (progress.stage()) {
    case v1::STAGE_DENOISE:
      return progress.steps() > 0 ? kDenoise * progress.step() / progress.steps() : 0;
    case v1::STAGE_DECODE:
      return kDenoise +
             (1 - kDenoise) * (num_frames > 0 ? double(progress.frames()) / num_frames : 0);
    case v1::STAGE_ENCODE:
      return 1;
    default:
      return 0;
  }
}

}  // namespace

ProgressView::~ProgressView() {
  if (bar_shown_) std::fputs("\n", out_);
}

void ProgressView::OnAccepted(const v1::Accepted& accepted) {
  num_frames_ = accepted.resolved().num_frames();
  if (style_ == Style::kSilent) return;
  const v1::GenerateVideoRequest& clip = accepted.resolved();
  std::fprintf(out_, "job %s: %s, %dx%d, %d frames, %d steps, %s attention, seed %llu",
               accepted.job_id().c_str(), clip.model().c_str(), clip.width(), clip.height(),
               clip.num_frames(), clip.steps(), AttentionText(clip.attention().mode()).c_str(),
               static_cast<unsigned long long>(clip.seed()));
  if (accepted.estimated_seconds() > 0) {
    std::fprintf(out_, ", about %.0f s", accepted.estimated_seconds());
  }
  std::fputs("\n", out_);
  std::fflush(out_);
}

void ProgressView::OnProgress(const v1::Progress& progress) {
  if (style_ == Style::kSilent) return;
  const std::string text = Describe(progress, num_frames_);
  if (style_ == Style::kBar) {
    ShowBar(progress, text);
    return;
  }
  // Lines go to logs: one a second is enough, but the last of a stage is not lost.
  const std::string stage = StageText(progress.stage());
  const auto now = std::chrono::steady_clock::now();
  const bool complete = progress.stage() == v1::STAGE_DENOISE && progress.step() > 0 &&
                        progress.step() == progress.steps();
  if (stage == last_line_ && !complete && now - last_time_ < kLinePause) return;
  last_line_ = stage;
  last_time_ = now;
  std::fprintf(out_, "%s\n", text.c_str());
  std::fflush(out_);
}

void ProgressView::ShowBar(const v1::Progress& progress, const std::string& text) {
  const int filled =
      std::clamp(static_cast<int>(Fraction(progress, num_frames_) * kBarWidth + 0.5), 0, kBarWidth);
  std::string bar(static_cast<std::size_t>(filled), '#');
  bar.resize(kBarWidth, '.');
  // \033[K clears what a longer line has left behind.
  std::fprintf(out_, "\r[%s] %s\033[K", bar.c_str(), text.c_str());
  std::fflush(out_);
  bar_shown_ = true;
}

std::string StageText(v1::Stage stage) {
  switch (stage) {
    case v1::STAGE_QUEUED:
      return "queued";
    case v1::STAGE_TEXT_ENCODE:
      return "text encode";
    case v1::STAGE_DENOISE:
      return "denoise";
    case v1::STAGE_DECODE:
      return "decode";
    case v1::STAGE_ENCODE:
      return "encode";
    default:
      return "unknown";
  }
}

std::string StatisticsText(const v1::Statistics& statistics, int fps) {
  std::string text = Format("%d frames (%.2f s at %d fps), %lld bytes, seed %llu\n",
                            statistics.frames(), fps > 0 ? double(statistics.frames()) / fps : 0.0,
                            fps, static_cast<long long>(statistics.bytes()),
                            static_cast<unsigned long long>(statistics.seed()));
  text += "where the time went:\n";
  const auto row = [&](const char* name, double seconds, const std::string& note = "") {
    text += Format("  %-12s %9.3f s%s\n", name, seconds, note.c_str());
  };
  row("queue", statistics.queue_seconds());
  row("tokenize", statistics.tokenize_seconds());
  row("text encode", statistics.text_encode_seconds());
  const int steps = std::max(1, statistics.steps());
  row("denoise", statistics.denoise_seconds(),
      Format("   (%d steps, %.3f s each)", statistics.steps(),
             statistics.denoise_seconds() / steps));
  row("decode", statistics.decode_seconds());
  row("encode", statistics.encode_seconds(), "   (beside decode)");
  row("total", statistics.total_seconds(),
      Format("   (first byte after %.3f s)", statistics.first_byte_seconds()));
  text += "attention: " + AttentionText(statistics.attention());
  if (statistics.layer_sparsity_size() > 0) {
    const auto [low, high] =
        std::minmax_element(statistics.layer_sparsity().begin(), statistics.layer_sparsity().end());
    text += Format(", measured sparsity %.1f %% (layers %.1f to %.1f %%)",
                   100 * statistics.sparsity(), 100 * *low, 100 * *high);
  } else {
    text += ", measured sparsity 0 %";
  }
  if (statistics.layer_mass_kept_size() > 0) {
    double sum = 0;
    for (const double mass : statistics.layer_mass_kept()) sum += mass;
    text += Format(", softmax mass kept %.1f %%", 100 * sum / statistics.layer_mass_kept_size());
  }
  return text + "\n";
}

}  // namespace slalom::client
