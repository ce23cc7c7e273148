// Log-probability and entropy of a target token per row of logits, and their gradient; formulas in kernels/token_logp.py.
//
// Everything per row that is not a loop over V is done in double here; the loops are in token_logp_rows.h.
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

void check(Address logits, int code, int64_t stride, Address target, Address temperature, int64_t T, int64_t V, int threads) {
  FASTRL_CHECK(code == kFloat32 || code == kBFloat16, "code", "0 (fp32) or 1 (bf16)", code);
  FASTRL_CHECK(T >= 0, "T", "at least 0", T);
  FASTRL_CHECK(V >= 1, "V", "at least 1", V);
  FASTRL_CHECK(stride >= 0, "stride", "at least 0", stride);
  FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads);
  FASTRL_CHECK(T == 0 || (logits && target && temperature), "logits, target, temperature", "addresses", "0");
}

template <class T>
T* array(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void token_logp_forward_cpu(Address logits, int code, int64_t stride, Address target, Address temperature, Address logp,
                            Address entropy, Address m, Address log_s, int64_t T, int64_t V, int threads) {
  check(logits, code, stride, target, temperature, T, V, threads);
  FASTRL_CHECK(T == 0 || (logp && m && log_s), "logp, m, log_s", "addresses", "0");
  const Rows& rows = FASTRL_CHOOSE(kRows)[code];
  const auto sums = entropy ? rows.sums_entropy : rows.sums;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const char* row = array<const char>(logits) + t * stride * rows.bytes;
      const double tau = array<const float>(temperature)[t];
      const int64_t at = array<const int64_t>(target)[t];
      RowSums r;
      sums(row, V, tau, r);
      if (r.s < 0.5) r.s = kNaN;  // the largest logit alone gives 1: this row has nothing above -inf
      const double ln = std::log(r.s), z = r.top / tau;
      const double x = at >= 0 && at < V ? rows.read(row, at) : kNaN;
      array<float>(logp)[t] = static_cast<float>((x - r.top) / tau - ln);
      if (entropy) array<float>(entropy)[t] = static_cast<float>(ln - r.a / r.s);
      // m is rounded to fp32, and log_s is relative to that m: nothing is lost at an offset of 1000
      const float top = static_cast<float>(z);
      array<float>(m)[t] = top;
      array<float>(log_s)[t] = static_cast<float>(ln + (z - top));
    }
  };
  parallel(T, grain(V), threads, body);
}

void token_logp_backward_cpu(Address out, int64_t out_stride, Address logits, int code, int64_t stride, Address target,
                             Address temperature, Address dlogp, Address dentropy, Address entropy, Address m,
                             Address log_s, int64_t T, int64_t V, int threads) {
  check(logits, code, stride, target, temperature, T, V, threads);
  FASTRL_CHECK(T <= 1 || out_stride >= V, "out_stride", "at least V", out_stride);
  FASTRL_CHECK(T == 0 || (out && dlogp && m && log_s), "out, dlogp, m, log_s", "addresses", "0");
  FASTRL_CHECK(!dentropy || entropy, "entropy", "an address, because dentropy has one", "0");
  const Rows& rows = FASTRL_CHOOSE(kRows)[code];
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const char* row = array<const char>(logits) + t * stride * rows.bytes;
      char* to = array<char>(out) + t * out_stride * rows.bytes;
      const double g = array<const float>(dlogp)[t], gh = dentropy ? array<const float>(dentropy)[t] : 0;
      if (g == 0 && gh == 0) {  // a masked token: its logits need not be read
        std::memset(to, 0, V * rows.bytes);
        continue;
      }
      const double tau = array<const float>(temperature)[t], z = array<const float>(m)[t];
      const double h = dentropy ? array<const float>(entropy)[t] : 0;
      const int64_t at = array<const int64_t>(target)[t];
      const bool inside = at >= 0 && at < V;
      const double x = inside ? rows.read(row, at) : kNaN;  // before `out` overwrites it, when they are the same
      const float top = static_cast<float>(z * tau);
      const double ln = array<const float>(log_s)[t] + (z - top / tau);  // log p = (x - top) / tau - ln
      const double scale = std::exp(-ln) / tau;
      rows.gradients(to, row, V, {top, static_cast<float>(1 / tau), static_cast<float>(-gh * scale),
                                  static_cast<float>((-g - gh * (h - ln)) * scale)});
      if (!inside) continue;
      const double log_p = (x - top) / tau - ln, p = std::exp(log_p);
      const double dx = g * -std::expm1(log_p) - (p > 0 ? gh * p * (log_p + h) : 0);
      rows.write(to, at, static_cast<float>(dx / tau));
    }
  };
  parallel(T, grain(V), threads, body);
}

}  // namespace fastrl
