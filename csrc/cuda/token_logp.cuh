// What the two kernels of token_logp share: the sums of a row, and the gradient of an element.
//
//     d = x - X, X = max x      s = sum exp(d / tau)      a = sum exp(d / tau) d          (exp as exp2, 1 / (tau ln 2) folded)
//     logp = (x_t - X) / tau - log s                      entropy = log s - a / (tau s)
//     dx_v = [ dlogp (1[v = t] - p_v) - dentropy p_v (log p_v + entropy) ] / tau
#pragma once

#include "../check.h"
#include "../ops.h"
#include "device.cuh"

namespace fastrl {

struct Sums {
  float top = -FLT_MAX, s = 0, a = 0;

  // the sums of two disjoint sets of elements, relative to the larger of the two tops
  __device__ void merge(float other_top, float other_s, float other_a, float k) {
    const float high = fmaxf(top, other_top);
    const float mine = fmaxf(top - high, kMasked), theirs = fmaxf(other_top - high, kMasked);
    const float w = exp2_fast(mine * k), v = exp2_fast(theirs * k);
    a = w * (a + mine * s) + v * (other_a + theirs * other_s);
    s = w * s + v * other_s;
    top = high;
  }

  // N elements: the top moves once for all of them, without a branch, since some lane of a warp almost always has a new one
  template <int N>
  __device__ void add(const float (&x)[N], float k) {
    float high = top;
#pragma unroll
    for (int i = 0; i < N; i++) high = fmaxf(high, x[i]);
    const float down = fmaxf(top - high, kMasked), w = exp2_fast(down * k);
    a = w * (a + down * s);
    top = high;
    float s_new = 0, a_new = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
      float d = x[i] - high;
      d = d < kMasked ? kMasked : d;  // not fmaxf, which would drop a NaN
      const float e = exp2_fast(d * k);
      s_new += e;
      a_new += e * d;
    }
    s = w * s + s_new;
    a += a_new;
  }

  __device__ void merge_warp(int lanes, float k) {
    for (int step = lanes / 2; step > 0; step /= 2) {
      const float t = __shfl_xor_sync(kFullWarp, top, step), u = __shfl_xor_sync(kFullWarp, s, step);
      merge(t, u, __shfl_xor_sync(kFullWarp, a, step), k);
    }
  }
};

struct RowStats {  // log p = (x - top) / tau - ln
  float tau, top, ln, logp, entropy;

  __device__ RowStats(const Sums& sums, float tau, float x) : tau(tau), top(sums.top) {
    const float s = sums.s < 0.5f ? NAN : sums.s;  // the largest logit alone gives 1: this row has nothing above -inf
    ln = logf(s);
    logp = (x - top) / tau - ln;  // x is NaN for a target outside [0, V)
    entropy = ln - sums.a / (tau * s);
  }
  __device__ void store(int64_t t, float* to_logp, float* to_entropy, float* m, float* log_s) const {
    to_logp[t] = logp;
    if (to_entropy != nullptr) to_entropy[t] = entropy;
    const float scaled = top / tau;
    m[t] = scaled;
    log_s[t] = ln + fmaf(-scaled, tau, top) / tau;  // relative to the rounded m, so that backward loses nothing
  }
};

struct Gradient {  // of one row: exp(d / tau) (slope d + offset), d = x - top; the target's element is another
  float tau, top, ln, g, gh, h;
  float k, slope, offset;
  bool live;  // false for a masked token: its logits may be anything, and `None` is its gradient

  __device__ Gradient(float tau, float top, float ln, float g, float gh, float h)
      : tau(tau), top(top), ln(ln), g(g), gh(gh), h(h), k(kLog2e / tau), live(g != 0.f || gh != 0.f) {
    const float scale = expf(-ln) / tau;
    slope = -gh * scale / tau;
    offset = (-g - gh * (h - ln)) * scale;
  }
  __device__ float operator()(float x) const {
    float d = x - top;
    d = d < kMasked ? kMasked : d;
    return exp2_fast(d * k) * fmaf(slope, d, offset);
  }
  __device__ float at_target(float x) const {
    if (!live) return 0.f;
    const float log_p = (x - top) / tau - ln, p = expf(log_p);
    return (g * -expm1f(log_p) - (p > 0.f ? gh * p * (log_p + h) : 0.f)) / tau;
  }
};

struct None {
  __device__ float operator()(float) const { return 0.f; }
};

// --- arguments, for the launchers ---------------------------------------------------------------------
template <class T>
T* array(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void check_rows(Address logits, int code, const RowsAt& at, int64_t T, int64_t V) {
  FASTRL_CHECK(code == kFloat32 || code == kBFloat16, "code", "0 (fp32) or 1 (bf16)", code);
  FASTRL_CHECK(T >= 0, "T", "at least 0", T);
  FASTRL_CHECK(V >= 1 && V < int64_t{1} << 31, "V", "1 to 2^31 - 1", V);
  FASTRL_CHECK(at.L >= 1, "L", "at least 1", at.L);
  FASTRL_CHECK(at.row >= 0 && at.batch >= 0, "row, batch", "strides of at least 0", at.row < at.batch ? at.row : at.batch);
  FASTRL_CHECK(T == 0 || logits, "logits", "an address", "0");
}

inline void check_out(int out_code, int code, const RowsAt& to, int64_t T, int64_t V, Address dentropy, Address entropy) {
  FASTRL_CHECK(out_code == code || out_code == kBFloat16, "out_code", "the logits' own, or 1 (bf16)", out_code);
  FASTRL_CHECK(T <= 1 || to.row >= V || to.L == 1, "out_row", "at least V", to.row);
  FASTRL_CHECK(!dentropy || entropy, "entropy", "an address, because dentropy has one", "0");
}

}  // namespace fastrl
