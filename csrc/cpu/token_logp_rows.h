// One row of token_logp, forward and backward, for the vector width of the including namespace.
#include "vec.h"

// Forward: the row is read once from memory, in blocks that fit L1: the largest value of the block, then the sums.
//     X = max x      s = sum exp((x - X) / temperature)      a = sum exp(d) d,  d = (x - X) / temperature
// Lane sums are fp32 within a block and double across blocks, so the error does not grow with V.
constexpr long kBlock = 256 * LANES;  // 64 additions a lane: 16 KiB of fp32 with AVX-512

template <class T>
INLINE float block_max(const T* x, long n, float start) {
  F m[4] = {splat(start), splat(start), splat(start), splat(start)};
  long i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    for (int k = 0; k < 4; k++) m[k] = larger(load(x + i + k * LANES), m[k]);
  }
  for (; i + LANES <= n; i += LANES) m[0] = larger(load(x + i), m[0]);
  if (i < n) m[0] = larger(load_some(x + i, n - i, minus_infinity<T>()), m[0]);
  return largest(larger(larger(m[0], m[1]), larger(m[2], m[3])));
}

template <bool ENTROPY>
INLINE void add(F x, F top, F inverse, F& s, F& a) {
  F d = (x - top) * inverse;
  d = kExpLow > d ? splat(kExpLow) : d;  // -inf logits: 1e-38 each, nothing beside s >= 1; NaN stays
  const F e = exp_in_range(d);
  s += e;
  if (ENTROPY) a += e * d;
}

template <bool ENTROPY, class T>
INLINE void block_sums(const T* x, long n, float top, float inverse, double& s, double& a) {
  const F t = splat(top), inv = splat(inverse);
  F ss[4] = {}, aa[4] = {};
  long i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    for (int k = 0; k < 4; k++) {
      __builtin_prefetch(x + i + k * LANES + kBlock);  // the next block arrives while this one is summed; never faults
      add<ENTROPY>(load(x + i + k * LANES), t, inv, ss[k], aa[k]);
    }
  }
  for (; i + LANES <= n; i += LANES) add<ENTROPY>(load(x + i), t, inv, ss[0], aa[0]);
  if (i < n) add<ENTROPY>(load_some(x + i, n - i, minus_infinity<T>()), t, inv, ss[0], aa[0]);
  s += total((ss[0] + ss[1]) + (ss[2] + ss[3]));
  if (ENTROPY) a += total((aa[0] + aa[1]) + (aa[2] + aa[3]));
}

template <bool ENTROPY, class T>
void sums(const void* row, int64_t V, double temperature, RowSums& out) {
  const T* x = static_cast<const T*>(row);
  const float inverse = (float)(1 / temperature);
  float top = kLowest;  // not -inf: a block of nothing but -inf must not make NaN of the blocks after it
  double s = 0, a = 0;
  for (int64_t i = 0; i < V; i += kBlock) {
    const long n = V - i < kBlock ? V - i : kBlock;
    const float now = block_max(x + i, n, top);
    if (now > top) {  // what was summed so far refers to the old top
      const double shift = ((double)top - now) / temperature, scale = __builtin_exp(shift);
      a = scale > 0 ? scale * (a + shift * s) : 0;
      s = scale * s;
      top = now;
    }
    block_sums<ENTROPY>(x + i, n, top, inverse, s, a);
  }
  out = {top, s, a};
}

// Backward: out = exp(d) (slope d + offset), d = (x - top) / temperature; exactly 0 where exp(d) underflows.
INLINE F gradient(F x, F top, F inverse, F slope, F offset) {
  const F d = (x - top) * inverse;
  const F low = kExpLow > d ? splat(kExpLow) : d;
  const F e = exp_in_range(low);
  return (kExpLow > d ? F{} : e) * (slope * low + offset);
}

template <class T>
void gradients(void* out_row, const void* row, int64_t V, const RowGradient& g) {
  T* out = static_cast<T*>(out_row);
  const T* x = static_cast<const T*>(row);
  const F top = splat(g.top), inverse = splat(g.inverse), slope = splat(g.slope), offset = splat(g.offset);
  int64_t i = 0;
  for (; i + 4 * LANES <= V; i += 4 * LANES) {
    F y[4];
    for (int k = 0; k < 4; k++) y[k] = gradient(load(x + i + k * LANES), top, inverse, slope, offset);
    for (int k = 0; k < 4; k++) store(out + i + k * LANES, y[k]);
  }
  for (; i + LANES <= V; i += LANES) store(out + i, gradient(load(x + i), top, inverse, slope, offset));
  if (i == V) return;
  const F last = load_some(x + i, V - i, minus_infinity<T>());
  store_some(out + i, gradient(last, top, inverse, slope, offset), V - i);
}

template <class T>
float read(const void* row, int64_t i) {
  return to_float(static_cast<const T*>(row)[i]);
}
template <class T>
void write(void* row, int64_t i, float value) {
  store_some(static_cast<T*>(row) + i, splat(value), 1);
}

constexpr Rows kRows[2] = {
    {sums<false, float>, sums<true, float>, gradients<float>, read<float>, write<float>, sizeof(float)},
    {sums<false, BF16>, sums<true, BF16>, gradients<BF16>, read<BF16>, write<BF16>, sizeof(BF16)},
};
