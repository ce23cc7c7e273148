// One row (token) of perturb, for the vector width of the including namespace.
#include "vec.h"
#include "philox.h"

typedef D Doubles;  // where D is the width of a row
constexpr long kBlock = 64 * LANES;  // the fp32 sum of a lane ends here, and goes on in double

INLINE F load_part(const float* p, long n) { return load_some(p, n, 0.0f); }
INLINE F load_part(const BF16* p, long n) { return load_some(p, n, BF16{0}); }

// the first n elements, or LANES of them; 0 beyond
template <class T>
INLINE F get(const T* p, long n) {
  return n >= LANES ? load(p) : load_part(p, n);
}
template <class T>
INLINE void put(T* p, F v, long n) {
  if (n >= LANES) store(p, v);
  else store_some(p, v, n);
}

INLINE F size_of(F x) { return (F)((I)x & 0x7fffffff); }
INLINE F only(I chosen, F x) { return (F)(chosen & (I)x); }  // else 0
INLINE F with_sign(F size, F of) { return (F)((U)size | ((U)of & 0x80000000u)); }

// --- l2 -----------------------------------------------------------------------------------------------
template <class T>
INLINE void block_sums(const float* x, const T* g, long n, F x_scale, F g_scale, PerturbSums& s) {
  F gg[4] = {}, dg[4] = {}, dd[4] = {};
  long i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    for (int k = 0; k < 4; k++) {
      const F a = load(x + i + k * LANES) * x_scale, b = load(g + i + k * LANES) * g_scale;
      gg[k] += b * b;
      dg[k] += a * b;
      dd[k] += a * a;
    }
  }
  for (; i < n; i += LANES) {
    const F a = get(x + i, n - i) * x_scale, b = get(g + i, n - i) * g_scale;
    gg[0] += b * b;
    dg[0] += a * b;
    dd[0] += a * a;
  }
  s.gg += total((gg[0] + gg[1]) + (gg[2] + gg[3]));
  s.dg += total((dg[0] + dg[1]) + (dg[2] + dg[3]));
  s.dd += total((dd[0] + dd[1]) + (dd[2] + dd[3]));
}

template <class T>
INLINE PerturbSums row_sums(const float* x, const T* g, int64_t D, float x_scale, float g_scale) {
  PerturbSums s = {0, 0, 0, true};
  for (int64_t i = 0; i < D; i += kBlock) {
    block_sums(x + i, g + i, D - i < kBlock ? D - i : kBlock, splat(x_scale), splat(g_scale), s);
  }
  return s;
}

INLINE bool fits(double sum) { return sum < __builtin_inf(); }  // neither infinite nor NaN

// |g|^2, <delta, g>, |delta|^2; once more, scaled, where squares leave fp32's range.  A gradient that is not finite counts as 0.
template <class T>
void sums(const float* x, const void* grad, int64_t D, PerturbSums& out) {
  const T* g = static_cast<const T*>(grad);
  out = row_sums(x, g, D, 1, 1);
  if (fits(out.gg) && fits(out.dd)) return;
  const float gs = fits(out.gg) ? 1 : 0x1p-80f, xs = fits(out.dd) ? 1 : 0x1p-80f;
  out = row_sums(x, g, D, xs, gs);
  out.finite = fits(out.gg);
  out.gg = out.finite ? out.gg / ((double)gs * gs) : 0;
  out.dg = out.finite ? out.dg / ((double)gs * xs) : 0;
  out.dd /= (double)xs * xs;
}

// x = (x + g scale a) factor
template <class T>
void move(float* x, const void* grad, int64_t D, const PerturbMove& m) {
  const T* g = static_cast<const T*>(grad);
  const F scale = splat(m.scale), a = splat(m.a), factor = splat(m.factor);
  int64_t i = 0;
  for (; i + 4 * LANES <= D; i += 4 * LANES) {
    for (int k = 0; k < 4; k++) {
      const int64_t at = i + k * LANES;
      store(x + at, (load(x + at) + load(g + at) * scale * a) * factor);
    }
  }
  for (; i < D; i += LANES) put(x + i, (get(x + i, D - i) + get(g + i, D - i) * scale * a) * factor, D - i);
}

void scale(float* x, int64_t D, float by) {
  for (int64_t i = 0; i < D; i += LANES) put(x + i, get(x + i, D - i) * by, D - i);
}

// --- linf, l1 -----------------------------------------------------------------------------------------
// the largest |g|; -1 where the gradient is not finite
template <class T>
float greatest(const void* grad, int64_t D) {
  const T* g = static_cast<const T*>(grad);
  F m = {};
  I bad = {};
  for (int64_t i = 0; i < D; i += LANES) {
    const F x = size_of(get(g + i, D - i));
    bad |= ~(x < __builtin_inff());
    m = larger(x, m);
  }
  for (int i = 0; i < LANES; i++) {
    if (bad[i]) return -1;
  }
  return largest(m);
}

