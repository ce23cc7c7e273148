// One row of sample for the vector width of the including namespace: its sums, and the race that draws its token.
#include "vec.h"

#include "philox.h"

// The race.  token = argmax (d - log E), and e = exp(d) is at hand because the sums need it, so a token that beats the best
// score so far, S, has E / e < exp(-S).  As E = -log1p(-u) >= u, it also has
//
//     u < e exp(-S)
//
// which takes the Philox word, a conversion, a product and a comparison, and no logarithm.  Only the few tokens of a row that
// pass it (about log V) are scored in full.  With h = word / 2 rounded down, h 2^-31 < u, so the test is h < limit e with
// limit = 2^31 exp(-S) kMargin; the margin is more than e, the conversion and the rounded d of a token that may win are off by.
// The smallest u is 2^-33: where limit e <= 1/4 no token can win, and the words are not computed.
// The most probable token scores at least -log(-log(2^-33)) = -3.13, so that a race which starts at kStart loses no winner.
// The token is that of the reference, which compares the same fp32 d - log E in double.
constexpr double kStart = -3.2, kMargin = 1 + 1e-5;
constexpr long kGroup = 4 * LANES;   // elements that share one decision to draw
constexpr long kBlock = 64 * kGroup;  // fp32 lane sums within a block, double across blocks: the error does not grow with V

template <class T>
float row_max(const void* row, int64_t V) {
  const T* x = static_cast<const T*>(row);
  F m[4] = {splat(kLowest), splat(kLowest), splat(kLowest), splat(kLowest)};
  int64_t i = 0;
  for (; i + kGroup <= V; i += kGroup) {
    for (int k = 0; k < 4; k++) m[k] = larger(load(x + i + k * LANES), m[k]);
  }
  for (; i + LANES <= V; i += LANES) m[0] = larger(load(x + i), m[0]);
  if (i < V) m[0] = larger(load_some(x + i, V - i, minus_infinity<T>()), m[0]);
  return largest(larger(larger(m[0], m[1]), larger(m[2], m[3])));
}

// --- the words of a group, in the order of its elements -------------------------------------------------
#if LANES == 16
#define FASTRL_EVEN 0, 8, 2, 10, 4, 12, 6, 14
#define FASTRL_ODD 1, 9, 3, 11, 5, 13, 7, 15
constexpr P kCounters = {0, 4, 1, 5, 2, 6, 3, 7};
#elif LANES == 8
#define FASTRL_EVEN 0, 4, 2, 6
#define FASTRL_ODD 1, 5, 3, 7
constexpr P kCounters = {0, 2, 1, 3};
#else
#define FASTRL_EVEN 0, 2
#define FASTRL_ODD 1, 3
constexpr P kCounters = {0, 1};
#endif
#ifdef __clang__
#define FASTRL_PAIRS(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define FASTRL_PAIRS(x, y, ...) __builtin_shuffle(x, y, P{__VA_ARGS__})
#endif

// LANES / 2 counters from `first` on: kCounters is the order that makes pairing their words a permutation within 128 bits
INLINE void words(const RowDraw& draw, const RoundKeys& keys, unsigned first, U& low, U& high) {
  const P zero = {};
  const Words<P> w = philox(kCounters + first, zero + draw.counter[0], zero + draw.counter[1], zero + draw.counter[2], keys);
  const P ab = (w.w[0] & 0xffffffffull) | (w.w[1] << 32), cd = (w.w[2] & 0xffffffffull) | (w.w[3] << 32);
  low = (U)FASTRL_PAIRS(ab, cd, FASTRL_EVEN);
  high = (U)FASTRL_PAIRS(ab, cd, FASTRL_ODD);
}
#undef FASTRL_EVEN
#undef FASTRL_ODD
#undef FASTRL_PAIRS

// --- the race -------------------------------------------------------------------------------------------
// Scores in full, in order, the elements of a group that passed the test.
template <class T>
__attribute__((noinline)) void score(const T* x, int64_t first, const U* word, const I* passed, RowDraw& draw) {
  for (long i = 0; i < kGroup; i++) {
    if (passed[i / LANES][i % LANES] == 0) continue;
    const float d = (to_float(x[i]) - draw.top) / draw.temperature;
    const double u = (word[i / LANES][i % LANES] + 0.5) * 0x1p-32;
    const double now = d - __builtin_log(-__builtin_log1p(-u));
    if (now > draw.score) {
      draw.score = now;
      draw.token = first + i;
      draw.limit = (float)(0x1p31 * kMargin * __builtin_exp(-now));
    }
  }
}

