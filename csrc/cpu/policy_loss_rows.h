// One chunk of policy_loss: value, both derivatives and the sums of the metrics, for the vector width of the including namespace.
//
// Tokens go through in blocks that stay in L1, one stage after the other: the columns, the surrogate, the KL, the sums.  So a row of
// the tables is one small function here, found by its number, and rows do not multiply.
#include "vec.h"

constexpr int kVectors = 16, kBlock = kVectors * LANES;
constexpr float kBound = 20;  // of d and e before any exponential

typedef float Column[kBlock] __attribute__((aligned(64)));

// A block as the stages see it.  A pointer leads to the caller's own vector, or to a copy in which masked-out tokens and those
// beyond the end hold 0; 0 means absent.
struct Block {
  long n;  // tokens: kBlock, but for the last
  const float *logp, *old_logp, *advantage, *weight, *ref_logp, *correction, *entropy, *mean, *live;
  Column d, r;                   // as the surrogate sees them
  Column token_d, token_r, old;  // per token: unbounded, exp of the bounded, and exp(d) - 1 - d
  Column e, x, k3;               // to the reference: e unbounded, x = exp(-e) - 1, k3 = x + e
  Column value, slope, low, high, cap, kl, kl_slope;
  Column copies[9];
};

INLINE F within(F x, F low, F high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}
// x within +-kBound; NaN for an infinity, as for NaN
INLINE F bounded(F x) { return within(x, splat(-kBound), splat(kBound)) + (x - x); }
INLINE F absolute(F x) { return (F)((I)x & 0x7fffffff); }
INLINE F flag(I condition) { return condition ? splat(1) : F{}; }

// --- surrogates ---------------------------------------------------------------------------------------
struct Token {
  F d, r, logp, advantage;
};
struct Term {
  F value, slope, low = F{}, high = F{}, cap = F{};  // and whether a bound holds the token: 1 or 0
};

INLINE Term nll(const Token& t, const double*) { return {t.logp, splat(1)}; }
INLINE Term pg(const Token& t, const double*) { return {t.advantage * t.logp, t.advantage}; }
INLINE Term ratio(const Token& t, const double*) {
  const F value = t.r * t.advantage;
  return {value, value};
}
INLINE Term clip(const Token& t, const double* p) {  // low, high, cap
  const F bottom = splat((float)(1 - p[0])), top = splat((float)(1 + p[1])), cap = splat((float)p[2]), a = t.advantage;
  const F free = (t.r > cap ? cap : t.r) * a, held = within(t.r, bottom, top) * a;
  const I worse = a < 0.0f, better = a > 0.0f;
  const I low = worse & (t.r < bottom), high = better & (t.r > top), capped = worse & (t.r > cap);
  return {free < held ? free : held, (low | high | capped) ? F{} : t.r * a, flag(low), flag(high), flag(capped)};
}
INLINE Term cispo(const Token& t, const double* p) {  // low, high
  const F low = splat((float)p[0]), high = splat((float)p[1]);
  const F weight = within(t.r, low, high) * t.advantage;
  return {weight * t.logp, weight, flag(t.r < low), flag(t.r > high)};
}
INLINE Term sapo(const Token& t, const double* p) {  // pos, neg
  const F tau = t.advantage > 0.0f ? splat((float)p[0]) : splat((float)p[1]);
  const F y = tau * (t.r - 1.0f), size = absolute(y);
  const F low = exp_in_range(size > 87.0f ? splat(-87) : -size);  // exp(-|y|)
  const F s = (y < 0.0f ? low : splat(1)) / (1.0f + low);         // sigmoid(y)
  return {4.0f / tau * s * t.advantage, 4.0f * (low / ((1.0f + low) * (1.0f + low))) * t.r * t.advantage};
}
INLINE Term dro(const Token& t, const double* p) {  // beta
  const F beta = splat((float)p[0]);
  return {t.advantage * t.logp - 0.5f * beta * t.d * t.d, t.advantage - beta * t.d};
}
INLINE Term luffy_off(const Token& t, const double* p) {  // gamma
  const F gamma = splat((float)p[0]), prob = exp_in_range(within(t.logp, splat(-87), splat(88))), sum = prob + gamma;
  return {t.advantage * prob / sum, t.advantage * gamma * prob / (sum * sum)};
}

