// Log-probability and entropy of a target token per row of logits, and their gradient.
//
//     d = x - X, X = max x      s = sum exp(d / tau)      a = sum exp(d / tau) d          (exp as exp2, 1 / (tau ln 2) folded)
//     logp = (x_t - X) / tau - log s                      entropy = log s - a / (tau s)
//     dx_v = [ dlogp (1[v = t] - p_v) - dentropy p_v (log p_v + entropy) ] / tau
//
// Tile map:  one CTA of 512 threads owns a row and strides over further rows by the grid.  A step of the CTA moves 32 bytes a
//            thread (2 packs of 16 bytes, neighbouring threads next to each other; with 4, ptxas spills).  Each thread keeps (X, s, a) of what it
//            saw; the 512 triples are merged once per row, in a fixed order: no atomics, the same bits every run.
// Shared:    16 warps x 3 floats = 192 bytes.
// Traffic:   forward reads the logits once; backward reads them once and writes them once.
#include <algorithm>

#include "../check.h"
#include "../ops.h"
#include "device.cuh"

namespace fastrl {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32, kUnroll = 2;

// --- forward ------------------------------------------------------------------------------------------
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

  template <int N>
  __device__ void add(const float (&x)[N], float k) {
    float high = x[0];
#pragma unroll
    for (int i = 1; i < N; i++) high = fmaxf(high, x[i]);
    if (high > top) merge(high, 0, 0, k);
    float s2[4] = {}, a2[4] = {};  // several partial sums: one would wait for its own last addition
#pragma unroll
    for (int i = 0; i < N; i++) {
      float d = x[i] - top;
      d = d < kMasked ? kMasked : d;  // not fmaxf, which would drop a NaN
      const float e = exp2_fast(d * k);
      s2[i % 4] += e;
      a2[i % 4] += e * d;
    }
    s += (s2[0] + s2[1]) + (s2[2] + s2[3]);
    a += (a2[0] + a2[1]) + (a2[2] + a2[3]);
  }

  __device__ void merge_warp(int lanes, float k) {
    for (int step = lanes / 2; step > 0; step /= 2) {
      const float t = __shfl_xor_sync(kFullWarp, top, step), u = __shfl_xor_sync(kFullWarp, s, step);
      merge(t, u, __shfl_xor_sync(kFullWarp, a, step), k);
    }
  }
};

template <class T>
__device__ Sums row_sums(const T* row, int64_t V, float k) {
  constexpr int kSize = Pack<T>::kSize;
  const Span<T> span(row, row, V);
  const auto* packs = reinterpret_cast<const Pack<T>*>(row + span.head);
  Sums sums;
  for (int64_t i = threadIdx.x; i < span.packs; i += kThreads * kUnroll) {
    Pack<T> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (i + u * kThreads < span.packs) loaded[u] = packs[i + u * kThreads];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (i + u * kThreads >= span.packs) break;
      float x[kSize];
#pragma unroll
      for (int j = 0; j < kSize; j++) x[j] = to_float(loaded[u].at[j]);
      sums.add(x, k);
    }
  }
  for (int64_t i = threadIdx.x; i < span.head; i += kThreads) {
    const float x[1] = {to_float(row[i])};
    sums.add(x, k);
  }
  for (int64_t i = span.tail() + threadIdx.x; i < V; i += kThreads) {
    const float x[1] = {to_float(row[i])};
    sums.add(x, k);
  }
  return sums;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    forward(const T* logits, int64_t stride, const int64_t* target, const float* temperature, float* logp, float* entropy,
            float* m, float* log_s, int64_t rows, int64_t V) {
  __shared__ float shared[3][kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t t = blockIdx.x; t < rows; t += gridDim.x) {
    const T* row = logits + t * stride;
    const float tau = temperature[t], k = kLog2e / tau;
    Sums sums = row_sums(row, V, k);
    sums.merge_warp(32, k);
    if (lane == 0) shared[0][warp] = sums.top, shared[1][warp] = sums.s, shared[2][warp] = sums.a;
    __syncthreads();
    if (warp == 0) {
      const int w = lane % kWarps;
      sums.top = shared[0][w], sums.s = shared[1][w], sums.a = shared[2][w];
      sums.merge_warp(kWarps, k);
    }
    if (threadIdx.x == 0) {
      const float s = sums.s < 0.5f ? NAN : sums.s;  // the largest logit alone gives 1: this row has nothing above -inf
      const float ln = logf(s), top = sums.top / tau;
      const int64_t at = target[t];
      const float x = at >= 0 && at < V ? to_float(row[at]) : NAN;
      logp[t] = (x - sums.top) / tau - ln;
      if (entropy != nullptr) entropy[t] = ln - sums.a / (tau * s);
      m[t] = top;
      log_s[t] = ln + fmaf(-top, tau, sums.top) / tau;  // relative to the rounded m, so that backward loses nothing
    }
    __syncthreads();  // `shared` is free again
  }
}

// --- backward -----------------------------------------------------------------------------------------
struct Gradient {  // of one row: exp(d / tau) (slope d + offset), d = x - top
  float top, k, slope, offset;
  bool live;  // false for a masked token, whose logits may be anything

  __device__ float operator()(float x) const {
    if (!live) return 0.f;
    float d = x - top;
    d = d < kMasked ? kMasked : d;
    return exp2_fast(d * k) * fmaf(slope, d, offset);
  }
};

