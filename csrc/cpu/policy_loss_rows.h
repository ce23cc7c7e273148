// One chunk of policy_loss: value, both derivatives and the sums of the metrics, for the vector width of the including namespace.
//
// Tokens go through in blocks that stay in L1, one stage after the other: the columns, the surrogate, the KL, the sums.  So a row of
// the tables is one small function here, found by its number, and rows do not multiply.
#include "vec.h"

constexpr int kBlock = 16 * LANES;  // tokens: an fp32 lane adds no more than 16, and the columns of a block fit L1 together
constexpr float kBound = 20;  // of d and e before any exponential

typedef float Column[kBlock] __attribute__((aligned(64)));

// A block as the stages see it.  A pointer leads to the caller's own vector, or to a copy in which masked-out tokens and those
// beyond the end hold 0; 0 means absent.
struct Block {
  long n;  // tokens: kBlock, but for the last
  const float *logp, *old_logp, *advantage, *weight, *ref_logp, *correction, *entropy, *mean;
  Column live;                // 1 or 0
  Column d, r, sequence_r;    // d as the surrogate sees it, r of the token, r of its sequence
  const float* ratio;         // one of the two: as the surrogate sees it
  Column e, x, k3;            // to the reference: e unbounded, x = exp(-e) - 1, k3 = x + e
  Column value, slope, kl, kl_slope;
  Column copies[8];
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

// The sums of a block are fp32 in each lane; across blocks they are double.
INLINE void add(D& to, F x) { to += __builtin_convertvector(x, D); }

template <Term (*RULE)(const Token&, const double*)>
void surrogate(Block& b, const double* params, D* sums) {
  F low = {}, high = {}, cap = {};
  for (int i = 0; i < kBlock; i += LANES) {
    const F live = load(b.live + i);
    const Term x = RULE({load(b.d + i), load(b.ratio + i), load(b.logp + i), load(b.advantage + i)}, params);
    store(b.value + i, x.value), store(b.slope + i, x.slope);
    low += x.low * live, high += x.high * live, cap += x.cap * live;
  }
  add(sums[kClipLow], low), add(sums[kClipHigh], high), add(sums[kClipCap], cap);
}
// by cpu_id, in the order of the table in kernels/surrogates.py
constexpr void (*kSurrogates[])(Block&, const double*, D*) = {
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

INLINE Kl k3_cut(const Drift& t) {
  const I far = t.k3 > 10.0f;
  return {far ? splat(10) : t.k3, far ? F{} : -t.x};
}

INLINE Kl k3_plus_cut(const Drift& t) {
  const I far = t.k3 > 10.0f;
  return {far ? splat(10) : t.k3, far ? F{} : t.e};
}

template <Kl (*RULE)(const Drift&)>
void kl(Block& b) {
  for (int i = 0; i < kBlock; i += LANES) {
    const Kl x = RULE({load(b.e + i), load(b.x + i), load(b.k3 + i), load(b.r + i)});
    store(b.kl + i, x.value), store(b.kl_slope + i, x.slope);
  }
}
constexpr void (*kKls[])(Block&) = {  // as KLS
    kl<k1>, kl<k2>, kl<k3>, kl<k3_plus>, kl<k1_is>, kl<k3_is>, kl<size_of>, kl<k3_cut>, kl<k3_plus_cut>,
};
static_assert(sizeof kKls == kPolicyKls * sizeof *kKls, "kPolicyKls counts them");

// --- stages -------------------------------------------------------------------------------------------
// 1 for each of the n tokens from `at` on that counts, else 0
INLINE void live_tokens(Column live, const unsigned char* mask, int64_t at, long n) {
  if (mask && n == kBlock) {
    for (int k = 0; k < kBlock; k++) live[k] = mask[at + k] != 0;
  } else {
    for (int k = 0; k < kBlock; k++) live[k] = k < n && (!mask || mask[at + k]);
  }
}

// a copy of n elements in which those that do not count, and the rest of the block, are 0
INLINE const float* selected(float* copy, const float* from, const float* live, long n) {
  for (int i = 0; i < kBlock; i += LANES) {
    const F x = i + LANES <= n ? load(from + i) : i < n ? load_some(from + i, n - i, 0.0f) : F{};
    store(copy + i, (F)((I)x & (load(live + i) > 0.0f)));
  }
  return copy;
}

INLINE void columns(Block& b, const PolicyColumns& c, int64_t at) {
  const bool whole = b.n == kBlock && !c.mask;
  live_tokens(b.live, c.mask, at, b.n);
  const auto part = [&](int k, const float* from) {
    return !from ? from : whole ? from + at : selected(b.copies[k], from + at, b.live, b.n);
  };
  b.logp = part(0, c.logp), b.old_logp = part(1, c.old_logp), b.advantage = part(2, c.advantage), b.weight = part(3, c.weight);
  b.ref_logp = part(4, c.ref_logp), b.correction = part(5, c.correction), b.entropy = part(6, c.entropy), b.mean = part(7, c.mean);
}

INLINE void drifts(Block& b, D* sums) {
  F d_sum = {}, square = {}, k3_sum = {};
  for (int i = 0; i < kBlock; i += LANES) {
    const F d = load(b.logp + i) - load(b.old_logp + i), near = bounded(d);
    const Reduced x = reduce_exp(near);
    store(b.d + i, near), store(b.r + i, exp_of(x));
    d_sum -= d, square += d * d, k3_sum += exp_rest(x) + (near - d);  // the second term is 0 but beyond the bound
  }
  add(sums[kOldK1], d_sum), add(sums[kSquare], 0.5f * square), add(sums[kOldK3], k3_sum);
  b.ratio = b.mean ? b.sequence_r : b.r;
  for (int i = 0; b.mean && i < kBlock; i += LANES) {
    const F d = bounded(load(b.mean + i));
    store(b.d + i, d), store(b.sequence_r + i, exp_in_range(d));
  }
}

INLINE void distances(Block& b, D* sums) {
  F e_sum = {}, k3_sum = {};
  for (int i = 0; i < kBlock; i += LANES) {
    const F e = load(b.logp + i) - load(b.ref_logp + i), near = bounded(-e);
    const F rest = exp_rest(reduce_exp(near)), k3 = rest + (near + e);
    store(b.e + i, e), store(b.x + i, rest + near), store(b.k3 + i, k3);
    e_sum += e, k3_sum += k3;
  }
  add(sums[kRefK1], e_sum), add(sums[kRefK3], k3_sum);
}

template <class T>
INLINE void put(T* to, F x, long i, long n) {
  if (i + LANES <= n) store(to + i, x);
  else if (i < n) store_some(to + i, x, n - i);
}

INLINE void losses(const Block& b, const PolicyOptions& o, float* dlogp, D* sums) {
  const F kl_coef = splat((float)o.kl_coef), entropy_coef = splat((float)o.entropy_coef);
  F sum = {};
  for (int i = 0; i < kBlock; i += LANES) {
    F value = -load(b.value + i), slope = -load(b.slope + i);
    const F weight = load(b.weight + i);
    if (b.correction) value *= load(b.correction + i), slope *= load(b.correction + i);
    if (o.kl >= 0) value += kl_coef * load(b.kl + i), slope += kl_coef * load(b.kl_slope + i);
    if (b.entropy && o.entropy_coef != 0) value -= entropy_coef * load(b.entropy + i);
    put(dlogp, slope * weight, i, b.n);
    sum += value * weight;
  }
  add(sums[kLoss], sum);
}

INLINE void entropies(const Block& b, const PolicyOptions& o, float* dentropy, D* sums) {
  F sum = {};
  for (int i = 0; i < kBlock; i += LANES) {
    put(dentropy, load(b.weight + i) * (float)-o.entropy_coef, i, b.n);
    sum += load(b.entropy + i);
  }
  add(sums[kEntropy], sum);
}

INLINE void measures(const Block& b, D* sums, F& top) {
  F count = {}, r_sum = {}, advantage = {}, weight = {}, square = {};
  for (int i = 0; i < kBlock; i += LANES) {
    const F live = load(b.live + i), r = load(b.ratio + i) * live;  // finite where it is not live
    const F w = b.correction ? r * load(b.correction + i) : r;
    count += live, r_sum += r, advantage += load(b.advantage + i), weight += w, square += w * w;
    top = larger(r, top);
  }
  add(sums[kTokens], count), add(sums[kRatio], r_sum), add(sums[kAdvantage], advantage);
  add(sums[kWeight], weight), add(sums[kWeightSquare], square);
}

void tokens(const PolicyColumns& c, const PolicyOptions& o, int64_t begin, int64_t end, double* out) {
  Block b;
  D sums[kPolicySums] = {};
  F top = {};
  for (int64_t at = begin; at < end; at += kBlock) {
    b.n = end - at < kBlock ? end - at : kBlock;
    columns(b, c, at);
    drifts(b, sums);
    if (b.ref_logp) distances(b, sums);
    kSurrogates[o.surrogate](b, o.params, sums);
    if (o.kl >= 0) kKls[o.kl](b);
    losses(b, o, c.dlogp + at, sums);
    if (b.entropy) entropies(b, o, c.dentropy + at, sums);
    measures(b, sums, top);
  }
  for (int k = 0; k < kPolicySums; k++) {
    out[k] = 0;
    for (int i = 0; i < LANES; i++) out[k] += sums[k][i];
  }
  out[kRatioMax] = largest(top);
}

// The mean of logp - old_logp over the live tokens of one sequence.
float mean_drift(const PolicyColumns& c, int64_t begin, int64_t end) {
  Column live, logp, old_logp;
  D sum = {}, count = {};
  for (int64_t at = begin; at < end; at += kBlock) {
    const long n = end - at < kBlock ? end - at : kBlock;
    live_tokens(live, c.mask, at, n);
    const float *p = selected(logp, c.logp + at, live, n), *q = selected(old_logp, c.old_logp + at, live, n);
    F part = {};
    for (int i = 0; i < kBlock; i += LANES) {
      add(sum, load(p + i) - load(q + i));
      part += load(live + i);
    }
    add(count, part);
  }
  double total = 0, tokens = 0;
  for (int i = 0; i < LANES; i++) total += sum[i], tokens += count[i];
  return (float)(total / (tokens > 0 ? tokens : 1));
}

constexpr PolicyRows kPolicy = {tokens, mean_drift};
