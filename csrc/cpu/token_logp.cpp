// Log-probability and entropy of a target token per row of logits, and their gradient; formulas in kernels/token_logp.py.
//
// Everything per row that is not a loop over V is done in double here; the loops are in token_logp_rows.h.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../check.h"
#include "../ops.h"

namespace fastrl {

struct RowSums {
  float top;    // X, the largest logit
  double s, a;  // sum exp(d) and sum exp(d) d, d = (x - X) / temperature
};

struct RowGradient {
  float top, inverse, slope, offset;
};

struct Rows {  // the row functions of one element type
  void (*sums)(const void* row, int64_t V, double temperature, RowSums& out);
  void (*sums_entropy)(const void* row, int64_t V, double temperature, RowSums& out);
  void (*gradients)(void* out, const void* row, int64_t V, const RowGradient& gradient);
  float (*read)(const void* row, int64_t i);
  void (*write)(void* row, int64_t i, float value);
  int64_t bytes;  // of an element
};

}  // namespace fastrl

#define FASTRL_ROWS "token_logp_rows.h"
#include "foreach_target.h"

namespace fastrl {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

int64_t grain(int64_t V) { return 1 + 16384 / V; }  // rows a thread takes at once: enough to pay for the hand-over

void check(Address logits, int code, const RowsAt& at, Address target, Address temperature, int64_t T, int64_t V, int threads) {
  FASTRL_CHECK(code == kFloat32 || code == kBFloat16, "code", "0 (fp32) or 1 (bf16)", code);
  FASTRL_CHECK(T >= 0, "T", "at least 0", T);
  FASTRL_CHECK(V >= 1, "V", "at least 1", V);
  FASTRL_CHECK(at.L >= 1, "L", "at least 1", at.L);
  FASTRL_CHECK(at.row >= 0 && at.batch >= 0, "row, batch", "strides of at least 0", std::min(at.row, at.batch));
  FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads);
  FASTRL_CHECK(T == 0 || (logits && target && temperature), "logits, target, temperature", "addresses", "0");
}

template <class T>
T* array(Address address) {
  return reinterpret_cast<T*>(address);
}

struct Stats {  // of one row: log p = (x - top) / tau - ln
  double tau, top, ln, logp, entropy;
  float m, log_s;  // m is rounded to fp32, and log_s is relative to that m: nothing is lost at an offset of 1000
};

Stats row_stats(const Rows& rows, const void* row, int64_t V, int64_t target, double tau, bool entropy) {
  RowSums r;
  (entropy ? rows.sums_entropy : rows.sums)(row, V, tau, r);
  if (r.s < 0.5) r.s = kNaN;  // the largest logit alone gives 1: this row has nothing above -inf
  const double ln = std::log(r.s), z = r.top / tau;
  const double x = target >= 0 && target < V ? rows.read(row, target) : kNaN;
  const float m = static_cast<float>(z);
  return {tau, r.top, ln, (x - r.top) / tau - ln, ln - r.a / r.s, m, static_cast<float>(ln + (z - m))};
}

struct Outputs {  // (T,) each; entropy may be null
  float *logp, *entropy, *m, *log_s;

  void store(int64_t t, const Stats& s) const {
    logp[t] = static_cast<float>(s.logp);
    if (entropy) entropy[t] = static_cast<float>(s.entropy);
    m[t] = s.m;
    log_s[t] = s.log_s;
  }
};

// `to` may be `row`; g and gh are the derivatives by logp and entropy.
void row_gradient(const Rows& rows, void* to, const void* row, int64_t V, int64_t target, double tau, float top, double ln,
                  double g, double gh, double h) {
  if (g == 0 && gh == 0) {  // a masked token: its logits need not be read
    std::memset(to, 0, V * rows.bytes);
    return;
  }
  const bool inside = target >= 0 && target < V;
  const double x = inside ? rows.read(row, target) : kNaN;  // before `to` overwrites it, when they are the same
  const double scale = std::exp(-ln) / tau;
  rows.gradients(to, row, V, {top, static_cast<float>(1 / tau), static_cast<float>(-gh * scale),
                              static_cast<float>((-g - gh * (h - ln)) * scale)});
  if (!inside) return;
  const double log_p = (x - top) / tau - ln, p = std::exp(log_p);
  const double dx = g * -std::expm1(log_p) - (p > 0 ? gh * p * (log_p + h) : 0);
  rows.write(to, target, static_cast<float>(dx / tau));
}

}  // namespace

