// The start and the step of projected gradient ascent; formulas in kernels/perturb.py.
//
// Rows leave their sums, in double, in an array, and a ball's are added up in order: the bits do not depend on the threads.
// A thread takes whole balls where there are enough, so that the second pass finds in its cache what the first one read.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../check.h"
#include "../ops.h"

namespace fastrl {

struct PerturbSums {
  double gg, dg, dd;
  bool finite;
};

struct PerturbMove {
  float scale, a, factor;
};

struct PerturbPlain {  // what reads no gradient
  void (*scale)(float* x, int64_t D, float by);
  void (*excess[2])(const float* x, int64_t D, float high, float low, double& sum, double& n);  // [exact]
  void (*shrink)(float* x, int64_t D, float high, float low);
  void (*start)(float* out, int64_t first, int64_t n, unsigned k0, unsigned k1, double edge);
  void (*add[2][2])(void* out, const void* embeds, const float* x, int64_t D);  // [type of embeds][type of out]
};

struct PerturbRows {  // the row functions of one type of gradient
  void (*sums)(const float* x, const void* grad, int64_t D, PerturbSums& out);
  void (*move)(float* x, const void* grad, int64_t D, const PerturbMove& move);
  float (*greatest)(const void* grad, int64_t D);
  double (*count)(const void* grad, int64_t D, float top);
  void (*raise)(float* x, const void* grad, int64_t D, float top, float share);
  void (*clamp)(float* x, const void* grad, int64_t D, float step, float radius);
  int64_t bytes;  // of an element
};

}  // namespace fastrl

#define FASTRL_ROWS "perturb_rows.h"
#include "foreach_target.h"

namespace fastrl {
namespace {

enum Norm : int { kL2 = 0, kLinf = 1, kL1 = 2 };
constexpr double kTiny = 1e-12;      // a gradient of no greater norm has no direction
constexpr double kShort = 1 - 1e-6;  // of a Newton step: the sums are good to 1e-7, and must not lead past the root
constexpr double kClose = 1e-6;      // of the radius: f when the last step, a whole one, is taken
constexpr int kNewtonSteps = 48;

struct Step {
  const PerturbPlain& plain;
  const PerturbRows& rows;
  float* delta;
  int64_t delta_stride;
  const char* grad;
  int64_t grad_stride;
  const uint8_t* mask;
  char* out;
  int64_t out_code, out_stride;
  const char* embeds;
  int64_t embeds_code, embeds_stride;
  int64_t D;
  double step, radius;
  std::vector<PerturbSums> sums;  // of each row; l1 keeps its own two numbers there

  bool live(int64_t t) const { return mask == nullptr || mask[t] != 0; }
  float* x(int64_t t) const { return delta + t * delta_stride; }
  const char* g(int64_t t) const { return grad + t * grad_stride * rows.bytes; }

  template <class Row>
  void each(int64_t begin, int64_t end, int threads, const Row& row) {
    auto body = [&](int64_t i, int64_t n) {
      for (int64_t t = begin + i; t < begin + n; t++) row(t);
    };
    parallel(end - begin, 1 + 16384 / D, threads, body);
  }

  void add(int64_t t) const {
    static constexpr int64_t kBytes[] = {4, 2};
    if (out == nullptr) return;
    plain.add[embeds_code][out_code](out + t * out_stride * kBytes[out_code], embeds + t * embeds_stride * kBytes[embeds_code], x(t), D);
  }

  void clear(int64_t t) const { std::memset(x(t), 0, D * sizeof(float)); }

  void ball(int norm, int64_t begin, int64_t end, int threads) {
    if (norm == kL2) return l2(begin, end, threads);
    if (norm == kL1) return l1(begin, end, threads);
    each(begin, end, threads, [&](int64_t t) {
      if (!live(t)) clear(t);
      else rows.clamp(x(t), g(t), D, rows.greatest(g(t), D) < 0 ? 0 : static_cast<float>(step), static_cast<float>(radius));
      add(t);
    });
  }

  void l2(int64_t begin, int64_t end, int threads) {
    each(begin, end, threads, [&](int64_t t) {
      if (live(t)) rows.sums(x(t), g(t), D, sums[t]);
      else sums[t] = {0, 0, 0, false};
    });
    double gg = 0, dg = 0, dd = 0;
    for (int64_t t = begin; t < end; t++) {
      gg += sums[t].gg;
      dg += sums[t].dg;
      dd += sums[t].dd;
    }
    const double length = std::sqrt(gg), a = length > kTiny ? step / length : 0;
    const double square = dd + 2 * a * dg + a * a * gg;  // of the length after the step
    const float factor = static_cast<float>(radius == 0 ? 0 : square > radius * radius ? radius / std::sqrt(square) : 1);
    const float scale = length > 1e18 ? 0x1p-80f : 1;  // or `a` would be less than fp32 can hold
    const PerturbMove move = {scale, static_cast<float>(a / scale), factor};
    each(begin, end, threads, [&](int64_t t) {
      if (!live(t)) clear(t);
      else if (sums[t].finite) rows.move(x(t), g(t), D, move);
      else if (factor != 1) plain.scale(x(t), D, factor);
      add(t);
    });
  }

