// Draws one token per row of logits, with its log-probability and the entropy; formulas in kernels/sample.py.
//
// Without filters a row is read twice, once for its largest logit and once, from cache, for its sums and the race that draws
// the token (sample_rows.h).  With filters the distances d to the largest logit are written to a buffer first, a radix search
// over their bits finds the floor under them, and the race runs over the buffer.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../check.h"
#include "../ops.h"

namespace fastrl {

struct RowDraw {
  float top, temperature;  // d = (x - top) / temperature
  float floor;             // what has a smaller d is filtered out
  bool greedy;
  unsigned key[2], counter[3];  // the Philox key, and its counter after the first word
  double s, a, kept;            // sums of exp(d), of exp(d) d, and of exp(d) over the survivors
  double score;                 // of `token`, the best so far; -1 while there is none
  int64_t token;
  float limit;    // what a half word must be below, per exp(d), to beat it
  int64_t ahead;  // elements to the same place in the row that comes next
};

struct SampleRows {  // the row functions of one element type
  float (*max)(const void* row, int64_t V);
  void (*run)(const void* row, int64_t V, RowDraw& draw);
  void (*run_filtered)(const void* row, int64_t V, RowDraw& draw);
  int64_t (*first_of)(const void* row, int64_t V, float value);
  void (*distances)(const void* row, int64_t V, float top, float temperature, float* out);
  float (*read)(const void* row, int64_t i);
  int64_t bytes;  // of an element
};

}  // namespace fastrl

#define FASTRL_ROWS "sample_rows.h"
#include "foreach_target.h"

namespace fastrl {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// --- the filters --------------------------------------------------------------------------------------
struct Filters {
  int64_t top_k;
  double top_p, min_p;
  explicit operator bool() const { return top_k > 0 || top_p < 1 || min_p > 0; }
};

struct Buffers {  // of a thread
  std::vector<float> d, pool;
};

uint32_t key_of(float d) {  // of a distance d <= 0: smaller for the more probable
  uint32_t bits;
  std::memcpy(&bits, &d, sizeof bits);
  return bits & 0x7fffffff;
}

// The smallest d such that the elements above it weigh less than limit(the weight of all); -inf when all of them do.
// Three histograms over 11, 10 and 10 bits of the key, each over the elements of the bin that the one before it ended in.
// Weights are integers, so that their sums depend on no order.  `pool` is used up.
template <class Weight, class Limit>
float floor_by(std::vector<float>& pool, Weight weight, Limit limit) {
  int64_t left = 0;
  for (int shift = 20; shift >= 0; shift -= 10) {
    const uint32_t bits = shift == 20 ? 0x7ff : 0x3ff;
    int64_t bins[2048] = {}, all = 0;
    for (const float d : pool) bins[key_of(d) >> shift & bits] += weight(d);
    if (shift == 20) {
      for (const int64_t bin : bins) all += bin;
      left = limit(all);
      if (left > all) return -kInfinity;
    }
    uint32_t b = 0;
    while (bins[b] < left) left -= bins[b++];
    size_t n = 0;
    for (const float d : pool) {
      if ((key_of(d) >> shift & bits) == b) pool[n++] = d;
    }
    pool.resize(n);
  }
  return pool[0];
}

// Tokens with d below it are filtered out.
float floor_of(const std::vector<float>& d, const Filters& filters, std::vector<float>& pool) {
  const int64_t V = static_cast<int64_t>(d.size());
  float floor = filters.min_p > 0 ? static_cast<float>(std::log(filters.min_p)) : -kInfinity, among = -kInfinity;
  if (filters.top_k > 0 && filters.top_k < V) {
    pool = d;
    among = floor_by(pool, [](float) { return int64_t{1}; }, [&](int64_t) { return filters.top_k; });
  }
  if (filters.top_p < 1) {
    pool.clear();
    std::copy_if(d.begin(), d.end(), std::back_inserter(pool), [&](float x) { return x >= among; });
    int length = 0;  // of V in bits: the weights of V tokens fit into 62
    while (V >> length) length++;
    const double scale = std::ldexp(1.0, 62 - length), least = std::log(1 / scale) - 1;
    const auto weight = [=](float x) { return x < least ? 0 : static_cast<int64_t>(std::exp(static_cast<double>(x)) * scale); };
    const auto limit = [&](int64_t all) {
      return std::max<int64_t>(1, static_cast<int64_t>(filters.top_p * static_cast<double>(all)));
    };
    if (!pool.empty()) floor = std::max(floor, floor_by(pool, weight, limit));
  }
  return std::max(floor, among);
}

// --- a row ----------------------------------------------------------------------------------------------
template <class T>
T* array(Address address) {
  return reinterpret_cast<T*>(address);
}

void split(int64_t x, unsigned* low_high) {
  low_high[0] = static_cast<unsigned>(x);
  low_high[1] = static_cast<unsigned>(static_cast<uint64_t>(x) >> 32);
}

void draw_row(const SampleRows* all, int code, const void* row, int64_t V, const Filters& filters, Buffers& buffers, RowDraw& draw) {
  const SampleRows& rows = all[code];
  draw.top = rows.max(row, V);
  draw.floor = -kInfinity;
  draw.s = draw.a = draw.kept = 0;
  draw.token = -1;
  if (!filters) {
    rows.run(row, V, draw);
    draw.kept = draw.s;
  } else {
    buffers.d.resize(V);
    rows.distances(row, V, draw.top, draw.temperature, buffers.d.data());
    draw.floor = draw.greedy ? -kInfinity : floor_of(buffers.d, filters, buffers.pool);
    RowDraw over = draw;
    over.top = 0, over.temperature = 1, over.ahead = 0;
    all[kFloat32].run_filtered(buffers.d.data(), V, over);
    draw.s = over.s, draw.a = over.a, draw.kept = over.kept, draw.token = over.token;
  }
  if (draw.s < 0.5) draw.s = kNaN;  // the largest logit alone gives 1: this row has nothing above -inf
  if (draw.token < 0) draw.token = rows.first_of(row, V, draw.top);  // greedy, or a row without a distribution
}

void check(Address logits, int code, int64_t stride, int64_t B, int64_t V, const Filters& filters, int threads) {
  FASTRL_CHECK(code == kFloat32 || code == kBFloat16, "code", "0 (fp32) or 1 (bf16)", code);
  FASTRL_CHECK(B >= 0, "B", "at least 0", B);
  FASTRL_CHECK(V >= 1, "V", "at least 1", V);
  FASTRL_CHECK(stride >= 0, "stride", "at least 0", stride);
  FASTRL_CHECK(filters.top_k >= 0, "top_k", "at least 0", filters.top_k);
  FASTRL_CHECK(filters.top_p > 0, "top_p", "above 0", filters.top_p);
  FASTRL_CHECK(filters.min_p >= 0, "min_p", "at least 0", filters.min_p);
  FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads);
  FASTRL_CHECK(B == 0 || logits, "logits", "an address", "0");
}

}  // namespace

