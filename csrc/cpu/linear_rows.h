// The loops of linear for the vector width of the including namespace.
#include "vec.h"

constexpr long kPanel = 2 * LANES;  // rows of x that lie side by side, one a lane
// Rows of a tile: with two vectors of x, 24 sums of AVX-512's 32 registers, or 12 of 16.
constexpr int kRows = LANES == 16 ? 12 : 6;

typedef float Q __attribute__((vector_size(16)));

INLINE Q load4(const float* p) {
  Q v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store4(float* p, Q v) { __builtin_memcpy(p, &v, sizeof v); }

// 4 x 4 elements, turned
INLINE void turn(const Q* rows, Q* columns) {
  const Q &a = rows[0], &b = rows[1], &c = rows[2], &d = rows[3];
  const Q ab = {a[0], b[0], a[1], b[1]}, cd = {c[0], d[0], c[1], d[1]}, AB = {a[2], b[2], a[3], b[3]}, CD = {c[2], d[2], c[3], d[3]};
  columns[0] = Q{ab[0], ab[1], cd[0], cd[1]}, columns[1] = Q{ab[2], ab[3], cd[2], cd[3]};
  columns[2] = Q{AB[0], AB[1], CD[0], CD[1]}, columns[3] = Q{AB[2], AB[3], CD[2], CD[3]};
}

// As much of a whole panel as can be turned in registers; the columns done.
template <class T>
int64_t pack_whole(float*, const T*, int64_t, int64_t) { return 0; }
template <>
int64_t pack_whole(float* out, const float* x, int64_t stride, int64_t K) {
  int64_t k = 0;
  for (; k + 4 <= K; k += 4) {
    for (long i = 0; i < kPanel; i += 4) {
      Q rows[4], columns[4];
      for (int j = 0; j < 4; j++) rows[j] = load4(x + (i + j) * stride + k);
      turn(rows, columns);
      for (int j = 0; j < 4; j++) store4(out + (k + j) * kPanel + i, columns[j]);
    }
  }
  return k;
}

// Panels of kPanel rows of x, K by kPanel each; the rows of the last panel that x lacks are 0.
template <class T>
void pack(float* out, const void* x_rows, int64_t stride, int64_t M, int64_t K) {
  const T* x = static_cast<const T*>(x_rows);
  for (int64_t first = 0; first < M; first += kPanel, out += kPanel * K) {
    const T* from = x + first * stride;
    const int64_t rows = M - first < kPanel ? M - first : kPanel;
    if (rows == kPanel) {
      for (int64_t k = pack_whole(out, from, stride, K); k < K; k++) {
        for (long i = 0; i < kPanel; i++) out[k * kPanel + i] = to_float(from[i * stride + k]);
      }
    } else {
      for (int64_t k = 0; k < K; k++) {
        for (long i = 0; i < kPanel; i++) out[k * kPanel + i] = i < rows ? to_float(from[i * stride + k]) : 0.0f;
      }
    }
  }
}

// `rows` rows of the weight, `depth` columns of them, as kRows rows of floats kLinearPitch apart; those missing are 0.
template <class T>
void widen(float* out, const void* w_rows, int64_t stride, int64_t rows, int64_t depth) {
  const T* w = static_cast<const T*>(w_rows);
  for (int64_t r = 0; r < kRows; r++, out += kLinearPitch) {
    int64_t k = 0;
    if (r < rows) {
      for (; k + LANES <= depth; k += LANES) store(out + k, load(w + r * stride + k));
      for (; k < depth; k++) out[k] = to_float(w[r * stride + k]);
    }
    for (; k < depth; k++) out[k] = 0;
  }
}

// What each tile asks the memory for while it multiplies: the next block of the weight, `bytes` of each of its rows.
INLINE void fetch(LinearAhead& ahead) {
  __builtin_prefetch(ahead.at + ahead.offset);  // never faults
  ahead.offset += 64;
  if (ahead.offset >= ahead.bytes) {
    ahead.offset = 0;
    if (ahead.rows > 0) {
      ahead.rows--;
      ahead.at += ahead.stride;
    }
  }
}

#ifdef __clang__
#define FASTRL_UNROLL _Pragma("unroll")
#else
#define FASTRL_UNROLL _Pragma("GCC unroll 16")
#endif

// A vector of one row of outputs: the sums of one row of w, bias added, rounded once; or added to what is there.
template <class T>
INLINE void finish(const LinearOut& out, int64_t row, int64_t lane, F sum) {
  const int64_t left = out.lanes - lane;
  if (left <= 0) return;
  T* to = static_cast<T*>(out.at) + row * out.stride + lane;
  if (left >= LANES) {
    if (out.bias) sum += load(out.bias + lane);
    if (out.add) sum += load(to);
    store(to, sum);
  } else {
    if (out.bias) sum += load_some(out.bias + lane, left, 0.0f);
    if (out.add) sum += load_some(to, left, T{});
    store_some(to, sum, left);
  }
}

// sums (R, V LANES) of a block of at least one column: every element is one chain over k = 0, 1, ..., whatever its lane,
// vector or panel, and is then added to the chains of the blocks before.  That is what makes its bits its own.
//
// `out`, if given, takes what the sums come to, a row of outputs for each row of w, and the sums are left.
//
// Three rows share a pointer: twelve of them would not fit into the registers, and GCC fetches what it spills through a port that
// the products need.  The empty asm keeps it from making a pointer for each again.
template <int V, int R, class T>
void tile(float* sums, const float* w, int64_t pitch, const float* x, int64_t x_pitch, int64_t depth, bool first, LinearAhead& ahead,
          const LinearOut* out) {
  constexpr int kShare = 3, kPointers = R / kShare;
  static_assert(R % kShare == 0);
  F acc[R][V] = {};  // in registers, which takes loops that are unrolled
  const char* at[kPointers];
  int64_t step = pitch * (int64_t)sizeof(float);
  FASTRL_UNROLL
  for (int p = 0; p < kPointers; p++) at[p] = (const char*)(w + p * kShare * pitch);

  int64_t k = 0;
  do {
    F in[V];
    FASTRL_UNROLL
    for (int v = 0; v < V; v++) in[v] = load(x + v * LANES);
    x += x_pitch;
    if (k % 8 == 0) {
      for (int i = 0; i < ahead.each; i++) fetch(ahead);
    }
    asm volatile("" : "+r"(step));
    FASTRL_UNROLL
    for (int p = 0; p < kPointers; p++) {
      asm volatile("" : "+r"(at[p]));
      FASTRL_UNROLL
      for (int r = 0; r < kShare; r++) {
        const F weight = splat(*(const float*)(at[p] + r * step));
        FASTRL_UNROLL
        for (int v = 0; v < V; v++) acc[p * kShare + r][v] += weight * in[v];
      }
      at[p] += sizeof(float);
    }
  } while (++k < depth);

  FASTRL_UNROLL
  for (int r = 0; r < R; r++) {
    FASTRL_UNROLL
    for (int v = 0; v < V; v++) {
      float* to = sums + r * kPanel + v * LANES;
      const F sum = first ? acc[r][v] : load(to) + acc[r][v];
      if (!out) store(to, sum);
      else if (r < out->rows) finish<T>(*out, r, v * LANES, sum);
    }
  }
}
#undef FASTRL_UNROLL

INLINE void write(float* p, float x) { *p = x; }
INLINE void write(BF16* p, float x) {
  unsigned bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  p->bits = (unsigned short)(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u);
}
INLINE void write4(float* p, Q v) { store4(p, v); }
INLINE void write4(BF16* p, Q v) {
  for (int i = 0; i < 4; i++) write(p + i, v[i]);
}

// Rows of `columns` outputs from the panels' sums, bias added, rounded once.  Four by four, a few rows over all the columns: rows of y
// often lie a power of two apart, so that all those of one column would want the same few cache sets.
template <class T>
void put(void* y_rows, int64_t stride, const float* sums, const float* bias, int64_t M, int64_t columns) {
  T* y = static_cast<T*>(y_rows);
  const int64_t whole = columns - columns % 4;
  for (int64_t m = 0; m < M; m += 4, y += 4 * stride) {
    const float* from = sums + m / kPanel * kPanel * kLinearColumns + m % kPanel;
    const int64_t rows = M - m < 4 ? M - m : 4;
    for (int64_t n = 0; n < whole; n += 4) {
      Q c[4], r[4];
      for (int i = 0; i < 4; i++) c[i] = load4(from + (n + i) * kPanel) + bias[n + i];
      turn(c, r);
      for (int i = 0; i < rows; i++) write4(y + i * stride + n, r[i]);
    }
    for (int64_t n = whole; n < columns; n++) {
      for (int64_t i = 0; i < rows; i++) write(y + i * stride + n, from[n * kPanel + i] + bias[n]);
    }
  }
}

// Panels of kPanel columns of a (depth, M), each depth by kPanel; the columns of the last panel that a lacks are 0.
void columns(float* out, const float* a, int64_t stride, int64_t depth, int64_t M) {
  for (int64_t m = 0; m < M; m += kPanel, a += kPanel) {
    for (int64_t t = 0; t < depth; t++, out += kPanel) {
      if (M - m >= kPanel) {
        for (long i = 0; i < kPanel; i += LANES) store(out + i, load(a + t * stride + i));
      } else {
        for (long i = 0; i < kPanel; i++) out[i] = i < M - m ? a[t * stride + i] : 0.0f;
      }
    }
  }
}

// `count` columns of b (depth, count), turned into kRows rows kLinearPitch apart; those missing are 0.
void flip(float* out, const float* b, int64_t stride, int64_t depth, int64_t count) {
  int64_t t = 0;
  for (; count == kRows && t + 4 <= depth; t += 4) {
    for (int r = 0; r + 4 <= kRows; r += 4) {
      Q rows[4], columns[4];
      for (int j = 0; j < 4; j++) rows[j] = load4(b + (t + j) * stride + r);
      turn(rows, columns);
      for (int j = 0; j < 4; j++) store4(out + (r + j) * kLinearPitch + t, columns[j]);
    }
    for (int r = kRows / 4 * 4; r < kRows; r++) {
      for (int j = 0; j < 4; j++) out[r * kLinearPitch + t + j] = b[(t + j) * stride + r];
    }
  }
  for (; t < depth; t++) {
    for (int r = 0; r < kRows; r++) out[r * kLinearPitch + t] = r < count ? b[t * stride + r] : 0.0f;
  }
}

template <class T>
constexpr LinearTiles kTiles = {{{tile<1, kRows / 2, T>, tile<2, kRows / 2, T>}, {tile<1, kRows, T>, tile<2, kRows, T>}}};

constexpr LinearRows kLinear = {
    {pack<float>, pack<BF16>}, {widen<float>, widen<BF16>}, {kTiles<float>, kTiles<BF16>}, {put<float>, put<BF16>}, columns, flip,
    LANES, kRows,
};