template <class T>
INLINE void compete(const T* x, int64_t first, const F* e, const RoundKeys& keys, RowDraw& draw) {
  U word[4];
  I passed[4];
  words(draw, keys, (unsigned)(first / 4), word[0], word[1]);
  words(draw, keys, (unsigned)(first / 4) + LANES / 2, word[2], word[3]);
  const F limit = splat(draw.limit);
  for (int k = 0; k < 4; k++) passed[k] = __builtin_convertvector((I)(word[k] >> 1), F) < limit * e[k];
  if (any((passed[0] | passed[1]) | (passed[2] | passed[3]))) score(x, first, word, passed, draw);
}

template <bool FILTER, class T>
INLINE void block(const T* x, int64_t first, long n, const RoundKeys& keys, RowDraw& draw) {
  const F top = splat(draw.top), inverse = splat((float)(1 / (double)draw.temperature)), floor = splat(draw.floor);
  F s[2] = {}, a[2] = {}, kept[2] = {};
  for (long i = 0; i < n; i += kGroup) {
    F e[4];
    for (int k = 0; k < 4; k++) {
      __builtin_prefetch(x + i + k * LANES + draw.ahead);  // the next row arrives while this one is summed; never faults
      const F far = (load(x + i + k * LANES) - top) * inverse;
      const F d = kExpLow > far ? splat(kExpLow) : far;  // -inf logits: 1e-38 each, nothing beside s >= 1; NaN stays
      e[k] = exp_in_range(d);
      s[k % 2] += e[k];
      a[k % 2] += e[k] * d;
      if (FILTER) {
        e[k] = far >= floor ? e[k] : F{};
        kept[k % 2] += e[k];
      }
    }
    const F most = larger(larger(e[0], e[1]), larger(e[2], e[3]));
    if (any(most * splat(draw.limit) > 0.25f)) compete(x + i, first + i, e, keys, draw);
  }
  draw.s += total(s[0] + s[1]);
  draw.a += total(a[0] + a[1]);
  if (FILTER) draw.kept += total(kept[0] + kept[1]);
}

template <bool FILTER, class T>
void run(const void* row, int64_t V, RowDraw& draw) {
  const T* x = static_cast<const T*>(row);
  const int64_t whole = V - V % kGroup;
  const RoundKeys keys = round_keys(draw.key[0], draw.key[1]);
  draw.score = kStart;
  draw.limit = draw.greedy ? 0 : (float)(0x1p31 * kMargin * __builtin_exp(-kStart));  // 0: no race
  for (int64_t i = 0; i < whole; i += kBlock) block<FILTER>(x + i, i, whole - i < kBlock ? whole - i : kBlock, keys, draw);
  if (whole == V) return;
  T last[kGroup];
  for (long i = 0; i < kGroup; i++) last[i] = whole + i < V ? x[whole + i] : minus_infinity<T>();
  block<FILTER>(last, whole, kGroup, keys, draw);
}

// --- what else a row needs ------------------------------------------------------------------------------
template <class T>
int64_t first_of(const void* row, int64_t V, float value) {
  const T* x = static_cast<const T*>(row);
  for (int64_t i = 0; i < V; i++) {
    if (to_float(x[i]) == value) return i;
  }
  return 0;
}

// d = (x - top) / temperature, each operation rounded once: the filters compare these bits
template <class T>
void distances(const void* row, int64_t V, float top, float temperature, float* out) {
  const T* x = static_cast<const T*>(row);
  int64_t i = 0;
  for (; i + LANES <= V; i += LANES) store(out + i, (load(x + i) - top) / temperature);
  if (i < V) store_some(out + i, (load_some(x + i, V - i, minus_infinity<T>()) - top) / temperature, V - i);
}

template <class T>
float read(const void* row, int64_t i) {
  return to_float(static_cast<const T*>(row)[i]);
}

constexpr SampleRows kRows[2] = {
    {row_max<float>, run<false, float>, run<true, float>, first_of<float>, distances<float>, read<float>, sizeof(float)},
    {row_max<BF16>, run<false, BF16>, run<true, BF16>, first_of<BF16>, distances<BF16>, read<BF16>, sizeof(BF16)},
};
