// The loops of linear for the vector width of the including namespace.
#include "vec.h"

constexpr long kPanel = 2 * LANES;  // rows of x that lie side by side, one a lane

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

// `rows` rows of the weight, `depth` columns of them, as kLinearRows rows of floats kLinearPitch apart; those missing are 0.
template <class T>
void widen(float* out, const void* w_rows, int64_t stride, int64_t rows, int64_t depth) {
  const T* w = static_cast<const T*>(w_rows);
  for (int64_t r = 0; r < kLinearRows; r++, out += kLinearPitch) {
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

// sums (kLinearRows, V LANES) of a block of at least one column: every element is one chain over k = 0, 1, ..., whatever its lane,
// vector or panel, and is then added to the chains of the blocks before.  That is what makes its bits its own.
template <int V>
void tile(float* sums, const float* w, int64_t pitch, const float* x, int64_t depth, bool first, LinearAhead& ahead) {
  F acc[kLinearRows][V] = {};  // in registers, which takes loops that are unrolled
  int64_t k = 0;
  do {
    F in[V];
    FASTRL_UNROLL
    for (int v = 0; v < V; v++) in[v] = load(x + k * kPanel + v * LANES);
    if (k % 8 == 0) {
      for (int i = 0; i < ahead.each; i++) fetch(ahead);
    }
    FASTRL_UNROLL
    for (int r = 0; r < kLinearRows; r++) {
      const F weight = splat(w[r * pitch + k]);
      FASTRL_UNROLL
      for (int v = 0; v < V; v++) acc[r][v] += weight * in[v];
    }
  } while (++k < depth);
  FASTRL_UNROLL
  for (int r = 0; r < kLinearRows; r++) {
    FASTRL_UNROLL
    for (int v = 0; v < V; v++) {
      float* to = sums + r * kPanel + v * LANES;
      store(to, first ? acc[r][v] : load(to) + acc[r][v]);
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

// Rows of `columns` outputs from the panels' sums, bias added, rounded once; or added to what is there (ADD, of floats).  Four by four, a few rows over all the columns: rows of y
// often lie a power of two apart, so that all those of one column would want the same few cache sets.
INLINE Q there(const float* y) { return load4(y); }
INLINE Q there(const BF16*) { return Q{}; }

template <class T, bool ADD = false>
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
      if (rows == 4) {
        for (int i = 0; i < 4; i++) write4(y + i * stride + n, ADD ? there(y + i * stride + n) + r[i] : r[i]);
      } else {
        for (int i = 0; i < rows; i++) write4(y + i * stride + n, ADD ? there(y + i * stride + n) + r[i] : r[i]);
      }
    }
    for (int64_t n = whole; n < columns; n++) {
      for (int64_t i = 0; i < rows; i++) {
        const float sum = from[n * kPanel + i] + bias[n];
        write(y + i * stride + n, ADD ? to_float(y[i * stride + n]) + sum : sum);
      }
    }
  }
}

INLINE void write_lanes(float* p, F v) { store(p, v); }
INLINE void write_lanes(BF16* p, F v) {
  for (long i = 0; i < LANES; i++) write(p + i, v[i]);
}

// The same as rows of M outputs, one for each column of the sums: `y` and `bias` begin at the first lane.
template <class T>
void put_turned(void* y_rows, int64_t stride, const float* sums, const float* bias, int64_t M, int64_t columns) {
  T* y = static_cast<T*>(y_rows);
  for (int64_t n = 0; n < columns; n++, y += stride, sums += kPanel) {
    const float* from = sums;
    for (int64_t m = 0; m < M; m += kPanel, from += kPanel * kLinearColumns) {
      int64_t i = 0, lanes = M - m < kPanel ? M - m : kPanel;
      for (; i + LANES <= lanes; i += LANES) write_lanes(y + m + i, load(from + i) + load(bias + m + i));
      for (; i < lanes; i++) write(y + m + i, from[i] + bias[m + i]);
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

// `count` columns of b (depth, count), turned into kLinearRows rows kLinearPitch apart; those missing are 0.
void flip(float* out, const float* b, int64_t stride, int64_t depth, int64_t count) {
  int64_t t = 0;
  for (; count == kLinearRows && t + 4 <= depth; t += 4) {
    Q rows[4], columns[4];
    for (int j = 0; j < 4; j++) rows[j] = load4(b + (t + j) * stride);
    turn(rows, columns);
    for (int j = 0; j < 4; j++) store4(out + j * kLinearPitch + t, columns[j]);
    for (int r = 4; r < kLinearRows; r++) {
      for (int j = 0; j < 4; j++) out[r * kLinearPitch + t + j] = b[(t + j) * stride + r];
    }
  }
  for (; t < depth; t++) {
    for (int r = 0; r < kLinearRows; r++) out[r * kLinearPitch + t] = r < count ? b[t * stride + r] : 0.0f;
  }
}

constexpr LinearRows kLinear = {
    {pack<float>, pack<BF16>}, {widen<float>, widen<BF16>}, {tile<1>, tile<2>}, {put<float>, put<BF16>}, put<float, true>,
    {put_turned<float>, put_turned<BF16>}, columns, flip, LANES,
};
