// Tiles of attention for the vector width of the including namespace.
#include "vec.h"
#include "attention_products.h"

namespace tiles {

// --- rows in and out ----------------------------------------------------------------------------------
template <class T>
INLINE F load_up_to(const T* p, long n) { return n >= LANES ? load(p) : load_some(p, n, T{}); }
template <class T>
INLINE void copy_row(float* out, const T* row, long width, float factor) {
  long e = 0;
  for (; e + LANES <= width; e += LANES) store(out + e, load(row + e) * factor);
  if (e < width) store(out + e, load_some(row + e, width - e, T{}) * factor);
}
template <class T>
INLINE void write_row(T* out, const float* row, long width, float factor) {
  long e = 0;
  for (; e + LANES <= width; e += LANES) store(out + e, load(row + e) * factor);
  if (e < width) store_some(out + e, load(row + e) * factor, width - e);
}

// The rows of a tile, one after the other.
struct Cursor {
  const AttentionTile& tile;
  long r = 0, token, head;
  explicit INLINE Cursor(const AttentionTile& t) : tile(t), token(t.first / t.heads), head(t.first % t.heads) {}
  INLINE bool inside() const { return r < tile.rows; }
  INLINE void next() {
    r++;
    if (++head == tile.heads) head = 0, token++;
  }
  INLINE long of(const AttentionView& x) const { return token * x.token + head * x.head; }
};

// The rows of a tile, read to rows kWide apart, times a factor, and written from there.
template <class T>
INLINE void take(float* out, const AttentionTile& t, const AttentionView& x, float factor) {
  for (Cursor at(t); at.inside(); at.next(), out += kWide) copy_row(out, static_cast<const T*>(x.at) + at.of(x), t.width, factor);
}
template <class T>
INLINE void give(const AttentionTile& t, const float* from, const float* factor) {
  for (Cursor at(t); at.inside(); at.next(), from += kWide) {
    write_row(static_cast<T*>(t.out.at) + at.of(t.out), from, t.width, factor[at.r]);
  }
}

// LANES rows turned in place, by exchanging what lies STEP off the diagonal
template <long STEP = LANES / 2>
INLINE void turn_block(F* rows) {
#ifndef __clang__
  I low{}, high{};
  for (int i = 0; i < LANES; i++) low[i] = i & STEP ? LANES + (i ^ STEP) : i, high[i] = i & STEP ? LANES + i : i ^ STEP;
#endif
  FASTRL_UNROLL
  for (int r = 0; r < LANES; r++) {
    if (r & STEP) continue;
    const F a = rows[r], b = rows[r + STEP];
#ifdef __clang__
    for (int i = 0; i < LANES; i++) rows[r][i] = i & STEP ? b[i ^ STEP] : a[i], rows[r + STEP][i] = i & STEP ? b[i] : a[i ^ STEP];
#else
    rows[r] = __builtin_shuffle(a, b, low), rows[r + STEP] = __builtin_shuffle(a, b, high);
#endif
  }
  if constexpr (STEP > 1) turn_block<STEP / 2>(rows);
}

// Panels (width, kPanel) of the sequence's keys [first, first + n); what the last panel lacks is 0.
template <class T>
void turn(float* out, const AttentionView& x, int64_t first, int64_t n, int64_t width) {
  const T* from = static_cast<const T*>(x.at) + first * x.token;
  for (long j = 0; j < n || j % kPanel != 0; j += LANES, from += LANES * x.token) {
    float* to = out + j / kPanel * kPanel * width + j % kPanel;
    for (long e = 0; e < width; e += LANES) {
      F rows[LANES] = {};
      if (n - j >= LANES && width - e >= LANES) {
        FASTRL_UNROLL
        for (int i = 0; i < LANES; i++) rows[i] = load(from + i * x.token + e);
      } else {
        for (int i = 0; i < least(n - j, LANES); i++) rows[i] = load_up_to(from + i * x.token + e, width - e);
      }
      turn_block(rows);
      if (width - e >= LANES) {
        FASTRL_UNROLL
        for (int i = 0; i < LANES; i++) store(to + (e + i) * kPanel, rows[i]);
      } else {
        for (int i = 0; i < width - e; i++) store(to + (e + i) * kPanel, rows[i]);
      }
    }
  }
}

// The keys or values [first, first + n) as rows of whole vectors.
template <class T>
void lay(float* out, const AttentionView& x, int64_t first, int64_t n, int64_t width) {
  const T* from = static_cast<const T*>(x.at) + first * x.token;
  for (long j = 0; j < n; j++) copy_row(out + j * whole(width), from + j * x.token, width, 1.0f);
}

// --- the softmax of a tile ----------------------------------------------------------------------------
template <long STEP>
INLINE F swapped(F v) {  // lane i and lane i ^ STEP change places
#ifdef __clang__
  F out = v;
  for (long i = 0; i < LANES; i++) out[i] = v[i ^ STEP];
  return out;
#else
  I at{};
  for (int i = 0; i < LANES; i++) at[i] = i ^ STEP;
  return __builtin_shuffle(v, at);
#endif
}
template <long STEP = LANES / 2>
INLINE float highest(F v) {
  if constexpr (STEP == 0) return v[0];
  else return highest<STEP / 2>(larger(v, swapped<STEP>(v)));
}
template <long STEP = LANES / 2>
INLINE float added(F v) {
  if constexpr (STEP == 0) return v[0];
  else return added<STEP / 2>(v + swapped<STEP>(v));
}
INLINE I lane_numbers() {
  I at{};
  for (int i = 0; i < LANES; i++) at[i] = i;
  return at;
}

// 2^x for x <= 0, within 1.5 ulp, and 0 below 2^-125; NaN stays.  x = n + f, |f| <= 1/2; 2^f = 1 + f c(f), c minimax to 1e-7.  Scores
// are in powers of 2, the factor log2 e in q: an operation less for each.
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147182f;
INLINE F power(F x) {
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const F shifted = x + magic;
  const F f = x - (shifted - magic);
  F c = splat(0x1.5bba14p-10f);
  c = c * f + 0x1.3cea88p-7f;
  c = c * f + 0x1.c6b752p-5f;
  c = c * f + 0x1.ebf9bcp-3f;
  c = c * f + 0x1.62e42ap-1f;
  const F scale = (F)(((U)shifted << 23) + 0x3f800000u);
  return -125.0f > x ? F{} : (c * f + 1.0f) * scale;
}

// Where a tile of rows stands: row r sees keys [0, visible(r)) of its sequence.
struct Place {
  long first, rows, heads, past;
  long end[kAttentionRows] = {};
  explicit Place(const AttentionTile& t) : first(t.first), rows(t.rows), heads(t.heads), past(t.past) {
    for (Cursor at(t); at.inside(); at.next()) end[at.r] = past + at.token + 1;
  }
  INLINE long visible(long r) const { return end[r]; }
};

// A block of rows over the tile's `columns` from key n0 on: its rows all see the vectors before `clear`, and none sees those from `top`
// on.  What is between is masked, for all rows alike: loops of one length are foreseen by the processor.
struct Span {
  long rows, clear, top;
  INLINE Span(const Place& place, long r, long n0, long columns)
      : rows(block_of(place.rows - r)),
        clear(kept(place.visible(r) - n0, columns) / LANES * LANES),
        top(whole(kept(place.visible(r + rows - 1) - n0, columns))) {}
  static INLINE long kept(long seen, long columns) { return seen < 0 ? 0 : least(seen, columns); }
};

// s (rows, kScores) = a (rows, width) b^T over the keys from n0 on that a row of the block sees; b in panels
INLINE void scores(float* s, const float* a, const float* b, const Place& place, long n0, long width) {
  for (long r = 0, block; r < place.rows; r += block) {
    block = block_of(place.rows - r);
    const long keys = least(place.visible(r + block - 1) - n0, kAttentionKeys);
    if (keys <= 0) continue;
    for (long e = 0; e < width; e += kDepth) {
      const auto run = e == 0 ? strip<kSet, false, kWide> : strip<kAdd, false, kWide>;
      run(block, s + r * kScores, kScores, a + r * kWide + e, b + e * kPanel, kPanel, kPanel * width, least(width - e, kDepth), whole(keys),
          nullptr);
    }
  }
}

struct Running {  // the softmax of the rows so far, m in powers of 2
  float m[kAttentionRows], faded[kAttentionRows], sum[kAttentionRows * LANES];
};

// Scores to 2^(s - m), 0 where a row does not see within its block's keys; the new m of each row and what its output fades by.
template <class T>
INLINE void soften(float* s, Running& running, const Place& place, long n0, long columns, Cursor& ahead) {
  const I lane = lane_numbers();
  for (long r = 0, end; r < place.rows; r = end) {
    const Span span(place, r, n0, columns);
    for (end = r + span.rows; r < end; r++) {
      float* row = s + r * kScores;
      F most = splat(kLowest);
      for (long j = 0; j < span.clear; j += LANES) most = larger(most, load(row + j));
      for (long j = span.clear; j < span.top; j += LANES) {
        const F kept = lane < (int)(place.visible(r) - n0 - j) ? load(row + j) : splat(-__builtin_inff());
        store(row + j, kept);
        most = larger(most, kept);
      }
      const float before = running.m[r], top = highest(most), now = top > before ? top : before;
      running.m[r] = now, running.faded[r] = before - now;
    }
  }
  for (long r = 0; r < whole(place.rows); r += LANES) store(running.faded + r, power(load(running.faded + r)));
  for (long r = 0, end; r < place.rows; r = end) {
    const Span span(place, r, n0, columns);
    for (end = r + span.rows; r < end; r++) {
      if (ahead.inside()) {
        const T* row = static_cast<const T*>(ahead.tile.q.at) + ahead.of(ahead.tile.q);
        for (long e = 0; e < ahead.tile.width; e += 64 / (long)sizeof(T)) __builtin_prefetch(row + e);
        ahead.next();
      }
      float *row = s + r * kScores, *sums = running.sum + r * LANES;
      const F m = splat(running.m[r]);
      F sum{};
      for (long j = 0; j < span.top; j += LANES) {
        const F p = power(load(row + j) - m);
        store(row + j, p);
        sum += p;
      }
      store(sums, load(sums) * running.faded[r] + sum);
    }
  }
}

// --- a tile of queries over its keys ------------------------------------------------------------------
template <class T>
void forward(const AttentionTile& t) {
  const long width = t.width, padded = whole(width);
  float *q = t.scratch, *y = q + kAttentionRows * kWide, *s = y + kAttentionRows * kWide;
  const Place place(t);
  Running running;
  take<T>(q, t, t.q, t.scale * kLog2E);
  for (long r = 0; r < t.rows; r++) {
    for (long e = 0; e < padded; e += LANES) store(y + r * kWide + e, F{});
    store(running.sum + r * LANES, F{});
    running.m[r] = kLowest;
  }
  Cursor ahead(t.next ? *t.next : t);
  if (!t.next) ahead.r = t.rows;
  const long end = place.visible(t.rows - 1);
  for (long n0 = 0; n0 < end; n0 += kAttentionKeys) {
    scores(s, q, t.k_turned + n0 * width, place, n0, width);
    soften<T>(s, running, place, n0, least(end - n0, kAttentionKeys), ahead);
    for (long r = 0, block; r < t.rows; r += block) {
      block = block_of(t.rows - r);
      const long keys = least(place.visible(r + block - 1) - n0, kAttentionKeys);
      if (keys <= 0) continue;
      strip<kFade, false, kScores>(block, y + r * kWide, kWide, s + r * kScores, t.v + n0 * padded, padded, kPanel, keys, padded,
                                   running.faded + r);
    }
  }
  float all[kAttentionRows];
  for (long r = 0; r < t.rows; r++) all[r] = added(load(running.sum + r * LANES)), running.faded[r] = 1.0f / all[r];
  give<T>(t, y, running.faded);
  if (!t.lse) return;
  for (Cursor at(t); at.inside(); at.next()) t.lse[at.token * t.all_heads + at.head] = running.m[at.r] * kLn2 + __builtin_logf(all[at.r]);
}

// p = 2^(s - lse) in place of s, and ds = p (dp - delta) in place of dp; 0 where a row does not see, up to `columns`
INLINE void differentiate(float* s, float* dp, const float* lse, const float* delta, const Place& place, long n0, long columns) {
  const I lane = lane_numbers();
  for (long r = 0, end; r < place.rows; r = end) {
    const Span span(place, r, n0, columns);
    for (end = r + span.rows; r < end; r++, s += kScores, dp += kScores) {
      const F norm = splat(lse[r]), minus = splat(delta[r]);
      long j = 0;
      for (; j < span.clear; j += LANES) {
        const F p = power(load(s + j) - norm);
        store(dp + j, p * (load(dp + j) - minus));
        store(s + j, p);
      }
      for (; j < span.top; j += LANES) {
        const I inside = lane < (int)(place.visible(r) - n0 - j);
        const F p = power(load(s + j) - norm), d = p * (load(dp + j) - minus);
        store(s + j, inside ? p : F{});
        store(dp + j, inside ? d : F{});
      }
      for (; j < columns; j += LANES) store(s + j, F{}), store(dp + j, F{});
    }
  }
}

// out (columns, padded) += x^T b for x (rows, kScores), b (rows, kWide): of each key the rows that may see it
INLINE void gather(float* out, const float* x, const float* b, const Place& place, long n0, long columns, long padded) {
  for (long j = 0, block; j < columns; j += block, out += block * padded) {
    block = block_of(columns - j);
    const long before = (n0 + j - place.past) * place.heads - place.first, from = before > 0 ? before : 0;
    strip<kAdd, true, kScores>(block, out, padded, x + from * kScores + j, b + from * kWide, kWide, kPanel, place.rows - from, padded,
                               nullptr);
  }
}

template <class T>
void backward(const AttentionTile& t) {
  const long width = t.width, padded = whole(width);
  float *q = t.scratch, *dy = q + kAttentionRows * kWide, *dq = dy + kAttentionRows * kWide;
  float *s = dq + kAttentionRows * kWide, *dp = s + kAttentionRows * kScores;
  const Place place(t);
  float lse[kAttentionRows], delta[kAttentionRows];
  take<T>(dq, t, t.y, 1.0f);
  take<T>(dy, t, t.dy, 1.0f);
  take<T>(q, t, t.q, t.scale * kLog2E);
  for (Cursor at(t); at.inside(); at.next()) lse[at.r] = t.lse[at.token * t.all_heads + at.head] * kLog2E;
  for (long r = 0; r < t.rows; r++) {
    F sum{};
    for (long e = 0; e < padded; e += LANES) {
      sum += load(dq + r * kWide + e) * load(dy + r * kWide + e);
      store(dq + r * kWide + e, F{});
    }
    delta[r] = added(sum);
  }
  const long end = place.visible(t.rows - 1);
  for (long n0 = 0; n0 < end; n0 += kAttentionKeys) {
    const long columns = least(end - n0, kAttentionKeys);
    scores(s, q, t.k_turned + n0 * width, place, n0, width);
    scores(dp, dy, t.v_turned + n0 * width, place, n0, width);
    differentiate(s, dp, lse, delta, place, n0, columns);
    gather(t.dv + n0 * padded, s, dy, place, n0, columns, padded);
    gather(t.dk + n0 * padded, dp, q, place, n0, columns, padded);
    for (long r = 0, block; r < t.rows; r += block) {
      block = block_of(t.rows - r);
      const long keys = least(place.visible(r + block - 1) - n0, kAttentionKeys);
      if (keys <= 0) continue;
      strip<kAdd, false, kScores>(block, dq + r * kWide, kWide, dp + r * kScores, t.k + n0 * padded, padded, kPanel, keys, padded,
                                  nullptr);
    }
  }
  for (long r = 0; r < t.rows; r++) delta[r] = t.scale;
  give<T>(t, dq, delta);
}

// Row j of a gradient of keys or values: the shares added up in their order.  The keys' were taken with q log2 e.
template <class T>
void join(void* out, const float* const* shares, int64_t count, int64_t j, int64_t width, bool of_keys) {
  const long padded = whole(width);
  float sum[kAttentionWidth];
  for (long e = 0; e < padded; e += LANES) {
    F x = load(shares[0] + j * padded + e);
    for (long i = 1; i < count; i++) x += load(shares[i] + j * padded + e);
    store(sum + e, x);
  }
  write_row(static_cast<T*>(out), sum, width, of_keys ? kLn2 : 1.0f);
}
#undef FASTRL_UNROLL

}  // namespace tiles

constexpr AttentionRows kAttention[2] = {
    {tiles::turn<float>, tiles::lay<float>, tiles::forward<float>, tiles::backward<float>, tiles::join<float>, sizeof(float), LANES},
    {tiles::turn<BF16>, tiles::lay<BF16>, tiles::forward<BF16>, tiles::backward<BF16>, tiles::join<BF16>, sizeof(BF16), LANES},
};
