// Groups of rewards, one after another, for the vector width of the including namespace.  All arithmetic is double.
#include "vec.h"
#include "vec_wide.h"

// count, sum, smallest and largest of the scored members.  CLEAN: no reward is NaN (checked afterwards: the sum would be), so that
// whole vectors need no masks.
struct Moments {
  double count, sum, low, high;
};

struct Sums {
  W sum, low, high;
  L scored;
};

template <bool CLEAN>
INLINE void add(Sums& s, W x) {
  const L scored = x == x;
  s.sum += CLEAN ? x : scored ? x : W{};
  if (!CLEAN) s.scored += scored;
  s.low = smaller(x, s.low);
  s.high = larger(x, s.high);
}

template <bool CLEAN, class T>
INLINE Moments moments(const T* x, long n, long room) {
  const W far = splat_wide(__builtin_inf());
  Sums s{{}, far, -far, {}};
  long i = 0;
  for (; i + WIDE <= n; i += WIDE) add<CLEAN>(s, load_wide(x + i));
  const double whole = CLEAN ? i : 0;
  if (i < n) add<false>(s, load_wide_some(x + i, n - i, room - i));
  return {whole + (CLEAN && i == n ? 0 : count(s.scored)), total(s.sum), smallest(s.low), largest(s.high)};
}

// sum of (x - mean)^2
// sum of (x - mean)^2; a missing member adds 0, so that the bits do not depend on CLEAN
template <bool CLEAN, class T>
INLINE double squares(const T* x, long n, long room, double mean) {
  W sum = {};
  long i = 0;
  for (; i + WIDE <= n; i += WIDE) {
    const W v = load_wide(x + i), d = CLEAN ? v - mean : v == v ? v - mean : W{};
    sum += d * d;
  }
  if (i < n) {
    const W v = load_wide_some(x + i, n - i, room - i), d = v == v ? v - mean : W{};
    sum += d * d;
  }
  return total(sum);
}

// --- shapes: a member x of its group -> its advantage ----------------------------------------------------
struct Linear {
  double base, factor;
  INLINE W operator()(W x) const { return (x - base) * factor; }
};

struct Softmax {
  double high, inverse, factor;  // of the temperature;  count / sum of the weights
  INLINE W weight(W x) const { return exp_wide((x - high) * inverse); }
  INLINE W operator()(W x) const { return weight(x) * factor - 1.0; }
};

// 2 rank / (count - 1) - 1, a rank being how many are smaller and half of how many others are equal
template <class T>
struct Rank {
  const T* group;
  long n;
  double last;  // count - 1
  INLINE W operator()(W x) const {
    L twice = {};
    for (long i = 0; i < n; i++) {
      const W other = splat_wide(group[i]);
      twice -= (other < x) + (other <= x);
    }
    return (__builtin_convertvector(twice, W) - 1.0) / last - 1.0;
  }
};

template <class T>
struct Group {
  const T* x;
  T* out;
  long n, room, free;  // members; elements that may be read from x on, and written from out on
};

template <bool CLEAN, class T, class Shape>
INLINE void write(const Group<T>& g, const Shape& shape) {
  long i = 0;
  for (; i + WIDE <= g.n; i += WIDE) {
    const W v = load_wide(g.x + i);
    store_wide(g.out + i, CLEAN ? shape(v) : v == v ? shape(v) : W{});
  }
  if (i == g.n) return;
  const W v = load_wide_some(g.x + i, g.n - i, g.room - i);
  store_wide_some(g.out + i, v == v ? shape(v) : W{}, g.n - i, g.free - i);
}

template <class T>
void soft(const Group<T>& g, double high, double count, double tau) {
  Softmax softmax{high, 1 / tau, 0};
  W sum = {};
  for (long i = 0; i < g.n; i += WIDE) {
    const W v = i + WIDE <= g.n ? load_wide(g.x + i) : load_wide_some(g.x + i, g.n - i, g.room - i);
    sum += v == v ? softmax.weight(v) : W{};
  }
  softmax.factor = count / total(sum);
  write<false>(g, softmax);
}

// The lines of up to kTogether groups at once: one group's root and divisions wait for one another, those of a vector do not.
constexpr int kTogether = 16;
struct Together {
  double count[kTogether], sum[kTogether], low[kTogether], high[kTogether];
  double mean[kTogether], squares[kTogether], scale[kTogether], base[kTogether], factor[kTogether];
};

