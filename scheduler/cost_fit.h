// CostFit: seconds as a function of an amount of work, fitted as measurements come.
#pragma once

#include <iosfwd>
#include <map>

namespace slalom {

// log(seconds) = line(log(work)), or what was measured for just this amount of work, the more the
// more often and the later that was. The line is a weighted least-squares fit that forgets; its
// slope is held near 1 (seconds proportional to work) until measurements of different amounts say
// otherwise. Measurements far off the prediction are pulled in to a few mean deviations (Huber's
// weights), which themselves grow when everything is off: a lone outlier is ignored, a lasting
// change is followed within some ten measurements.
class CostFit {
 public:
  // Seconds for so much work; `prior_seconds` is the guess when nothing is known. Both positive.
  double Predict(double work, double prior_seconds) const;
  void Add(double work, double prior_seconds, double seconds);
  // Measurements of exactly that amount of work, fading.
  double count(double work) const;

  void Write(std::ostream& out) const;
  // False when the text is damaged; the fit is then to be thrown away.
  bool Read(std::istream& in);

 private:
  struct Cell {
    double count = 0;  // of measurements, bounded
    double mean = 0;   // of log(seconds)
    double last = 0;   // seen_ when it was measured last
  };

  double Slope() const;
  double Line(double x) const;
  double Trust(const Cell& cell) const;

  // Weighted moments of x = log(work), y = log(seconds).
  double weight_ = 0;
  double mean_x_ = 0;
  double mean_y_ = 0;
  double sum_xx_ = 0;  // about the means
  double sum_xy_ = 0;
  double spread_ = 0.3;           // mean absolute distance from the prediction
  double seen_ = 0;               // measurements in all
  std::map<double, Cell> cells_;  // by work
};

}  // namespace slalom
