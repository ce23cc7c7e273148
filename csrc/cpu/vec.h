// Vectors of LANES floats and what the row kernels do with them.  Included once per target (see foreach_target.h), hence no
// `#pragma once`, no other header, and GNU vector extensions instead of intrinsics: one text for every width.

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int I __attribute__((vector_size(4 * LANES)));
typedef unsigned U __attribute__((vector_size(4 * LANES)));
typedef unsigned short H __attribute__((vector_size(2 * LANES)));
typedef double D __attribute__((vector_size(8 * LANES)));

struct BF16 {
  unsigned short bits;
};

#define INLINE inline __attribute__((always_inline))

constexpr float kLowest = -3.402823466e+38f;  // of float
constexpr float kExpLow = -87.0f;             // below it exp is under the smallest normal float: taken as 0

INLINE F splat(float x) { return x - F{}; }
INLINE F larger(F a, F b) { return a > b ? a : b; }  // b when either is NaN

// --- memory -------------------------------------------------------------------------------------------
INLINE F widen(H h) { return (F)(__builtin_convertvector(h, U) << 16); }

// fp32 -> bf16, to the nearest, ties to even; NaN stays NaN
INLINE H narrow(F x) {
  const U bits = (U)x;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40u, H);
}

INLINE F load(const float* p) {
  F v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE F load(const BF16* p) {
  H h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h);
}
INLINE void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE void store(BF16* p, F v) {
  const H h = narrow(v);
  __builtin_memcpy(p, &h, sizeof h);
}

// the first n < LANES elements, then `pad`
template <class T>
INLINE F load_some(const T* p, long n, T pad) {
  T part[LANES];
  for (int i = 0; i < LANES; i++) part[i] = i < n ? p[i] : pad;
  return load(part);
}
template <class T>
INLINE void store_some(T* p, F v, long n) {
  T part[LANES];
  store(part, v);
  for (int i = 0; i < LANES; i++) {
    if (i < n) p[i] = part[i];
  }
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(BF16 x) {
  const unsigned bits = (unsigned)x.bits << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}
template <class T>
INLINE T minus_infinity();
template <>
INLINE float minus_infinity<float>() { return -__builtin_inff(); }
template <>
INLINE BF16 minus_infinity<BF16>() { return {0xff80}; }

// as it would be read again after a store, and a store of such a value, which has no digits to lose
INLINE F rounded_to(const float*, F x) { return x; }
INLINE F rounded_to(const BF16*, F x) {
  const U bits = (U)x;
  const U up = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (F)((x == x ? up : bits | 0x400000u) & 0xffff0000u);
}
INLINE void store_exact(float* p, F v) { store(p, v); }
INLINE void store_exact(BF16* p, F v) {
  const H h = __builtin_convertvector((U)v >> 16, H);
  __builtin_memcpy(p, &h, sizeof h);
}

// --- arithmetic ---------------------------------------------------------------------------------------
INLINE float largest(F v) {
  float x = v[0];
  for (int i = 1; i < LANES; i++) x = v[i] > x ? v[i] : x;
  return x;
}
INLINE bool any(I mask) {  // whether a comparison holds in any lane
#if FASTRL_X86 && LANES == 16
  return __builtin_ia32_cvtd2mask512(mask) != 0;
#elif FASTRL_X86 && LANES == 8
  return __builtin_ia32_movmskps256((F)mask) != 0;
#elif FASTRL_X86
  return __builtin_ia32_movmskps((F)mask) != 0;
#else
  int some = 0;
  for (int i = 0; i < LANES; i++) some |= mask[i];
  return some != 0;
#endif
}
INLINE double total(F v) {
  const D d = __builtin_convertvector(v, D);
  double x = d[0];
  for (int i = 1; i < LANES; i++) x += d[i];
  return x;
}

// exp(x) for x in [kExpLow, 88], within 1 ulp.  x = n ln 2 + r, |r| <= ln 2 / 2;  exp(r) = 1 + r + r^2 q(r), q minimax to
// 3e-9;  2^n is put together from its exponent bits.  NaN in, NaN out.
struct Reduced {
  F n, r, tail, scale;  // tail = r^2 q(r), scale = 2^n
};
INLINE Reduced reduce_exp(F x) {
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const F shifted = x * 1.442695041f + magic;
  const F n = shifted - magic;
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in n * part
  F q = splat(0x1.6a23dp-10f);
  q = q * r + 0x1.123a2p-7f;
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  return {n, r, q * (r * r), (F)(((U)shifted << 23) + 0x3f800000u)};
}
INLINE F exp_of(const Reduced& e) { return (e.tail + e.r) * e.scale + e.scale; }
INLINE F exp_in_range(F x) { return exp_of(reduce_exp(x)); }

// exp(x) - 1 - x, which near 0 is x^2 / 2: the tail itself, and with n != 0 what 2^n and ln 2 leave of it.  Digits are not lost.
INLINE F exp_rest(const Reduced& e) {
  const F above = e.scale - 1.0f;
  return e.tail * e.scale + (above * e.r + ((above - e.n * 0.693359375f) + e.n * 2.12194440e-4f));
}
