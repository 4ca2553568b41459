// Elementary functions over registers.
#pragma once

namespace slalom::simd {

// exp(x) to about 1 ulp; 0 below -103, infinity above 88.7; NaN stays NaN. The reduction is Cody
// and Waite's, the polynomial the Taylor series cut after x^7 (|x| <= ln 2 / 2: 5e-9 is left).
template <typename V>
inline V Exp(V x) {
  const V clamped = V::Max(V::Set(-125.0f), V::Min(V::Set(125.0f), x));
  const V n = V::Round(clamped * V::Set(1.44269504088896341f));
  V r = V::Fma(n, V::Set(-0.693145751953125f), clamped);
  r = V::Fma(n, V::Set(-1.42860682030941723212e-6f), r);
  V p = V::Set(1.0f / 5040.0f);
  p = V::Fma(p, r, V::Set(1.0f / 720.0f));
  p = V::Fma(p, r, V::Set(1.0f / 120.0f));
  p = V::Fma(p, r, V::Set(1.0f / 24.0f));
  p = V::Fma(p, r, V::Set(1.0f / 6.0f));
  p = V::Fma(p, r, V::Set(0.5f));
  p = V::Fma(p, r, V::Set(1.0f));
  p = V::Fma(p, r, V::Set(1.0f));
  return V::Scale(p, n);
}

template <typename V>
inline V Silu(V x) {
  return x / (V::Set(1.0f) + Exp(V::Zero() - x));
}

// 0.5 x (1 + tanh(u)) = x sigmoid(2 u), which does not cancel for negative x.
template <typename V>
inline V GeluTanh(V x) {
  const V cubic = V::Fma(x * x * x, V::Set(0.044715f), x);
  return x / (V::Set(1.0f) + Exp(cubic * V::Set(-2.0f * 0.7978845608028654f)));
}

}  // namespace slalom::simd