void token_logp_forward_cpu(Address logits, int code, int64_t L, int64_t batch, int64_t row, Address target,
                            Address temperature, Address logp, Address entropy, Address m, Address log_s, int64_t T,
                            int64_t V, int threads) {
  const RowsAt at{L, batch, row};
  check(logits, code, at, target, temperature, T, V, threads);
  FASTRL_CHECK(T == 0 || (logp && m && log_s), "logp, m, log_s", "addresses", "0");
  const Rows& rows = FASTRL_CHOOSE(kRows)[code];
  const Outputs outputs{array<float>(logp), array<float>(entropy), array<float>(m), array<float>(log_s)};
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const char* x = array<const char>(logits) + at(t) * rows.bytes;
      const int64_t y = array<const int64_t>(target)[t];
      outputs.store(t, row_stats(rows, x, V, y, array<const float>(temperature)[t], entropy != 0));
    }
  };
  parallel(T, grain(V), threads, body);
}

void token_logp_backward_cpu(Address out, int64_t out_batch, int64_t out_row, Address logits, int code, int64_t L,
                             int64_t batch, int64_t row, Address target, Address temperature, Address dlogp,
                             Address dentropy, Address entropy, Address m, Address log_s, int64_t T, int64_t V,
                             int threads) {
  const RowsAt at{L, batch, row}, to{L, out_batch, out_row};
  check(logits, code, at, target, temperature, T, V, threads);
  FASTRL_CHECK(T <= 1 || out_row >= V || L == 1, "out_row", "at least V", out_row);
  FASTRL_CHECK(T == 0 || (out && dlogp && m && log_s), "out, dlogp, m, log_s", "addresses", "0");
  FASTRL_CHECK(!dentropy || entropy, "entropy", "an address, because dentropy has one", "0");
  const Rows& rows = FASTRL_CHOOSE(kRows)[code];
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const double tau = array<const float>(temperature)[t], z = array<const float>(m)[t];
      const float top = static_cast<float>(z * tau);
      const double ln = array<const float>(log_s)[t] + (z - top / tau);
      row_gradient(rows, array<char>(out) + to(t) * rows.bytes, array<const char>(logits) + at(t) * rows.bytes, V,
                   array<const int64_t>(target)[t], tau, top, ln, array<const float>(dlogp)[t],
                   dentropy ? array<const float>(dentropy)[t] : 0, dentropy ? array<const float>(entropy)[t] : 0);
    }
  };
  parallel(T, grain(V), threads, body);
}

void token_logp_fused_cpu(Address logits, int code, int64_t L, int64_t batch, int64_t row, Address target,
                          Address temperature, Address dlogp, Address dentropy, Address logp, Address entropy, Address m,
                          Address log_s, int64_t T, int64_t V, int threads) {
  const RowsAt at{L, batch, row};
  check(logits, code, at, target, temperature, T, V, threads);
  FASTRL_CHECK(T == 0 || (dlogp && logp && m && log_s), "dlogp, logp, m, log_s", "addresses", "0");
  FASTRL_CHECK(!dentropy || entropy, "entropy", "an address, because dentropy has one", "0");
  const Rows& rows = FASTRL_CHOOSE(kRows)[code];
  const Outputs outputs{array<float>(logp), array<float>(entropy), array<float>(m), array<float>(log_s)};
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {  // a row is still in the cache when its gradient is written
      char* x = array<char>(logits) + at(t) * rows.bytes;
      const int64_t y = array<const int64_t>(target)[t];
      const Stats s = row_stats(rows, x, V, y, array<const float>(temperature)[t], entropy != 0);
      outputs.store(t, s);
      row_gradient(rows, x, x, V, y, s.tau, static_cast<float>(s.top), s.ln, array<const float>(dlogp)[t],
                   dentropy ? array<const float>(dentropy)[t] : 0, dentropy ? s.entropy : 0);
    }
  };
  parallel(T, grain(V), threads, body);
}

}  // namespace fastrl