template <Term (*RULE)(const Token&, const double*)>
void surrogate(Block& b, const double* params) {
  for (int i = 0; i < kBlock; i += LANES) {
    const Term x = RULE({load(b.d + i), load(b.r + i), load(b.logp + i), load(b.advantage + i)}, params);
    store(b.value + i, x.value), store(b.slope + i, x.slope);
    store(b.low + i, x.low), store(b.high + i, x.high), store(b.cap + i, x.cap);
  }
}
// by cpu_id, in the order of the table in kernels/_surrogates.py
constexpr void (*kSurrogates[])(Block&, const double*) = {
    surrogate<nll>, surrogate<pg>, surrogate<ratio>, surrogate<clip>, surrogate<cispo>, surrogate<sapo>, surrogate<dro>, surrogate<luffy_off>,
};
static_assert(sizeof kSurrogates == kPolicySurrogates * sizeof *kSurrogates, "kPolicySurrogates counts them");

// --- KL to the reference ------------------------------------------------------------------------------
struct Drift {
  F e, x, k3, r;  // r of the token, whatever the surrogate's ratio
};
struct Kl {
  F value, slope;
};

INLINE Kl k1(const Drift& t) { return {t.e, splat(1)}; }
INLINE Kl k2(const Drift& t) { return {0.5f * t.e * t.e, t.e}; }
INLINE Kl k3(const Drift& t) { return {t.k3, -t.x}; }
INLINE Kl k3_plus(const Drift& t) { return {t.k3, t.e}; }
INLINE Kl k1_is(const Drift& t) { return {t.r * t.e, t.r * (1.0f + t.e)}; }
INLINE Kl k3_is(const Drift& t) { return {t.r * t.k3, t.r * t.e}; }
INLINE Kl size_of(const Drift& t) { return {absolute(t.e), flag(t.e > 0.0f) - flag(t.e < 0.0f) + (t.e - t.e)}; }

template <Kl (*RULE)(const Drift&)>
void kl(Block& b) {
  for (int i = 0; i < kBlock; i += LANES) {
    const Kl x = RULE({load(b.e + i), load(b.x + i), load(b.k3 + i), load(b.token_r + i)});
    store(b.kl + i, x.value), store(b.kl_slope + i, x.slope);
  }
}
constexpr void (*kKls[])(Block&) = {kl<k1>, kl<k2>, kl<k3>, kl<k3_plus>, kl<k1_is>, kl<k3_is>, kl<size_of>};  // as the table KLS
static_assert(sizeof kKls == kPolicyKls * sizeof *kKls, "kPolicyKls counts them");

// --- stages -------------------------------------------------------------------------------------------
typedef unsigned char Bytes __attribute__((vector_size(LANES)));

INLINE I live_lanes(const unsigned char* mask, long n) {  // all ones where the token exists and the mask, if any, says so
  unsigned char part[LANES];
  for (int i = 0; i < LANES; i++) part[i] = i < n;
  if (mask && n >= LANES) {
    __builtin_memcpy(part, mask, LANES);
  } else if (mask) {
    for (long i = 0; i < n; i++) part[i] = mask[i];
  }
  Bytes bytes;
  __builtin_memcpy(&bytes, part, LANES);
  return __builtin_convertvector(bytes, I) != 0;
}

INLINE const float* selected(const float* from, float* to, long n, const float* live) {
  if (!from) return nullptr;
  for (int i = 0; i < kBlock; i += LANES) {
    const F x = i + LANES <= n ? load(from + i) : i < n ? load_some(from + i, n - i, 0.0f) : F{};
    store(to + i, load(live + i) > 0.0f ? x : F{});
  }
  return to;
}

INLINE void columns(Block& b, const PolicyColumns& c, int64_t at, const float* ones) {
  const float* from[] = {c.logp, c.old_logp, c.advantage, c.weight, c.ref_logp, c.correction, c.entropy, c.mean};
  const float** to[] = {&b.logp, &b.old_logp, &b.advantage, &b.weight, &b.ref_logp, &b.correction, &b.entropy, &b.mean};
  const bool whole = b.n == kBlock && !c.mask;
  b.live = whole ? ones : b.copies[8];
  for (int i = 0; !whole && i < kBlock; i += LANES) {
    store(b.copies[8] + i, flag(live_lanes(c.mask && i < b.n ? c.mask + at + i : nullptr, b.n - i)));
  }
  for (int k = 0; k < 8; k++) {
    const float* x = from[k] ? from[k] + at : nullptr;
    *to[k] = whole ? x : selected(x, b.copies[k], b.n, b.live);
  }
}