  void l1(int64_t begin, int64_t end, int threads) {
    each(begin, end, threads, [&](int64_t t) { sums[t].gg = live(t) ? rows.greatest(g(t), D) : -1; });
    double top = 0, n = 0, threshold = 0;
    for (int64_t t = begin; t < end; t++) top = std::max(top, sums[t].gg);
    if (top > kTiny) {
      each(begin, end, threads, [&](int64_t t) { sums[t].dg = sums[t].gg == top ? rows.count(g(t), D, static_cast<float>(top)) : 0; });
      for (int64_t t = begin; t < end; t++) n += sums[t].dg;
    }
    const float share = static_cast<float>(n > 0 ? step / n : 0);
    each(begin, end, threads, [&](int64_t t) {
      if (!live(t)) clear(t);
      else if (n > 0 && sums[t].gg == top) rows.raise(x(t), g(t), D, static_cast<float>(top), share);
    });
    double f = 0, above = 0;
    const auto measure = [&](bool exact) {
      const float high = static_cast<float>(threshold), low = static_cast<float>(threshold - high);
      each(begin, end, threads, [&](int64_t t) { plain.excess[exact](x(t), D, high, low, sums[t].gg, sums[t].dg); });
      f = -radius, above = 0;
      for (int64_t t = begin; t < end; t++) {
        f += sums[t].gg;
        above += sums[t].dg;
      }
    };
    measure(false);
    for (int i = 0; i < kNewtonSteps && f > kClose * radius; i++) {
      threshold += kShort * f / above;
      measure(false);
    }
    if (f > -kClose * radius || threshold > 0) measure(true);
    if (above > 0 && (f > 0 || threshold > 0)) threshold += f / above;
    const float high = static_cast<float>(threshold), low = static_cast<float>(threshold - high);
    each(begin, end, threads, [&](int64_t t) {
      if (radius == 0) clear(t);
      else if (threshold > 0) plain.shrink(x(t), D, high, low);
      add(t);
    });
  }
};

// Calls one(u, begin, end, threads left for it) for every ball; no `ends`: each token is one.
template <class One>
void balls(const int64_t* ends, int64_t S, int64_t T, int64_t D, int threads, const One& one) {
  const bool many = ends == nullptr || S >= 2 * threads;
  auto body = [&](int64_t from, int64_t to) {
    for (int64_t u = from; u < to; u++) one(ends ? ends[u] : u, ends ? ends[u + 1] : u + 1, many ? 1 : threads);
  };
  if (many) parallel(ends ? S : T, ends ? 1 : 1 + 16384 / D, threads, body);
  else body(0, S);
}

void check(Address delta, Address ends, int64_t S, int64_t T, int64_t D, int norm, int threads) {
  FASTRL_CHECK(norm >= kL2 && norm <= kL1, "norm", "0 (l2), 1 (linf) or 2 (l1)", norm);
  FASTRL_CHECK(T >= 0, "T", "at least 0", T);
  FASTRL_CHECK(D >= 1, "D", "at least 1", D);
  FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads);
  FASTRL_CHECK(T == 0 || delta, "delta", "an address", "0");
  if (ends) check_ends("ends", reinterpret_cast<const int64_t*>(ends), S, T);
}

}  // namespace

void perturb_step_cpu(Address delta, int64_t delta_stride, Address grad, int code, int64_t grad_stride, Address mask, Address ends,
                      int64_t S, int64_t T, int64_t D, double step_size, double radius, int norm, Address embeds, int embeds_code,
                      int64_t embeds_stride, Address out, int out_code, int64_t out_stride, int threads) {
  check(delta, ends, S, T, D, norm, threads);
  for (const int c : {code, embeds_code, out_code}) FASTRL_CHECK(c == kFloat32 || c == kBFloat16, "code", "0 (fp32) or 1 (bf16)", c);
  FASTRL_CHECK(T == 0 || grad, "grad", "an address", "0");
  FASTRL_CHECK(!out || embeds, "embeds", "an address, because out has one", "0");
  Step step{FASTRL_CHOOSE(kPlain), FASTRL_CHOOSE(kRows)[code], reinterpret_cast<float*>(delta), delta_stride,
            reinterpret_cast<const char*>(grad), grad_stride, reinterpret_cast<const uint8_t*>(mask), reinterpret_cast<char*>(out),
            out_code, out_stride, reinterpret_cast<const char*>(embeds), embeds_code, embeds_stride, D, step_size, radius,
            std::vector<PerturbSums>(norm == kLinf ? 0 : T)};
  balls(reinterpret_cast<const int64_t*>(ends), S, T, D, threads,
        [&](int64_t begin, int64_t end, int left) { step.ball(norm, begin, end, left); });
}

void perturb_init_cpu(Address delta, Address mask, Address ends, int64_t S, int64_t T, int64_t D, double radius, int norm,
                      int64_t seed, int threads) {
  check(delta, ends, S, T, D, norm, threads);
  const auto start = FASTRL_CHOOSE(kPlain).start;
  const uint8_t* live = reinterpret_cast<const uint8_t*>(mask);
  const unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(static_cast<uint64_t>(seed) >> 32);
  float* x = reinterpret_cast<float*>(delta);
  balls(reinterpret_cast<const int64_t*>(ends), S, T, D, threads, [&](int64_t begin, int64_t end, int left) {
    int64_t tokens = 0;
    for (int64_t t = begin; t < end; t++) tokens += live == nullptr || live[t] != 0;
    const double n = static_cast<double>(std::max<int64_t>(tokens, 1)) * D;
    const double edge = radius / (norm == kL2 ? std::sqrt(n) : norm == kL1 ? n : 1);
    auto body = [&](int64_t from, int64_t to) {
      for (int64_t t = begin + from; t < begin + to; t++) {
        if (live == nullptr || live[t] != 0) start(x + t * D, t * D, D, k0, k1, edge);
        else std::memset(x + t * D, 0, D * sizeof(float));
      }
    };
    parallel(end - begin, 1 + 16384 / D, left, body);
  });
}

}  // namespace fastrl
