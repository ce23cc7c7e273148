// One group of decode_attention for the vector width of the including namespace.
#include "vec.h"

// Rows are floats, a multiple of LANES long: those of the cache where they are that already, else copies, which end in zeros.
//
// Scores are taken TILE = LANES at a time: HEADS query heads by LANES / HEADS keys, each a vector of partial products over the width,
// and all LANES vectors are added up in one tree.  The output takes HEADS heads by up to 4 vectors of the width.  The partial sums of a
// score and of an output are the same in any tile.

#ifdef __clang__
#define FASTRL_MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTRL_MIX(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

// neighbours of a, then of b, added, within each 16 bytes
INLINE F add_pairs(F a, F b) {
#if LANES == 16
  return FASTRL_MIX(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         FASTRL_MIX(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#elif LANES == 8
  return FASTRL_MIX(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + FASTRL_MIX(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#else
  return FASTRL_MIX(a, b, 0, 2, 4, 6) + FASTRL_MIX(a, b, 1, 3, 5, 7);
#endif
}
#if LANES > 4
// the same of whole 16 bytes
INLINE F add_quads(F a, F b) {
#if LANES == 16
  return FASTRL_MIX(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         FASTRL_MIX(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#else
  return FASTRL_MIX(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + FASTRL_MIX(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
#endif
}
#endif
#undef FASTRL_MIX

// A tile's partial sums, as a tree: an array of vectors would live in memory.
template <int HEADS, int KEYS>
struct Parts {
  Parts<HEADS, KEYS / 2> low, high;
};
template <>
struct Parts<1, 1> {
  F first;
};
template <>
struct Parts<2, 1> {
  F first, second;
};

template <bool FIRST>
INLINE F multiplied(F sum, F a, F b) {
  return FIRST ? a * b : sum + a * b;
}
template <bool FIRST>
INLINE void multiply(Parts<1, 1>& part, F a, F, const float* const* at, long e) {
  part.first = multiplied<FIRST>(part.first, a, load(at[0] + e));
}
template <bool FIRST>
INLINE void multiply(Parts<2, 1>& part, F a, F b, const float* const* at, long e) {
  const F key = load(at[0] + e);
  part.first = multiplied<FIRST>(part.first, a, key);
  part.second = multiplied<FIRST>(part.second, b, key);
}
template <bool FIRST, int HEADS, int KEYS>
INLINE void multiply(Parts<HEADS, KEYS>& part, F a, F b, const float* const* at, long e) {
  multiply<FIRST>(part.low, a, b, at, e);
  multiply<FIRST>(part.high, a, b, at + KEYS / 2, e);
}

// lane i of the result is the sum of the lanes of the i-th of N vectors
template <int N>
INLINE F joined(F low, F high) {
#if LANES > 4
  if constexpr (N > 4) return add_quads(low, high);
#endif
  return add_pairs(low, high);
}
INLINE F first_sums(const Parts<1, 1>& part) { return part.first; }
INLINE F first_sums(const Parts<2, 1>& part) { return part.first; }
INLINE F second_sums(const Parts<2, 1>& part) { return part.second; }
template <int HEADS, int KEYS>
INLINE F first_sums(const Parts<HEADS, KEYS>& part) {
  return joined<KEYS>(first_sums(part.low), first_sums(part.high));
}
template <int HEADS, int KEYS>
INLINE F second_sums(const Parts<HEADS, KEYS>& part) {
  return joined<KEYS>(second_sums(part.low), second_sums(part.high));
}
INLINE F sums(const Parts<1, LANES>& part) { return first_sums(part); }
INLINE F sums(const Parts<2, LANES / 2>& part) { return joined<LANES>(first_sums(part), second_sums(part)); }

// s[h][j] = scale q_h . k_j for the LANES / HEADS keys `at`
template <int HEADS>
INLINE void score(const float* q, const float* const* at, long width, F scale, float* s) {
  constexpr int KEYS = LANES / HEADS;
  const float* other = q + (HEADS - 1) * width;
  Parts<HEADS, KEYS> part;
  multiply<true>(part, load(q), load(other), at, 0);
  for (long e = LANES; e < width; e += LANES) multiply<false>(part, load(q + e), load(other + e), at, e);
  float all[LANES];
  store(all, sums(part) * scale);
  for (int h = 0; h < HEADS; h++) __builtin_memcpy(s + h * kBlock, all + h * KEYS, sizeof(float) * KEYS);
}

// y[h] = y[h] faded + sum_j p[h][j] v_j over VECTORS vectors of the width from `e` on
template <int HEADS, int VECTORS>
INLINE void gather(float* y, const float* faded, const float* p, const float* const* at, long e, long n, long width) {
  y += e;
  F sum[HEADS][VECTORS];
  for (int h = 0; h < HEADS; h++) {
    for (int i = 0; i < VECTORS; i++) sum[h][i] = load(y + h * width + i * LANES) * faded[h];
  }
  for (long j = 0; j < n; j++) {
    F weight[HEADS];
    for (int h = 0; h < HEADS; h++) weight[h] = splat(p[h * kBlock + j]);
    for (int i = 0; i < VECTORS; i++) {
      const F value = load(at[j] + e + i * LANES);
      for (int h = 0; h < HEADS; h++) sum[h][i] += weight[h] * value;
    }
  }
  for (int h = 0; h < HEADS; h++) {
    for (int i = 0; i < VECTORS; i++) store(y + h * width + i * LANES, sum[h][i]);
  }
}

// The running softmax of one head over n scores: m, and l lane by lane.  What is left of the last vector counts as far away.
INLINE float soften(float* s, long n, float* m, float* l) {
  for (long j = n; j % LANES; j++) s[j] = kLowest;
  F most = load(s);
  for (long j = LANES; j < n; j += LANES) most = larger(most, load(s + j));
  const float before = *m, top = largest(most), now = top > before ? top : before;
  const F d = splat(before - now);
  const float faded = kExpLow > d[0] ? 0.0f : exp_in_range(d)[0];
  F sum = load(l) * faded;
  for (long j = 0; j < n; j += LANES) {
    const F far = load(s + j) - now;
    const F p = kExpLow > far ? F{} : exp_in_range(far);  // NaN stays
    store(s + j, p);
    sum += p;
  }
  store(l, sum);
  *m = now;
  return faded;
}

// HEADS heads over one block of n keys
template <int HEADS>
INLINE void advance(const float* q, float* y, float* s, float* m, float* l, const float* const* keys, const float* const* values, long n,
                    long width, F scale) {
  constexpr int KEYS = LANES / HEADS;
  for (long j = 0; j < n; j += KEYS) score<HEADS>(q, keys + j, width, scale, s + j);
  float faded[HEADS];
  for (int h = 0; h < HEADS; h++) faded[h] = soften(s + h * kBlock, n, m + h, l + h * LANES);
  long e = 0;
  for (; e + 4 * LANES <= width; e += 4 * LANES) gather<HEADS, 4>(y, faded, s, values, e, n, width);
  for (; e < width; e += LANES) gather<HEADS, 1>(y, faded, s, values, e, n, width);
}

// --- rows -----------------------------------------------------------------------------------------------
template <class T>
INLINE void widen_row(float* to, const T* from, long width, long padded) {
  long e = 0;
  for (; e + LANES <= width; e += LANES) store(to + e, load(from + e));
  if (e < padded) store(to + e, load_some(from + e, width - e, T{}));
}

// where row j of a block is to be read: in the cache itself when it is floats and whole vectors
INLINE const float* in_place(const float* from, float* copy, long width, long padded) {
  if (width == padded) return from;
  widen_row(copy, from, width, padded);
  return copy;
}
INLINE const float* in_place(const BF16* from, float* copy, long width, long padded) {
  widen_row(copy, from, width, padded);
  return copy;
}

template <class T>
void attend(const Group& group) {
  const long width = group.width, padded = (width + LANES - 1) / LANES * LANES, heads = group.heads;
  T* out = static_cast<T*>(group.y);
  float* q = group.scratch;
  float *y = q + heads * padded, *s = y + heads * padded, *l = s + heads * kBlock, *m = l + heads * LANES;
  float *key_rows = m + heads, *value_rows = key_rows + kBlock * padded;
  for (long h = 0; h < heads; h++) {
    widen_row(q + h * padded, static_cast<const T*>(group.q) + h * group.q_head, width, padded);
    for (long e = 0; e < padded; e += LANES) store(y + h * padded + e, F{});
    store(l + h * LANES, F{});
    m[h] = kLowest;
  }
  const F scale = splat(group.scale);
  const int* page = group.table;
  long inside = 0;
  for (long first = 0; first < group.length; first += kBlock) {
    const long n = group.length - first < kBlock ? group.length - first : kBlock;
    const float *keys[kBlock], *values[kBlock];
    for (long j = 0; j < n;) {
      if (inside == group.page) inside = 0, page++;
      const long at = (*page * group.page + inside) * group.slot, left = group.page - inside, run = left < n - j ? left : n - j;
      const T *k = static_cast<const T*>(group.k) + at, *v = static_cast<const T*>(group.v) + at;
      for (long end = j + run; j < end; j++, k += group.slot, v += group.slot) {
        keys[j] = in_place(k, key_rows + j * padded, width, padded);
        values[j] = in_place(v, value_rows + j * padded, width, padded);
      }
      inside += run;
    }
    for (long j = n; j < kBlock && j % LANES; j++) keys[j] = keys[n - 1];  // a tile's rest: unused slots, and their NaN, are not read
    long h = 0;
    for (; h + 2 <= heads; h += 2) {
      advance<2>(q + h * padded, y + h * padded, s + h * kBlock, m + h, l + h * LANES, keys, values, n, padded, scale);
    }
    if (h < heads) advance<1>(q + h * padded, y + h * padded, s + h * kBlock, m + h, l + h * LANES, keys, values, n, padded, scale);
  }
  for (long h = 0; h < heads; h++) {
    const double all = total(load(l + h * LANES));
    const F inverse = splat(group.length > 0 ? (float)(1 / all) : 0.0f);
    long e = 0;
    for (; e + LANES <= width; e += LANES) store(out + h * width + e, load(y + h * padded + e) * inverse);
    if (e < width) store_some(out + h * width + e, load(y + h * padded + e) * inverse, width - e);
  }
}

constexpr DecodeRows kDecodeRows[2] = {
    {attend<float>, sizeof(float)},
    {attend<BF16>, sizeof(BF16)},
};
