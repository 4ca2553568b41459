#include "kernels/core/random.h"

#include <bit>
#include <cmath>

namespace slalom {
namespace {

constexpr int kRounds = 10;
constexpr std::uint32_t kMultiplier0 = 0xD2511F53u;
constexpr std::uint32_t kMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kWeyl0 = 0x9E3779B9u;
constexpr std::uint32_t kWeyl1 = 0xBB67AE85u;
constexpr double kLn2 = 0.693147180559945309417;

template <std::size_t N>
double Horner(const std::array<double, N>& coefficients, double x) {
  double sum = coefficients[N - 1];
  for (std::size_t i = N - 1; i-- > 0;) sum = sum * x + coefficients[i];
  return sum;
}

// The natural logarithm of a positive, normal x: an exact split into 2^e * m with m within
// [1/sqrt(2), sqrt(2)), then the series of 2 atanh((m - 1) / (m + 1)). libm's log differs in the
// last bit between versions; this one cannot.
double PortableLog(double x) {
  const auto bits = std::bit_cast<std::uint64_t>(x);
  int exponent = static_cast<int>(bits >> 52) - 1023;
  double mantissa = std::bit_cast<double>((bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull);
  if (mantissa > 1.4142135623730951) {
    mantissa = mantissa * 0.5;
    exponent += 1;
  }
  static constexpr std::array<double, 12> kOddReciprocals = {
      1.0,        1.0 / 3.0,  1.0 / 5.0,  1.0 / 7.0,  1.0 / 9.0,  1.0 / 11.0,
      1.0 / 13.0, 1.0 / 15.0, 1.0 / 17.0, 1.0 / 19.0, 1.0 / 21.0, 1.0 / 23.0};
  const double s = (mantissa - 1.0) / (mantissa + 1.0);
  return 2.0 * s * Horner(kOddReciprocals, s * s) + static_cast<double>(exponent) * kLn2;
}

// Wichura's algorithm AS 241 (PPND16, Applied Statistics 37, 1988): relative error about 1e-16.
double InverseNormalCdf(double p) {
  static constexpr std::array<double, 8> kCentreNumerator = {
      3.3871328727963666080e0,  1.3314166789178437745e+2, 1.9715909503065514427e+3,
      1.3731693765509461125e+4, 4.5921953931549871457e+4, 6.7265770927008700853e+4,
      3.3430575583588128105e+4, 2.5090809287301226727e+3};
  static constexpr std::array<double, 8> kCentreDenominator = {1.0,
                                                               4.2313330701600911252e+1,
                                                               6.8718700749205790830e+2,
                                                               5.3941960214247511077e+3,
                                                               2.1213794301586595867e+4,
                                                               3.9307895800092710610e+4,
                                                               2.8729085735721942674e+4,
                                                               5.2264952788528545610e+3};
  static constexpr std::array<double, 8> kMiddleNumerator = {
      1.42343711074968357734e0,  4.63033784615654529590e0, 5.76949722146069140550e0,
      3.64784832476320460504e0,  1.27045825245236838258e0, 2.41780725177450611770e-1,
      2.27238449892691845833e-2, 7.74545014278341407640e-4};
  static constexpr std::array<double, 8> kMiddleDenominator = {1.0,
                                                               2.05319162663775882187e0,
                                                               1.67638483018380384940e0,
                                                               6.89767334985100004550e-1,
                                                               1.48103976427480074590e-1,
                                                               1.51986665636164571966e-2,
                                                               5.47593808499534494600e-4,
                                                               1.05075007164441684324e-9};
  static constexpr std::array<double, 8> kTailNumerator = {
      6.65790464350110377720e0,  5.46378491116411436990e0,  1.78482653991729133580e0,
      2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
      2.71155556874348757815e-5, 2.01033439929228813265e-7};
  static constexpr std::array<double, 8> kTailDenominator = {1.0,
                                                             5.99832206555887937690e-1,
                                                             1.36929880922735805310e-1,
                                                             1.48753612908506148525e-2,
                                                             7.86869131145613259100e-4,
                                                             1.84631831751005468180e-5,
                                                             1.42151175831644588870e-7,
                                                             2.04426310338993978564e-15};

  const double q = p - 0.5;
  if (std::abs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    return q * Horner(kCentreNumerator, r) / Horner(kCentreDenominator, r);
  }
  const double r = std::sqrt(-PortableLog(q < 0.0 ? p : 1.0 - p));
  const double magnitude =
      r <= 5.0 ? Horner(kMiddleNumerator, r - 1.6) / Horner(kMiddleDenominator, r - 1.6)
               : Horner(kTailNumerator, r - 5.0) / Horner(kTailDenominator, r - 5.0);
  return q < 0.0 ? -magnitude : magnitude;
}

}  // namespace

std::array<std::uint32_t, 4> Philox4x32(std::uint64_t key, std::uint64_t counter_high,
                                        std::uint64_t counter_low) {
  std::array<std::uint32_t, 4> c = {
      static_cast<std::uint32_t>(counter_low), static_cast<std::uint32_t>(counter_low >> 32),
      static_cast<std::uint32_t>(counter_high), static_cast<std::uint32_t>(counter_high >> 32)};
  auto k0 = static_cast<std::uint32_t>(key);
  auto k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const std::uint64_t product0 = std::uint64_t{kMultiplier0} * c[0];
    const std::uint64_t product1 = std::uint64_t{kMultiplier1} * c[2];
    c = {static_cast<std::uint32_t>(product1 >> 32) ^ c[1] ^ k0,
         static_cast<std::uint32_t>(product1),
         static_cast<std::uint32_t>(product0 >> 32) ^ c[3] ^ k1,
         static_cast<std::uint32_t>(product0)};
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return c;
}

void FillNormal(std::uint64_t seed, std::uint64_t stream, std::uint64_t offset,
                std::span<float> out) {
  std::array<std::uint32_t, 4> words{};
  std::uint64_t counter = 0;
  bool have_words = false;
  for (std::size_t i = 0; i < out.size(); ++i) {
    // Two elements share one counter: 64 random bits each.
    const std::uint64_t element = offset + i;
    if (!have_words || element / 2 != counter) {
      counter = element / 2;
      words = Philox4x32(seed, stream, counter);
      have_words = true;
    }
    const std::size_t first = 2 * (element % 2);
    const std::uint64_t bits = words[first] | (std::uint64_t{words[first + 1]} << 32);
    // 52 bits and a half: exact in a double, symmetric about 1/2 and never 0 or 1.
    const double uniform = (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
    out[i] = static_cast<float>(InverseNormalCdf(uniform));
  }
}

}  // namespace slalom
