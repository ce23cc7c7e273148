// Vectors of WIDE doubles, as many bytes as LANES floats: for sums that must keep the digits of 1000 +- 1e-3.  Beside vec.h,
// under the same rules.  Where fewer than WIDE elements are left, the missing ones are NaN, which is what "not scored" is too.

constexpr long WIDE = LANES / 2;
typedef double W __attribute__((vector_size(4 * LANES)));
typedef long L __attribute__((vector_size(4 * LANES)));  // what comparing two W gives
typedef unsigned long UL __attribute__((vector_size(4 * LANES)));
typedef float N __attribute__((vector_size(2 * LANES)));

INLINE W splat_wide(double x) { return x - W{}; }
INLINE L places() {
  L at;
  for (long i = 0; i < WIDE; i++) at[i] = i;
  return at;
}

// --- memory -------------------------------------------------------------------------------------------
INLINE W load_wide(const double* p) {
  W v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE W load_wide(const float* p) {
  N v;
  __builtin_memcpy(&v, p, sizeof v);
#if LANES == 8 && !defined(__clang__)
  return __builtin_ia32_cvtps2pd256(v);  // of __builtin_convertvector GCC makes two conversions and a merge
#else
  return __builtin_convertvector(v, W);
#endif
}
INLINE void store_wide(double* p, W v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE void store_wide(float* p, W v) {
  const N n = __builtin_convertvector(v, N);
  __builtin_memcpy(p, &n, sizeof n);
}

// the first n < WIDE elements, then NaN; `room` elements may be read
template <class T>
INLINE W load_wide_some(const T* p, long n, long room) {
  if (room >= WIDE) return places() < n ? load_wide(p) : splat_wide(__builtin_nan(""));
  T part[WIDE];
  for (long i = 0; i < WIDE; i++) part[i] = i < n ? p[i] : (T)__builtin_nanf("");
  return load_wide(part);
}
// the first n < WIDE elements; the rest of `room` may be written over
template <class T>
INLINE void store_wide_some(T* p, W v, long n, long room) {
  if (room >= WIDE) return store_wide(p, v);
  T part[WIDE];
  store_wide(part, v);
  for (long i = 0; i < WIDE; i++) {
    if (i < n) p[i] = part[i];
  }
}

// --- arithmetic ---------------------------------------------------------------------------------------
template <long STEP>
INLINE W swapped(W v) {  // lane i and lane i ^ STEP change places
  W out = v;
  for (long i = 0; i < WIDE; i++) out[i] = v[i ^ STEP];
  return out;
}
template <long STEP = WIDE / 2>
INLINE double total(W v) {
  if constexpr (STEP == 0) return v[0];
  else return total<STEP / 2>(v + swapped<STEP>(v));
}
INLINE W smaller(W a, W b) { return a < b ? a : b; }  // b when either is NaN, of the larger too
INLINE W larger(W a, W b) { return a > b ? a : b; }
template <long STEP = WIDE / 2>
INLINE double smallest(W v) {
  if constexpr (STEP == 0) return v[0];
  else return smallest<STEP / 2>(smaller(v, swapped<STEP>(v)));
}
template <long STEP = WIDE / 2>
INLINE double largest(W v) {
  if constexpr (STEP == 0) return v[0];
  else return largest<STEP / 2>(larger(v, swapped<STEP>(v)));
}
INLINE double count(L mask) {
  long n = 0;
  for (long i = 0; i < WIDE; i++) n -= mask[i];
  return (double)n;
}

// exp(x) for x <= 0, within 1 ulp; below -708 it is exp(-708).  x = n ln 2 + r, |r| <= ln 2 / 2;  exp(r) is Taylor's to r^13,
// which leaves 4e-18;  2^n is put together from its exponent bits.  NaN in, NaN out.
INLINE W exp_wide(W x) {
  x = x < splat_wide(-708.0) ? splat_wide(-708.0) : x;
  const W magic = splat_wide(0x1.8p52);  // adding it leaves round(x) in the low bits
  const W shifted = x * 0x1.71547652b82fep0 + magic;
  const W n = shifted - magic;
  const W r = (x - n * 0x1.62e42fefa38p-1) - n * 0x1.ef35793c7673p-45;  // ln 2 in two parts, the first exact in n * part
  W q = splat_wide(1.0 / 6227020800.0);
  q = q * r + 1.0 / 479001600.0;
  q = q * r + 1.0 / 39916800.0;
  q = q * r + 1.0 / 3628800.0;
  q = q * r + 1.0 / 362880.0;
  q = q * r + 1.0 / 40320.0;
  q = q * r + 1.0 / 5040.0;
  q = q * r + 1.0 / 720.0;
  q = q * r + 1.0 / 120.0;
  q = q * r + 1.0 / 24.0;
  q = q * r + 1.0 / 6.0;
  q = q * r + 0.5;
  const W scale = (W)(((UL)shifted << 52) + 0x3ff0000000000000ul);
  return (q * (r * r) + r) * scale + scale;
}
