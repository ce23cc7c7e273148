// The loops of linear for the vector width of the including namespace.
#include "vec.h"

constexpr long kPanel = 2 * LANES;  // rows of x that lie side by side, one a lane

// Panels of kPanel rows of x, K by kPanel each; the rows of the last panel that x lacks are 0.
template <class T>
void pack(float* out, const void* x_rows, int64_t stride, int64_t M, int64_t K) {
  const T* x = static_cast<const T*>(x_rows);
  for (int64_t first = 0; first < M; first += kPanel, out += kPanel * K) {
    const T* from = x + first * stride;
    const int64_t rows = M - first < kPanel ? M - first : kPanel;
    if (rows == kPanel) {
      for (int64_t k = 0; k < K; k++) {
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
void tile(float* sums, const float* w, const float* x, int64_t depth, bool first, LinearAhead& ahead) {
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
      const F weight = splat(w[r * kLinearPitch + k]);
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

template <class T>
void put_some(T* y, int64_t stride, const float* sums, const float* bias, int64_t M, int64_t columns) {
  for (int64_t m = 0; m < M; m++, y += stride) {
    for (int64_t r = 0; r < columns; r++) write(y + r, sums[m + r * kPanel] + bias[r]);
  }
}

typedef float Q __attribute__((vector_size(16)));
typedef float Two __attribute__((vector_size(8)));

INLINE Q sum4(const float* sums, float bias) {
  Q v;
  __builtin_memcpy(&v, sums, sizeof v);
  return v + bias;
}

// Four outputs of kLinearRows columns at a time, turned in registers: written one by one they would cost a sixth of a product
// of 128 columns.
template <class T>
int64_t put_whole(T*, int64_t, const float*, const float*, int64_t) { return 0; }
template <>
int64_t put_whole(float* y, int64_t stride, const float* sums, const float* bias, int64_t M) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4, y += 4 * stride) {
    Q c[kLinearRows];
    for (int r = 0; r < kLinearRows; r++) c[r] = sum4(sums + m + r * kPanel, bias[r]);
    const Q ab = {c[0][0], c[1][0], c[0][1], c[1][1]}, cd = {c[2][0], c[3][0], c[2][1], c[3][1]};
    const Q AB = {c[0][2], c[1][2], c[0][3], c[1][3]}, CD = {c[2][2], c[3][2], c[2][3], c[3][3]};
    const Q four[4] = {{ab[0], ab[1], cd[0], cd[1]}, {ab[2], ab[3], cd[2], cd[3]}, {AB[0], AB[1], CD[0], CD[1]}, {AB[2], AB[3], CD[2], CD[3]}};
    for (int i = 0; i < 4; i++) {
      const Two two = {c[4][i], c[5][i]};
      __builtin_memcpy(y + i * stride, &four[i], sizeof(Q));
      __builtin_memcpy(y + i * stride + 4, &two, sizeof two);
    }
  }
  return m;
}

// Rows of `columns` outputs from the panels' sums, bias added, rounded once.
template <class T>
void put(void* y_rows, int64_t stride, const float* sums, const float* bias, int64_t M, int64_t columns) {
  T* y = static_cast<T*>(y_rows);
  for (int64_t first = 0; first < M; first += kPanel, sums += kPanel * kLinearRows) {
    const int64_t rows = M - first < kPanel ? M - first : kPanel;
    const int64_t done = columns == kLinearRows ? put_whole(y + first * stride, stride, sums, bias, rows) : 0;
    put_some(y + (first + done) * stride, stride, sums + done, bias, rows - done, columns);
  }
}

constexpr LinearRows kLinear = {
    {pack<float>, pack<BF16>}, {widen<float>, widen<BF16>}, {tile<1>, tile<2>}, {put<float>, put<BF16>}, LANES,
};
