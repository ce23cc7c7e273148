// Philox4x32-10 (kernels/_philox.py): the four words of a counter under a key, for one counter (unsigned) or LANES of them (U).
// Included after vec.h by a rows file, once per target, hence no `#pragma once` and no other header.

template <class W>
struct Words {
  W w[4];
};

INLINE void multiply(unsigned x, unsigned by, unsigned& high, unsigned& low) {
  const unsigned long long p = (unsigned long long)x * by;
  high = (unsigned)(p >> 32);
  low = (unsigned)p;
}

// 32 x 32 -> 64 bits of every other lane.  GCC does not see that the upper halves are zero and multiplies three times.
typedef unsigned long long P __attribute__((vector_size(4 * LANES)));
INLINE P product(P x, P by) {
#if FASTRL_X86 && !defined(__clang__)
#if LANES == 16
  return (P)__builtin_ia32_pmuludq512_mask((I)x, (I)by, (__attribute__((vector_size(64))) long long){}, 0xff);
#elif LANES == 8
  return (P)__builtin_ia32_pmuludq256((I)x, (I)by);
#else
  return (P)__builtin_ia32_pmuludq128((I)x, (I)by);
#endif
#else
  return (x & 0xffffffffull) * (by & 0xffffffffull);
#endif
}

INLINE void multiply(U x, unsigned by, U& high, U& low) {
  const P m = (P)(U{} + by);
  const P even = product((P)x, m), odd = product((P)x >> 32, m);
  high = (U)((even >> 32) | (odd & ~0xffffffffull));
  low = (U)((even & 0xffffffffull) | (odd << 32));
}

// The same in 64-bit lanes, of which only the low words count: what is above them is left as it comes.
INLINE void multiply(P x, unsigned by, P& high, P& low) {
  low = product(x, P{} + by);
  high = low >> 32;
}

template <class W>
INLINE Words<W> philox(W a, W b, W c, W d, unsigned k0, unsigned k1) {
  for (int i = 0; i < 10; i++) {
    W p_high, p_low, q_high, q_low;
    multiply(a, 0xD2511F53u, p_high, p_low);
    multiply(c, 0xCD9E8D57u, q_high, q_low);
    a = q_high ^ b ^ k0;
    b = q_low;
    c = p_high ^ d ^ k1;
    d = p_low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

// The keys of all rounds as vectors, for many counters under one key: loaded, not broadcast again in every round.
struct RoundKeys {
  P k[10][2];
};
INLINE RoundKeys round_keys(unsigned k0, unsigned k1) {
  RoundKeys keys;
  for (int i = 0; i < 10; i++) {
    keys.k[i][0] = P{} + (k0 + i * 0x9E3779B9u);
    keys.k[i][1] = P{} + (k1 + i * 0xBB67AE85u);
  }
  return keys;
}
INLINE Words<P> philox(P a, P b, P c, P d, const RoundKeys& keys) {
  const P first = P{} + 0xD2511F53u, second = P{} + 0xCD9E8D57u;
  for (int i = 0; i < 10; i++) {
    const P p = product(a, first), q = product(c, second);
    a = (q >> 32) ^ b ^ keys.k[i][0];
    b = q;
    c = (p >> 32) ^ d ^ keys.k[i][1];
    d = p;
  }
  return {{a, b, c, d}};
}