void sample_forward_cpu(Address logits, int code, int64_t stride, Address seed, Address sequence, Address position,
                        Address temperature, Address token, Address logp, Address behaviour_logp, Address entropy, int64_t B,
                        int64_t V, int64_t top_k, double top_p, double min_p, int threads) {
  const Filters filters{top_k, top_p, min_p};
  check(logits, code, stride, B, V, filters, threads);
  FASTRL_CHECK(B == 0 || (seed && sequence && position && temperature), "seed, sequence, position, temperature", "addresses", "0");
  FASTRL_CHECK(B == 0 || (token && logp && behaviour_logp && entropy), "token, logp, behaviour_logp, entropy", "addresses", "0");
  const SampleRows* rows = FASTRL_CHOOSE(kRows);
  auto body = [&](int64_t begin, int64_t end) {
    static thread_local Buffers buffers;
    for (int64_t b = begin; b < end; b++) {
      const char* row = array<const char>(logits) + b * stride * rows[code].bytes;
      const float tau = array<const float>(temperature)[b];
      RowDraw draw{};
      draw.greedy = tau == 0;
      draw.temperature = draw.greedy ? 1 : tau;
      draw.ahead = b + 1 < B ? stride : 0;
      split(array<const int64_t>(seed)[b], draw.key);
      draw.counter[0] = static_cast<unsigned>(array<const int64_t>(position)[b]);
      split(array<const int64_t>(sequence)[b], draw.counter + 1);
      draw_row(rows, code, row, V, filters, buffers, draw);
      const double ln = std::log(draw.s);
      const double at = (static_cast<double>(rows[code].read(row, draw.token)) - draw.top) / draw.temperature;
      array<int64_t>(token)[b] = draw.token;
      array<float>(logp)[b] = static_cast<float>(at - ln);
      array<float>(entropy)[b] = static_cast<float>(ln - draw.a / draw.s);
      array<float>(behaviour_logp)[b] = draw.greedy ? 0 : static_cast<float>(filters ? at - std::log(draw.kept) : at - ln);
    }
  };
  parallel(B, 1 + 16384 / V, threads, body);
}

}  // namespace fastrl
