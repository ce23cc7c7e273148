// One row of rms_norm, forward and backward, for the vector width of the including namespace.
#include "vec.h"

// Sums over a row: fp32 lanes, four vectors deep, over blocks of kBlock elements, and double across blocks.
constexpr long kBlock = 256 * LANES;

// x or, where there is a residual, h = x + residual, rounded and stored
template <class T>
INLINE F summed(const T* x, const T* residual, T* h) {
  if (residual == nullptr) return load(x);
  const F v = rounded_to(h, load(x) + load(residual));
  store_exact(h, v);
  return v;
}
template <class T>
INLINE F summed_some(const T* x, const T* residual, T* h, long n) {
  const F v = load_some(x, n, T{});
  if (residual == nullptr) return v;
  const F sum = rounded_to(h, v + load_some(residual, n, T{}));
  store_some(h, sum, n);
  return sum;
}

template <class T>
double squares(const void* x_row, const void* residual_row, void* h_row, int64_t D) {
  const T *x = static_cast<const T*>(x_row), *residual = static_cast<const T*>(residual_row);
  T* h = static_cast<T*>(h_row);
  double sum = 0;
  for (int64_t first = 0; first < D; first += kBlock) {
    const int64_t end = D - first < kBlock ? D : first + kBlock;
    F s[4] = {};
    int64_t i = first;
    for (; i + 4 * LANES <= end; i += 4 * LANES) {
      for (int k = 0; k < 4; k++) {
        const int64_t at = i + k * LANES;
        const F v = summed(x + at, residual ? residual + at : nullptr, h + at);
        s[k] += v * v;
      }
    }
    for (; i + LANES <= end; i += LANES) {
      const F v = summed(x + i, residual ? residual + i : nullptr, h + i);
      s[0] += v * v;
    }
    if (i < end) {
      const F v = summed_some(x + i, residual ? residual + i : nullptr, h + i, end - i);
      s[0] += v * v;
    }
    sum += total((s[0] + s[1]) + (s[2] + s[3]));
  }
  return sum;
}

// y = round(h r) w
template <class T>
void scale(void* y_row, const void* h_row, const float* w, float r, int64_t D) {
  T* y = static_cast<T*>(y_row);
  const T* h = static_cast<const T*>(h_row);
  const F rr = splat(r);
  int64_t i = 0;
  for (; i + LANES <= D; i += LANES) store(y + i, rounded_to(h, load(h + i) * rr) * load(w + i));
  if (i < D) store_some(y + i, rounded_to(h, load_some(h + i, D - i, T{}) * rr) * load_some(w + i, D - i, 0.0f), D - i);
}

// sum_d dy w h, of which r / D is the mean of g n; dw += dy h r
template <class T>
double products(const void* dy_row, const void* h_row, const float* w, float* dw, float r, int64_t D) {
  const T *dy = static_cast<const T*>(dy_row), *h = static_cast<const T*>(h_row);
  const F rr = splat(r);
  double sum = 0;
  for (int64_t first = 0; first < D; first += kBlock) {
    const int64_t end = D - first < kBlock ? D : first + kBlock;
    F s[2] = {};
    int64_t i = first;
    for (; i + 2 * LANES <= end; i += 2 * LANES) {
      for (int k = 0; k < 2; k++) {
        const int64_t at = i + k * LANES;
        const F d = load(dy + at) * load(h + at);
        s[k] += d * load(w + at);
        store(dw + at, load(dw + at) + d * rr);
      }
    }
    for (; i + LANES <= end; i += LANES) {
      const F d = load(dy + i) * load(h + i);
      s[0] += d * load(w + i);
      store(dw + i, load(dw + i) + d * rr);
    }
    if (i < end) {
      const long n = end - i;
      const F d = load_some(dy + i, n, T{}) * load_some(h + i, n, T{});
      s[0] += d * load_some(w + i, n, 0.0f);
      store_some(dw + i, load_some(dw + i, n, 0.0f) + d * rr, n);
    }
    sum += total(s[0] + s[1]);
  }
  return sum;
}

// dx = r (dy w - h mean) (+ dh), mean = r^2 sum / D
template <class T>
void gradients(void* dx_row, const void* dy_row, const void* dh_row, const void* h_row, const float* w, float r, float mean, int64_t D) {
  T* dx = static_cast<T*>(dx_row);
  const T *dy = static_cast<const T*>(dy_row), *dh = static_cast<const T*>(dh_row), *h = static_cast<const T*>(h_row);
  const F rr = splat(r), m = splat(mean);
  int64_t i = 0;
  for (; i + LANES <= D; i += LANES) {
    const F out = (load(dy + i) * load(w + i) - load(h + i) * m) * rr;
    store(dx + i, dh ? out + load(dh + i) : out);
  }
  if (i == D) return;
  const long n = D - i;
  const F out = (load_some(dy + i, n, T{}) * load_some(w + i, n, 0.0f) - load_some(h + i, n, T{}) * m) * rr;
  store_some(dx + i, dh ? out + load_some(dh + i, n, T{}) : out, n);
}

constexpr NormRows kNormRows[2] = {
    {squares<float>, scale<float>, products<float>, gradients<float>, sizeof(float)},
    {squares<BF16>, scale<BF16>, products<BF16>, gradients<BF16>, sizeof(BF16)},
};