template <class T>
__device__ void row_gradient(T* out, const T* row, int64_t V, const Gradient& gradient) {
  constexpr int kSize = Pack<T>::kSize;
  const Span<T> span(row, out, V);
  const auto* packs = reinterpret_cast<const Pack<T>*>(row + span.head);
  auto* to = reinterpret_cast<Pack<T>*>(out + span.head);
  for (int64_t i = threadIdx.x; i < span.packs; i += kThreads * kUnroll) {
    Pack<T> moved[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (i + u * kThreads < span.packs) moved[u] = packs[i + u * kThreads];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (i + u * kThreads >= span.packs) break;
#pragma unroll
      for (int j = 0; j < kSize; j++) assign(moved[u].at[j], gradient(to_float(moved[u].at[j])));
      to[i + u * kThreads] = moved[u];
    }
  }
  for (int64_t i = threadIdx.x; i < span.head; i += kThreads) assign(out[i], gradient(to_float(row[i])));
  for (int64_t i = span.tail() + threadIdx.x; i < V; i += kThreads) assign(out[i], gradient(to_float(row[i])));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    backward(T* out, int64_t out_stride, const T* logits, int64_t stride, const int64_t* target, const float* temperature,
             const float* dlogp, const float* dentropy, const float* entropy, const float* m, const float* log_s,
             int64_t rows, int64_t V) {
  for (int64_t t = blockIdx.x; t < rows; t += gridDim.x) {
    const T* row = logits + t * stride;
    T* to = out + t * out_stride;
    const float tau = temperature[t], g = dlogp[t], gh = dentropy != nullptr ? dentropy[t] : 0.f;
    const float h = dentropy != nullptr ? entropy[t] : 0.f;
    const int64_t at = target[t];
    const bool inside = at >= 0 && at < V;
    const float x = inside ? to_float(row[at]) : 0.f;
    const float top = m[t] * tau;
    const float ln = log_s[t] + fmaf(m[t], tau, -top) / tau;  // log p = (x - top) / tau - ln
    __syncthreads();  // everybody holds row[at] before `out`, which may be `logits`, is written
    const float scale = expf(-ln) / tau;
    const bool live = g != 0.f || gh != 0.f;
    row_gradient(to, row, V, {top, kLog2e / tau, -gh * scale / tau, (-g - gh * (h - ln)) * scale, live});
    __syncthreads();  // the target's column is overwritten last
    if (threadIdx.x == 0 && inside && live) {
      const float log_p = (x - top) / tau - ln, p = expf(log_p);
      assign(to[at], (g * -expm1f(log_p) - (p > 0.f ? gh * p * (log_p + h) : 0.f)) / tau);
    }
  }
}

// --- launch -------------------------------------------------------------------------------------------
void check(Address logits, int code, int64_t stride, int64_t T, int64_t V) {
  FASTRL_CHECK(code == kFloat32 || code == kBFloat16, "code", "0 (fp32) or 1 (bf16)", code);
  FASTRL_CHECK(T >= 0, "T", "at least 0", T);
  FASTRL_CHECK(V >= 1, "V", "at least 1", V);
  FASTRL_CHECK(stride >= 0, "stride", "at least 0", stride);
  FASTRL_CHECK(T == 0 || logits, "logits", "an address", "0");
}

unsigned grid(int64_t T) { return static_cast<unsigned>(std::min<int64_t>(T, 1 << 20)); }

template <class T>
T* array(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
void launch_forward(Address logits, int64_t stride, Address target, Address temperature, Address logp, Address entropy,
                    Address m, Address log_s, int64_t rows, int64_t V, Address stream) {
  forward<T><<<grid(rows), kThreads, 0, array<CUstream_st>(stream)>>>(
      array<const T>(logits), stride, array<const int64_t>(target), array<const float>(temperature), array<float>(logp),
      array<float>(entropy), array<float>(m), array<float>(log_s), rows, V);
}

template <class T>
void launch_backward(Address out, int64_t out_stride, Address logits, int64_t stride, Address target, Address temperature,
                     Address dlogp, Address dentropy, Address entropy, Address m, Address log_s, int64_t rows, int64_t V,
                     Address stream) {
  backward<T><<<grid(rows), kThreads, 0, array<CUstream_st>(stream)>>>(
      array<T>(out), out_stride, array<const T>(logits), stride, array<const int64_t>(target),
      array<const float>(temperature), array<const float>(dlogp), array<const float>(dentropy),
      array<const float>(entropy), array<const float>(m), array<const float>(log_s), rows, V);
}

}  // namespace

void token_logp_forward_cuda(Address logits, int code, int64_t stride, Address target, Address temperature, Address logp,
                             Address entropy, Address m, Address log_s, int64_t T, int64_t V, Address stream) {
  check(logits, code, stride, T, V);
  if (T == 0) return;
  const DeviceOf guard(array<void>(logits));
  const auto launch = code == kBFloat16 ? launch_forward<__nv_bfloat16> : launch_forward<float>;
  launch(logits, stride, target, temperature, logp, entropy, m, log_s, T, V, stream);
  DeviceOf::check(cudaGetLastError(), "token_logp forward");
}

void token_logp_backward_cuda(Address out, int64_t out_stride, Address logits, int code, int64_t stride, Address target,
                              Address temperature, Address dlogp, Address dentropy, Address entropy, Address m,
                              Address log_s, int64_t T, int64_t V, Address stream) {
  check(logits, code, stride, T, V);
  FASTRL_CHECK(T <= 1 || out_stride >= V, "out_stride", "at least V", out_stride);
  FASTRL_CHECK(!dentropy || entropy, "entropy", "an address, because dentropy has one", "0");
  if (T == 0) return;
  const DeviceOf guard(array<void>(logits));
  const auto launch = code == kBFloat16 ? launch_backward<__nv_bfloat16> : launch_backward<float>;
  launch(out, out_stride, logits, stride, target, temperature, dlogp, dentropy, entropy, m, log_s, T, V, stream);
  DeviceOf::check(cudaGetLastError(), "token_logp backward");
}

}  // namespace fastrl
