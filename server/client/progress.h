// How a job in progress looks: a bar on a terminal, plain lines elsewhere.
#pragma once

#include <chrono>
#include <cstdio>
#include <string>

#include "slalom/v1/video_generation.pb.h"

namespace slalom::client {

// One thread. The text goes to a stream that the caller owns.
class ProgressView {
 public:
  enum class Style { kBar, kLines, kSilent };

  ProgressView(std::FILE* out, Style style) : out_(out), style_(style) {}
  // Leaves the cursor at the start of a line.
  ~ProgressView();

  void OnAccepted(const v1::Accepted& accepted);
  void OnProgress(const v1::Progress& progress);

 private:
  void ShowBar(const v1::Progress& progress, const std::string& text);

  std::FILE* const out_;
  const Style style_;
  int num_frames_ = 0;
  bool bar_shown_ = false;
  std::string last_line_;
  std::chrono::steady_clock::time_point last_time_;
};

// "text encode", "denoise", ...
std::string StageText(v1::Stage stage);

// Where the time went and the measured sparsity, several lines.
std::string StatisticsText(const v1::Statistics& statistics, int fps);

}  // namespace slalom::client
