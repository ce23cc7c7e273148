// silu(gate) up of each row and its gradient; formulas in kernels/swiglu.py.
#include <cstdint>

#include "../check.h"
#include "../ops.h"

namespace fastrl {

struct GateRows {  // the row functions of one element type; a row of x and dx is `width` gates, then `width` ups
  void (*forward)(void* y, const void* x, int64_t width);
  void (*backward)(void* dx, const void* dy, const void* x, int64_t width);
  int64_t bytes;  // of an element
};

}  // namespace fastrl

#define FASTRL_ROWS "swiglu_rows.h"
#include "foreach_target.h"

namespace fastrl {
namespace {

void check(int code, int64_t T, int64_t F, int threads) {
  FASTRL_CHECK(code == kFloat32 || code == kBFloat16, "code", "0 (fp32) or 1 (bf16)", code);
  FASTRL_CHECK(T >= 0, "T", "at least 0", T);
  FASTRL_CHECK(F >= 1, "F", "at least 1", F);
  FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads);
}

}  // namespace

void swiglu_forward_cpu(Address y, Address x, int64_t stride, int code, int64_t T, int64_t F, int threads) {
  check(code, T, F, threads);
  FASTRL_CHECK(T == 0 || (y && x), "y, x", "addresses", "0");
  const GateRows& rows = FASTRL_CHOOSE(kGateRows)[code];
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      rows.forward(reinterpret_cast<char*>(y) + t * F * rows.bytes, reinterpret_cast<const char*>(x) + t * stride * rows.bytes, F);
    }
  };
  parallel(T, 1 + 8192 / F, threads, body);
}

void swiglu_backward_cpu(Address dx, Address dy, int64_t dy_stride, Address x, int64_t stride, int code, int64_t T, int64_t F,
                         int threads) {
  check(code, T, F, threads);
  FASTRL_CHECK(T == 0 || (dx && dy && x), "dx, dy, x", "addresses", "0");
  const GateRows& rows = FASTRL_CHOOSE(kGateRows)[code];
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      rows.backward(reinterpret_cast<char*>(dx) + 2 * t * F * rows.bytes, reinterpret_cast<const char*>(dy) + t * dy_stride * rows.bytes,
                    reinterpret_cast<const char*>(x) + t * stride * rows.bytes, F);
    }
  };
  parallel(T, 1 + 8192 / F, threads, body);
}

}  // namespace fastrl
