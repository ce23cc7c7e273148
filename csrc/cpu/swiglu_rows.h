// One row of swiglu, forward and backward, for the vector width of the including namespace.
#include "vec.h"

// 1 / (1 + exp(-g)); 0 where exp(-g) is above 6e37.  NaN stays.
INLINE F sigmoid(F g) {
  F d = -g;
  d = d > 87.0f ? splat(87.0f) : d;
  d = kExpLow > d ? splat(kExpLow) : d;
  const F s = 1.0f / (1.0f + exp_in_range(d));
  return kExpLow > g ? F{} : s;
}

INLINE F gated(F gate, F up) { return gate * sigmoid(gate) * up; }

template <class T>
void forward(void* y_row, const void* x_row, int64_t width) {
  T* y = static_cast<T*>(y_row);
  const T *gate = static_cast<const T*>(x_row), *up = gate + width;
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) store(y + i, gated(load(gate + i), load(up + i)));
  const long n = width - i;
  if (n > 0) store_some(y + i, gated(load_some(gate + i, n, T{}), load_some(up + i, n, T{})), n);
}

struct Pair {
  F gate, up;
};

// dgate = dy up s (1 + g (1 - s)),  dup = dy g s
INLINE Pair gradient(F d, F gate, F up) {
  const F s = sigmoid(gate);
  return {d * up * (s * (gate * (1.0f - s) + 1.0f)), d * (gate * s)};
}

template <class T>
void backward(void* dx_row, const void* dy_row, const void* x_row, int64_t width) {
  T *dgate = static_cast<T*>(dx_row), *dup = dgate + width;
  const T *dy = static_cast<const T*>(dy_row), *gate = static_cast<const T*>(x_row), *up = gate + width;
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    const Pair out = gradient(load(dy + i), load(gate + i), load(up + i));
    store(dgate + i, out.gate);
    store(dup + i, out.up);
  }
  const long n = width - i;
  if (n <= 0) return;
  const Pair out = gradient(load_some(dy + i, n, T{}), load_some(gate + i, n, T{}), load_some(up + i, n, T{}));
  store_some(dgate + i, out.gate, n);
  store_some(dup + i, out.up, n);
}

constexpr GateRows kGateRows[2] = {
    {forward<float>, backward<float>, sizeof(float)},
    {forward<BF16>, backward<BF16>, sizeof(BF16)},
};