template <class T>
double count(const void* grad, int64_t D, float top) {
  const T* g = static_cast<const T*>(grad);
  double n = 0;
  for (int64_t i = 0; i < D; i += kBlock) {
    F found = {};
    for (int64_t k = i; k < D && k < i + kBlock; k += LANES) found += only(size_of(get(g + k, D - k)) == top, splat(1));
    n += total(found);
  }
  return n;
}

// x += share sign g where |g| is `top`
template <class T>
void raise(float* x, const void* grad, int64_t D, float top, float share) {
  const T* g = static_cast<const T*>(grad);
  for (int64_t i = 0; i < D; i += LANES) {
    const F b = get(g + i, D - i);
    put(x + i, get(x + i, D - i) + only(size_of(b) == top, with_sign(splat(share), b)), D - i);
  }
}

// x = x + step sign g within +- radius
template <class T>
void clamp(float* x, const void* grad, int64_t D, float step, float radius) {
  const T* g = static_cast<const T*>(grad);
  for (int64_t i = 0; i < D; i += LANES) {
    const F b = get(g + i, D - i);
    F y = get(x + i, D - i) + only(b != 0.0f, with_sign(splat(1), b)) * step;
    y = y > radius ? splat(radius) : y;
    put(x + i, y < -radius ? splat(-radius) : y, D - i);
  }
}

// The threshold comes in two parts: |x| - threshold keeps its digits where the two are close.
INLINE F over(F x, float high, float low) {
  const F rest = (size_of(x) - high) - low;
  return only(rest > 0.0f, rest);
}

// The sum of what is over the threshold, and of how many.  EXACT sums in double: a ball of many numbers that are nearly equal
// shares what is lost here among few digits.
template <bool EXACT>
void excess(const float* x, int64_t D, float high, float low, double& sum, double& n) {
  sum = n = 0;
  Doubles wide = {};
  for (int64_t i = 0; i < D; i += kBlock) {
    const int64_t end = D - i < kBlock ? D : i + kBlock;
    F s[2] = {}, found[2] = {};
    const auto take = [&](F rest, int k) __attribute__((always_inline)) {
      if (EXACT) wide += __builtin_convertvector(rest, Doubles);
      else s[k] += rest;
      found[k] += only(rest > 0.0f, splat(1));
    };
    int64_t at = i;
    for (; at + 2 * LANES <= end; at += 2 * LANES) {
      take(over(load(x + at), high, low), 0);
      take(over(load(x + at + LANES), high, low), 1);
    }
    for (; at < end; at += LANES) take(over(get(x + at, end - at), high, low), 0);
    sum += total(s[0] + s[1]);
    n += total(found[0] + found[1]);
  }
  for (int i = 0; i < LANES; i++) sum += wide[i];
}

void shrink(float* x, int64_t D, float high, float low) {
  for (int64_t i = 0; i < D; i += LANES) {
    const F y = get(x + i, D - i);
    put(x + i, with_sign(over(y, high, low), y), D - i);
  }
}

// --- embeds + delta -----------------------------------------------------------------------------------
template <class From, class To>
void add(void* out_row, const void* embeds, const float* x, int64_t D) {
  To* out = static_cast<To*>(out_row);
  const From* e = static_cast<const From*>(embeds);
  for (int64_t i = 0; i < D; i += LANES) put(out + i, get(e + i, D - i) + get(x + i, D - i), D - i);
}

// --- the start ----------------------------------------------------------------------------------------
// Numbers `first` to `first + n` of the stream, from (-1, 1) scaled by `edge`: double from the word on, as in the reference.
void start(float* out, int64_t first, int64_t n, unsigned k0, unsigned k1, double edge) {
  for (int64_t at = first & ~int64_t{3}; at < first + n; at += 4 * LANES) {
    U low = {}, high = {};
    for (int i = 0; i < LANES; i++) {
      const unsigned long long c = (unsigned long long)at / 4 + i;
      low[i] = (unsigned)c;
      high[i] = (unsigned)(c >> 32);
    }
    const Words<U> words = philox(low, high, U{}, U{} + 0x70657274u, k0, k1);
    float numbers[4 * LANES];
    for (int j = 0; j < 4; j++) {
      const Doubles half = __builtin_convertvector((I)(words.w[j] ^ 0x80000000u), Doubles);  // x - 2^31
      const F y = __builtin_convertvector((half * 2.0 + 1.0) * (edge * 0x1p-32), F);
      for (int i = 0; i < LANES; i++) numbers[4 * i + j] = y[i];
    }
    const int64_t skip = at < first ? first - at : 0, end = first + n - at < 4 * LANES ? first + n - at : 4 * LANES;
    __builtin_memcpy(out + (at + skip - first), numbers + skip, (end - skip) * sizeof(float));
  }
}

constexpr PerturbPlain kPlain = {
    scale, {excess<false>, excess<true>}, shrink, start, {{add<float, float>, add<float, BF16>}, {add<BF16, float>, add<BF16, BF16>}}};
constexpr PerturbRows kRows[2] = {
    {sums<float>, move<float>, greatest<float>, count<float>, raise<float>, clamp<float>, sizeof(float)},
    {sums<BF16>, move<BF16>, greatest<BF16>, count<BF16>, raise<BF16>, clamp<BF16>, sizeof(BF16)},
};