template <bool CLEAN, class T>
INLINE void lines(Together& g, const T* x, long n, long room, int groups, const GroupOptions& o) {
  for (int k = 0; k < groups; k++) {
    const Moments m = moments<CLEAN>(x + k * n, n, room - k * n);
    g.count[k] = m.count, g.sum[k] = m.sum, g.low[k] = m.low, g.high[k] = m.high;
  }
  if (o.shape != kLinear) return;
  for (int k = 0; k < kTogether; k++) g.mean[k] = g.sum[k] / g.count[k];
  if (o.scale == kStd) {
    for (int k = 0; k < groups; k++) g.squares[k] = squares<CLEAN>(x + k * n, n, room - k * n, g.mean[k]);
    for (int k = 0; k < kTogether; k++) g.scale[k] = __builtin_sqrt(g.squares[k] / (g.count[k] - o.ddof)) + o.eps;
  } else {
    for (int k = 0; k < kTogether; k++) g.scale[k] = o.scale == kBatchStd ? o.batch : o.scale == kRange ? g.high[k] - g.low[k] : 1;
  }
  for (int k = 0; k < kTogether; k++) {
    const double others = o.baseline == kLeaveOneOut ? g.count[k] / (g.count[k] - 1) : 1;  // R - mean of the others, from R - mean
    g.base[k] = o.baseline == kMax ? g.high[k] : o.baseline == kNoBaseline ? 0 : g.mean[k];
    g.factor[k] = others / g.scale[k];
  }
}

// --- a group ------------------------------------------------------------------------------------------
template <bool CLEAN, class T>
INLINE void finish(const Group<T>& g, const Together& found, int k, const GroupOptions& o) {
  if (!(found.high[k] > found.low[k])) {
    for (long i = 0; i < g.n; i++) g.out[i] = 0;
  } else if (o.shape == kLinear) {
    write<CLEAN>(g, Linear{found.base[k], found.factor[k]});
  } else if (o.shape == kRank) {
    write<false>(g, Rank<T>{g.x, g.n, found.count[k] - 1});
  } else {
    soft(g, found.high[k], found.count[k], o.tau);
  }
}

template <bool CLEAN, class T>
INLINE void finish_all(const Together& found, const T* x, T* out, long n, long room, long free, int groups, const GroupOptions& o) {
  for (int k = 0; k < groups; k++) finish<CLEAN>(Group<T>{x + k * n, out + k * n, n, room - k * n, free - k * n}, found, k, o);
}

template <class T>
__attribute__((noinline)) void unclean(Together& g, const T* x, T* out, long n, long room, long free, int groups, const GroupOptions& o) {
  lines<false>(g, x, n, room, groups, o);
  finish_all<false>(g, x, out, n, room, free, groups, o);
}

// `count` groups of `size` from reward[0]; `room` elements from there may be read, and count * size written
template <class T>
INLINE void groups_of(const void* reward, void* out, int64_t count, int64_t size, int64_t room, const GroupOptions& o) {
  const T* x = static_cast<const T*>(reward);
  T* to = static_cast<T*>(out);
  Together found{};
  while (count > 0) {
    const int n = count < kTogether ? count : kTogether;
    lines<true>(found, x, size, room, n, o);
    double check = 0;  // NaN where a reward is, or where infinities meet
    for (int k = 0; k < n; k++) check += found.sum[k];
    if (check == check) finish_all<true>(found, x, to, size, room, count * size, n, o);
    else unclean(found, x, to, size, room, count * size, n, o);
    x += n * size, to += n * size, room -= n * size, count -= n;
  }
}

template <class T>
void groups(const void* reward, void* out, int64_t count, int64_t size, int64_t room, const GroupOptions& o) {
  switch (size) {  // the usual sizes as constants: loops of known length, without tails
    case 4: return groups_of<T>(reward, out, count, 4, room, o);
    case 8: return groups_of<T>(reward, out, count, 8, room, o);
    case 16: return groups_of<T>(reward, out, count, 16, room, o);
    default: return groups_of<T>(reward, out, count, size, room, o);
  }
}

// --- all samples: parts of the moments of a batch -----------------------------------------------------------
template <class T>
void scored(const void* reward, int64_t n, double& count, double& sum) {
  const Moments m = moments<false>(static_cast<const T*>(reward), n, n);
  count = m.count, sum = m.sum;
}
template <class T>
double centred(const void* reward, int64_t n, double mean) {
  return squares<false>(static_cast<const T*>(reward), n, n, mean);
}

constexpr Groups kGroups[2] = {
    {groups<float>, scored<float>, centred<float>},
    {groups<double>, scored<double>, centred<double>},
};
