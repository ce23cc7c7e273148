// One head of rope, forward and backward, for the vector width of the including namespace.
#include "vec.h"

template <class T>
INLINE F get(const T* p, long n) {
  return n >= LANES ? load(p) : load_some(p, n, T{});
}
template <class T>
INLINE void put(T* p, F v, long n) {
  if (n >= LANES) store(p, v);
  else store_some(p, v, n);
}

template <class T>
double squares(const void* row, int64_t width) {
  const T* x = static_cast<const T*>(row);
  F s[2] = {};
  for (int64_t i = 0; i < width; i += 2 * LANES) {
    const F a = get(x + i, width - i);
    s[0] += a * a;
    if (i + LANES >= width) break;
    const F b = get(x + i + LANES, width - i - LANES);
    s[1] += b * b;
  }
  return total(s[0] + s[1]);
}

// rounded before the weight and after, as rms_norm is
template <class T>
INLINE F normed(const T* x, F v, const float* weight, float r, long n) {
  return rounded_to(x, rounded_to(x, v * splat(r)) * get(weight, n));
}

template <class T>
void turn(void* out, const void* row, const Turn& turn, const float* weight, float r) {
  T* y = static_cast<T*>(out);
  const T* x = static_cast<const T*>(row);
  const int64_t half = turn.half;
  for (int64_t i = 0; i < half; i += LANES) {
    const long n = half - i;
    F a = get(x + i, n), b = get(x + half + i, n);
    if (weight) {
      a = normed(x, a, weight + i, r, n);
      b = normed(x, b, weight + half + i, r, n);
    }
    const F c = get(turn.cos + i, n), s = get(turn.sin + i, n) * splat(turn.sense);
    put(y + i, a * c - b * s, n);
    put(y + half + i, b * c + a * s, n);
  }
}

struct Halves {
  F first, second;
};
template <class T>
INLINE Halves turned(const T* x, const Turn& turn, int64_t i, long n) {
  const F a = get(x + i, n), b = get(x + turn.half + i, n);
  const F c = get(turn.cos + i, n), s = get(turn.sin + i, n) * splat(turn.sense);
  return {a * c - b * s, b * c + a * s};
}

// dx = r (g - n mean(g n)), n = x r, g = w dn;  dw += dn n;  dn = dy turned back
template <class T>
void gradients(void* out, float* dw, const void* dy_row, const void* x_row, const Turn& turn, const float* weight, float r) {
  T* dx = static_cast<T*>(out);
  const T *dy = static_cast<const T*>(dy_row), *x = static_cast<const T*>(x_row);
  const int64_t half = turn.half;
  const F rr = splat(r);
  F sum[2] = {};
  for (int64_t i = 0; i < half; i += LANES) {
    const long n = half - i;
    const Halves d = turned(dy, turn, i, n);
    const F na = get(x + i, n) * rr, nb = get(x + half + i, n) * rr, pa = d.first * na, pb = d.second * nb;
    sum[0] += pa * get(weight + i, n);
    sum[1] += pb * get(weight + half + i, n);
    put(dw + i, get(dw + i, n) + pa, n);
    put(dw + half + i, get(dw + half + i, n) + pb, n);
  }
  const F mean = splat((float)(total(sum[0] + sum[1]) / (2 * half)));
  for (int64_t i = 0; i < half; i += LANES) {
    const long n = half - i;
    const Halves d = turned(dy, turn, i, n);
    put(dx + i, (d.first * get(weight + i, n) - get(x + i, n) * rr * mean) * rr, n);
    put(dx + half + i, (d.second * get(weight + half + i, n) - get(x + half + i, n) * rr * mean) * rr, n);
  }
}

constexpr RopeRows kRopeRows[2] = {
    {squares<float>, turn<float>, gradients<float>, sizeof(float)},
    {squares<BF16>, turn<BF16>, gradients<BF16>, sizeof(BF16)},
};