INLINE void drifts(Block& b) {
  for (int i = 0; i < kBlock; i += LANES) {
    const F token_d = load(b.logp + i) - load(b.old_logp + i), near = bounded(token_d);
    const Reduced x = reduce_exp(near);
    const F r = exp_of(x);
    store(b.token_d + i, token_d), store(b.token_r + i, r);
    store(b.old + i, exp_rest(x) + (near - token_d));  // the second term is 0 but beyond the bound
    store(b.d + i, near), store(b.r + i, r);
  }
  for (int i = 0; b.mean && i < kBlock; i += LANES) {
    const F d = bounded(load(b.mean + i));
    store(b.d + i, d), store(b.r + i, exp_in_range(d));
  }
  for (int i = 0; b.ref_logp && i < kBlock; i += LANES) {
    const F e = load(b.logp + i) - load(b.ref_logp + i), near = bounded(-e);
    const F rest = exp_rest(reduce_exp(near));
    store(b.e + i, e), store(b.x + i, rest + near), store(b.k3 + i, rest + (near + e));
  }
}

// The sums of a block are fp32 in each lane; across blocks they are double.
INLINE void add(D& to, F x) { to += __builtin_convertvector(x, D); }

INLINE void losses(const Block& b, const PolicyOptions& o, float* dlogp, float* dentropy, D* sums) {
  F loss_sum = {}, low = {}, high = {}, cap = {}, h_sum = {};
  for (int i = 0; i < kBlock; i += LANES) {
    F value = -load(b.value + i), slope = -load(b.slope + i);
    const F weight = load(b.weight + i), live = load(b.live + i);
    if (b.correction) {
      const F k = load(b.correction + i);
      value *= k, slope *= k;
    }
    if (o.kl >= 0) {
      const F c = splat((float)o.kl_coef);
      value += c * load(b.kl + i), slope += c * load(b.kl_slope + i);
    }
    if (b.entropy) {
      const F h = load(b.entropy + i), c = splat((float)o.entropy_coef);
      if (o.entropy_coef != 0) value -= c * h;
      h_sum += h;
      const F g = weight * -c;
      if (i + LANES <= b.n) store(dentropy + i, g);
      else if (i < b.n) store_some(dentropy + i, g, b.n - i);
    }
    slope *= weight;
    if (i + LANES <= b.n) store(dlogp + i, slope);
    else if (i < b.n) store_some(dlogp + i, slope, b.n - i);
    loss_sum += value * weight;
    low += load(b.low + i) * live, high += load(b.high + i) * live, cap += load(b.cap + i) * live;
  }
  add(sums[kClipLow], low), add(sums[kClipHigh], high), add(sums[kClipCap], cap), add(sums[kEntropy], h_sum), add(sums[kLoss], loss_sum);
}

INLINE void measures(const Block& b, D* sums, F& top) {
  F count = {}, r_sum = {}, d_sum = {}, d_sq = {}, old = {}, advantage = {}, w_sum = {}, w_sq = {};
  for (int i = 0; i < kBlock; i += LANES) {
    const F live = load(b.live + i), d = load(b.token_d + i), r = load(b.r + i) * live;  // finite where it is not live
    const F w = b.correction ? r * load(b.correction + i) : r;
    count += live, r_sum += r, d_sum -= d, d_sq += d * d, old += load(b.old + i);
    advantage += load(b.advantage + i), w_sum += w, w_sq += w * w;
    top = larger(r, top);
  }
  add(sums[kTokens], count), add(sums[kRatio], r_sum), add(sums[kOldK1], d_sum), add(sums[kSquare], 0.5f * d_sq), add(sums[kOldK3], old);
  add(sums[kAdvantage], advantage), add(sums[kWeight], w_sum), add(sums[kWeightSquare], w_sq);
  F e = {}, k3 = {};
  for (int i = 0; b.ref_logp && i < kBlock; i += LANES) e += load(b.e + i), k3 += load(b.k3 + i);
  add(sums[kRefK1], e), add(sums[kRefK3], k3);
}

void tokens(const PolicyColumns& c, const PolicyOptions& o, int64_t begin, int64_t end, double* out) {
  Block b;
  Column ones;
  for (int i = 0; i < kBlock; i++) ones[i] = 1;
  D sums[kPolicySums] = {};
  F top = {};
  for (int64_t at = begin; at < end; at += kBlock) {
    b.n = end - at < kBlock ? end - at : kBlock;
    columns(b, c, at, ones);
    drifts(b);
    kSurrogates[o.surrogate](b, o.params);
    if (o.kl >= 0) kKls[o.kl](b);
    losses(b, o, c.dlogp + at, c.dentropy ? c.dentropy + at : nullptr, sums);
    measures(b, sums, top);
  }
  for (int k = 0; k < kPolicySums; k++) {
    out[k] = 0;
    for (int i = 0; i < LANES; i++) out[k] += sums[k][i];
  }
  out[kRatioMax] = largest(top);
}
constexpr auto kTokenRows = tokens;
